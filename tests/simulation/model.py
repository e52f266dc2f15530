"""A model whose "hidden states" are hashes chained over plan, request, position and stage; its engine is the real one.

Each stage keeps its own chain in the place of keys, so that a wrong position, row, stage, epoch or cache gives a number
that belongs to no request, and is told at once. Queues and faults may not be known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mqinfer.attention import Extent
from mqinfer.kv_cache import KVCache, LayerShape
from mqinfer.plan import Plan, StageSpec
from mqinfer.stage_engine import Job, StageEngine

HIDDEN = 2
VOCABULARY = 512
EOS = 2
FIRST_TOKEN = 3
_MASK = (1 << 24) - 1
#: A number is 40 bits of hash and, below them, 8 of the row's epoch: two float32 carry it exactly.
_EPOCHS = 1 << 8


def make_plan(stages: int, context_tokens: int = 256, fingerprint: str = "simulated") -> Plan:
    """The plan that the simulated fleet serves."""
    return Plan(
        name="sim",
        model="sim",
        dtype="float32",
        stages=tuple(StageSpec(first=k, end=k + 1) for k in range(stages)),
        fingerprint=fingerprint,
        model_type="llama",
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
        context_tokens=context_tokens,
        eos_tokens=(EOS,),
    )


def link(stage: int, chain: int, value: int, position: int) -> int:
    """The next hash of a stage's chain."""
    return hash((stage, chain, value, position)) & ((1 << 40) - 1)


def first_link(plan: Plan) -> int:
    """What every chain begins with."""
    return int(plan.digest[:10], 16)


def token_of(value: int) -> int:
    """What the last stage draws: never the end of the sequence."""
    return FIRST_TOKEN + value % (VOCABULARY - FIRST_TOKEN)


@dataclass(slots=True)
class Truth:
    """What the model makes of every request, undisturbed."""

    plan: Plan
    #: Every number that a stage may produce -> (request, position).
    numbers: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def add(self, request: str, prompt: Sequence[int], count: int) -> None:
        """Continue the prompt by so many tokens."""
        chains = [first_link(self.plan)] * len(self.plan.stages)
        tokens = list(prompt)
        for position in range(len(prompt) + count - 1):
            value = tokens[position]
            for stage in range(len(chains)):
                chains[stage] = value = link(stage, chains[stage], value, position)
                self.numbers[stage, value] = (request, position)
            if position >= len(prompt) - 1:
                tokens.append(token_of(value))
        self.outputs[request] = tuple(tokens[len(prompt) :])


class SimModel:
    """Has the interface of a StageModel."""

    dtype = torch.float32
    shapes = (LayerShape(kv_heads=1, key_dim=1, value_dim=1),)
    weight_bytes = 0
    device = torch.device("cpu")

    def __init__(self, plan: Plan, stage: int, truth: Truth, complain: Callable[[str], None]) -> None:
        self.first = stage == 0
        self.last = stage == len(plan.stages) - 1
        self.max_tokens = plan.context_tokens
        self._stage = stage
        self._start = first_link(plan)
        self._truth = truth
        self._complain = complain
        #: Asked with each row's (request, end) before a forward gives anything; may raise.
        self.before: Callable[[Sequence[tuple[str, int]]], None] = lambda rows: None
        #: Of the next forward's rows.
        self.epochs: Sequence[int] = ()

    def forward(self, inputs: Tensor, extents: Sequence[Extent], sampled: Sequence[int]) -> Tensor:
        """See StageModel.forward."""
        values = self._values(inputs)
        outs: list[int] = []
        rows: list[tuple[str, int]] = []
        for extent, epoch in zip(extents, self.epochs, strict=True):
            new = values[len(outs) : len(outs) + extent.count]
            outs += self._extend(extent, new, epoch % _EPOCHS, rows)
        self.before(rows)
        if self.last:
            ends, at = [], 0
            for extent in extents:
                at += extent.count
                ends.append(outs[at - 1])
            logits = torch.zeros((len(sampled), VOCABULARY))
            for row, index in enumerate(sampled):
                logits[row, token_of(ends[index] // _EPOCHS)] = 1.0
            return logits
        return torch.tensor([(out & _MASK, out >> 24) for out in outs], dtype=torch.float32)

    def _values(self, inputs: Tensor) -> list[int]:
        if self.first:
            return [token * _EPOCHS for token in inputs.tolist()]
        return [int(low) | int(high) << 24 for low, high in inputs.tolist()]

    def _extend(self, extent: Extent, new: Sequence[int], epoch: int, rows: list[tuple[str, int]]) -> list[int]:
        kept = extent.keys[0][0, 0, :, 0]
        last = int(kept[extent.start - 1]) if extent.start else self._start * _EPOCHS + epoch
        epochs = {last % _EPOCHS} | (set() if self.first else {value % _EPOCHS for value in new})
        if epochs != {epoch}:
            self._complain(f"stage {self._stage} computed epoch {epoch} over epochs {sorted(epochs)}")
        chain, request, outs = last // _EPOCHS, "", []
        for position, value in enumerate(new, extent.start):
            chain = link(self._stage, chain, value // _EPOCHS, position)
            request, known = self._truth.numbers.get((self._stage, chain), ("", -1))
            if known != position:
                self._complain(f"stage {self._stage} computed what is of no request, at {position}")
            outs.append(chain * _EPOCHS + epoch)
        kept[extent.start : extent.end] = torch.tensor(outs)
        rows.append((request, extent.end))
        return outs


class SimEngine(StageEngine):
    """The real engine with the real cache; tells what it computes for whom."""

    def __init__(
        self,
        model: SimModel,
        *,
        stage: int,
        budget_tokens: int,
        idle_s: float,
        clock: Callable[[], float],
        computing: Callable[[Sequence[str], Sequence[tuple[str, int]]], None],
        complain: Callable[[str], None],
    ) -> None:
        shapes: Any = model.shapes
        self._budget_bytes = budget_tokens * 16
        cache = KVCache(
            shapes=shapes, dtype=torch.int64, device=model.device, budget_bytes=self._budget_bytes, clock=clock
        )
        super().__init__(model, cache, stage=stage, vocab_size=VOCABULARY, idle_s=idle_s)  # type: ignore[arg-type]
        self.sim_model = model
        self._computing = computing
        self._complain = complain

    @property
    def cache(self) -> KVCache:
        """For evictions and for looking at the end."""
        return self._cache

    def _compute(self, jobs: Sequence[Job]) -> None:
        """See StageEngine._compute."""
        self.sim_model.epochs = [job.row.epoch for job in jobs]
        self.sim_model.before = lambda rows: self._computing([job.owner for job in jobs], rows)
        super()._compute(jobs)
        if self._cache.used_bytes > self._budget_bytes:
            self._complain(f"{self._cache.used_bytes} bytes of keys and values, {self._budget_bytes} are allowed")
