"""A ring of stages in a for loop: engines driven as coordinator and workers drive them, without messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from mqinfer.messages import Miss, MissReason, Row, Sampled, Sampling
from mqinfer.plan import Plan, StageSpec
from mqinfer.stage_engine import StageEngine, Work

KV_BYTES = 1 << 24
OWNER = "coordinator"
#: Fewest stages to most: one, two, three, one for each layer.
CUTS = ((0, 4), (0, 2, 4), (0, 1, 3, 4), (0, 1, 2, 3, 4))

Trip = Callable[["Ring", list[Work]], "End"]


@dataclass(slots=True)
class Text:
    """A sequence in the making."""

    row: int
    tokens: list[int]
    wanted: int
    #: The request's own, whatever row it is.
    seed: int
    joins: int = 0
    epoch: int = 0
    start: int = 0


@dataclass(slots=True)
class End:
    """The end of a trip."""

    sampled: list[Sampled] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


def plan_of(folder: Path, whole: torch.nn.Module, cuts: Sequence[int], **facts: object) -> Plan:
    """The plan of a checkpoint that has been made by `families.save`."""
    config = whole.config.get_text_config()
    made = {
        "name": "ring",
        "model": str(folder),
        "dtype": "float32",
        "stages": tuple(StageSpec(first=first, end=end) for first, end in pairwise(cuts)),
        "fingerprint": "tiny",
        "model_type": whole.config.model_type,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context_tokens": 256,
    }
    return Plan(**{**made, **facts})


def load(plan: Plan, folder: Path, kv_bytes: int = KV_BYTES) -> list[StageEngine]:
    """All stages of the plan."""
    return [StageEngine.load(plan, stage, folder=folder, kv_bytes=kv_bytes) for stage in range(len(plan.stages))]


class Ring:
    """Stages, and the rows that go round."""

    def __init__(
        self, engines: Sequence[StageEngine], *, seed: int = 0, chunk: int = 256, sampling: Sampling | None = None
    ) -> None:
        self.engines = engines
        self.sampling = sampling or Sampling()
        self.random = Random(seed)
        self.chunk = chunk
        self.replays = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, *, late: bool = False, trip: Trip | None = None
    ) -> list[list[int]]:
        """Continuations, all prompts together; `late` lets each join some steps after the one before."""
        texts = [
            Text(row, list(prompt), len(prompt) + tokens, seed=hash(tuple(prompt)) % 2**62, joins=2 * row * late)
            for row, prompt in enumerate(prompts)
        ]
        for tick in range(1000):
            live = [text for text in texts if tick >= text.joins and len(text.tokens) < text.wanted]
            if not live and tick > texts[-1].joins:
                break
            self._step(live, trip or Ring.trip)
            self.forget([text for text in live if len(text.tokens) == text.wanted])
        return [text.tokens[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    def _step(self, live: list[Text], trip: Trip) -> None:
        self.random.shuffle(live)
        half = self.random.randint(0, len(live))
        groups = [group for group in (live[:half], live[half:]) if group]
        end = trip(self, [self._work(group) for group in groups])
        missed = {miss.row: miss for miss in end.misses}
        drawn = {sampled.row: sampled.token for sampled in end.sampled}
        for text in live:
            if text.row in missed:
                self._replay(text, missed[text.row])
                continue
            text.start += self._count(text)
            if text.row in drawn:
                text.tokens.append(drawn[text.row])

    def _replay(self, text: Text, miss: Miss) -> None:
        if miss.reason not in (MissReason.CACHE, MissReason.ROOM):
            raise AssertionError(f"row {text.row}: {miss}")
        self.replays += 1
        text.epoch += 1
        text.start = 0

    def _count(self, text: Text) -> int:
        return min(self.chunk, len(text.tokens) - text.start)

    def _work(self, texts: Sequence[Text]) -> Work:
        rows, tokens = [], []
        for text in texts:
            end = text.start + self._count(text)
            rows.append(
                Row(
                    row=text.row,
                    epoch=text.epoch,
                    start=text.start,
                    count=end - text.start,
                    reserve=text.wanted,
                    sampling=replace(self.sampling, seed=text.seed) if end == len(text.tokens) else None,
                )
            )
            tokens += text.tokens[text.start : end]
        return Work(owner=OWNER, rows=tuple(rows), tokens=torch.tensor(tokens), hidden=None)

    def trip(self, works: list[Work]) -> End:
        """Once around."""
        end = End()
        for engine in self.engines:
            works = self._pass(engine, works, end)
        return end

    def trip_with_duplicates(self, works: list[Work]) -> End:
        """Once around; every stage gets every step again, in the same forward or in the next."""
        end = End()
        for engine in self.engines:
            if self.random.random() < 0.5:
                repeated = engine.run([*works, *works])
                assert repeated[0].rows == repeated[len(works)].rows
            else:
                engine.run(works)
            works = self._pass(engine, works, end)
        return end

    def trip_with_losses(self, works: list[Work]) -> End:
        """Once around; now and then a stage has lost a row."""
        row = self.random.choice(works[0].rows)
        if self.random.random() < 0.2:
            self.random.choice(self.engines).forget(OWNER, [(row.row, row.epoch)])
        return self.trip(works)

    def forget(self, texts: Sequence[Text]) -> None:
        """Release all rows."""
        for engine in self.engines:
            engine.forget(OWNER, [(text.row, text.epoch) for text in texts])

    @staticmethod
    def _pass(engine: StageEngine, works: list[Work], end: End) -> list[Work]:
        onward = []
        for done in engine.run(works):
            end.sampled += done.sampled
            end.misses += done.misses
            if done.hidden is not None:
                onward.append(Work(owner=OWNER, rows=done.rows, tokens=None, hidden=done.hidden))
        return onward


def prompts_of(vocab: int = 128, seed: int = 0, lengths: Sequence[int] = (5, 37, 1, 18, 64, 9)) -> list[list[int]]:
    """Random prompts of unequal lengths."""
    random = Random(seed)
    return [[random.randrange(vocab) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def reference(whole: torch.nn.Module, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """What `generate` of the whole model makes of each prompt alone."""

    def one(prompt: Sequence[int]) -> list[int]:
        ids: Tensor = torch.tensor([prompt])
        out: Tensor = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return out[0, len(prompt) :].tolist()

    return [one(prompt) for prompt in prompts]
