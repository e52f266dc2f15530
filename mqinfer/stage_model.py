"""The layers [first, end) of a Hugging Face model as one forward over many rows.

How a model is cut stands in `pruning.py`, how it is read in `stage_weights.py`, how packed rows attend in
`attention.py`, how others are padded in `padding.py`. No queue, no sampling and no decision about memory may live here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mqinfer import families
from mqinfer.attention import RAGGED, Attending, Extent, Seen, attending
from mqinfer.errors import PlanError
from mqinfer.kv_cache import LayerShape
from mqinfer.packed_linear import PackedLinear, pack_linears, packed_bytes
from mqinfer.padding import PaddedBatch, equal_counts
from mqinfer.plan import Plan, StageSpec
from mqinfer.pruning import StageEnd, connect, head_of, release_embedding, release_head
from mqinfer.stage_weights import read_config, read_stage, rope_limit


class StageModel:
    """One stage's layers, on their device. For one compute thread."""

    def __init__(self, model: PreTrainedModel, plan: Plan, spec: StageSpec, device: torch.device) -> None:
        self.device = device
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        self.first = spec.first == 0
        self.last = spec.end == plan.stages[-1].end
        #: Positions that a row may reach.
        self.max_tokens = min(plan.context_tokens, rope_limit(model.config) or plan.context_tokens)
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
        self.weight_bytes = sum(tensors.values()) + packed_bytes(model)
        self._model = model
        self._spec = spec
        self._layers = plan.stages[-1].end
        self._hidden_size = plan.hidden_size
        self._packed = model.config._attn_implementation == RAGGED
        self._ports = connect(model, spec)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        #: What the stage's layers keep of a position.
        self.shapes = self._probe()

    @classmethod
    def load(cls, plan: Plan, stage: int, *, folder: Path, device: str = "cpu") -> StageModel:
        """Read the stage's tensors out of a checkpoint.

        Raises: PlanError where folder and plan do not agree, or a tensor is missing or can't be read.
        """
        spec = plan.stages[stage]
        kind = families.VERIFIED.get(plan.model_type)
        if kind is None:
            raise PlanError(f"models of type {plan.model_type!r} are not verified")
        config = read_config(folder, plan)
        attention = RAGGED if kind == families.RAGGED else None
        model = read_stage(config, spec, folder, getattr(torch, plan.dtype), attention)
        model.requires_grad_(False).train(False).to(device)
        if spec.end < plan.stages[-1].end:
            release_head(model)
        if torch.device(device).type == "cpu":
            pack_linears(model)
            if spec.first > 0 and isinstance(head_of(model), PackedLinear):
                release_embedding(model)
        return cls(model, plan, spec, torch.device(device))

    def forward(self, inputs: Tensor, extents: Sequence[Extent], sampled: Sequence[int]) -> Tensor:
        """Run the rows' new positions, row after row, and write their keys and values into the extents.

        inputs: token ids int64 [tokens] on the first stage, else hidden states [tokens, hidden_size].
        sampled: indices of the extents whose last position goes through the head.
        Returns hidden states [tokens, hidden_size]; on the last stage logits, float32 [len(sampled), vocab_size].
        """
        run = self._run_packed if self._packed else self._run_padded
        return run(inputs, extents, sampled)

    def _run_packed(self, inputs: Tensor, extents: Sequence[Extent], sampled: Sequence[int]) -> Tensor:
        positions = torch.cat([torch.arange(extent.start, extent.end, device=self.device) for extent in extents])
        ends = list(accumulate(extent.count for extent in extents))
        with attending(Attending(self._spec.first, extents)):
            out = self._call(inputs[None], positions[None], [ends[row] - 1 for row in sampled], use_cache=False)
        return out if self.last else out[0]

    def _run_padded(self, inputs: Tensor, extents: Sequence[Extent], sampled: Sequence[int]) -> Tensor:
        parts = inputs.split_with_sizes([extent.count for extent in extents])
        outs: dict[int, Tensor] = {}
        for rows in equal_counts(extents):
            batch = self._batch([extents[row] for row in rows])
            kept = [at for at, row in enumerate(rows) if row in sampled or not self.last]
            out = self._run_batch(batch, torch.stack([parts[row] for row in rows]), kept)
            batch.store()
            outs.update(zip((rows[at] for at in kept), out, strict=True))
        if not self.last:
            return torch.cat([outs[row] for row in range(len(extents))])
        return torch.stack([outs[row] for row in sampled]) if sampled else out

    def _batch(self, extents: Sequence[Extent]) -> PaddedBatch:
        return PaddedBatch(extents, first=self._spec.first, end=self._spec.end, layers=self._layers)

    def _run_batch(self, batch: PaddedBatch, inputs: Tensor, sampled: Sequence[int]) -> Tensor:
        """inputs: [rows, count] or [rows, count, hidden_size]."""
        return self._call(
            inputs,
            batch.positions(self.device),
            [(row + 1) * batch.count - 1 for row in sampled],
            attention_mask=batch.mask(self.device),
            past_key_values=batch.cache,
            use_cache=True,
        )

    def _call(self, inputs: Tensor, positions: Tensor, keep: Sequence[int], **arguments: Any) -> Tensor:
        """The family's own forward: hidden states [batch, tokens, hidden_size] or logits [len(keep), vocab_size]."""
        ids = inputs if self.first else torch.zeros(inputs.shape[:2], dtype=torch.int64, device=self.device)
        if self._takes_positions:
            arguments["position_ids"] = positions
        self._ports.hidden = None if self.first else inputs
        self._ports.keep = torch.tensor(keep, dtype=torch.int64, device=self.device)
        try:
            logits: Tensor = self._model(input_ids=ids, return_dict=True, **arguments).logits
            return logits[0].float()
        except StageEnd as end:
            return end.hidden
        finally:
            self._ports.hidden = None

    def _probe(self) -> tuple[LayerShape, ...]:
        """Found by a forward over one position, since no config says it for all families. Raises: PlanError."""
        try:
            with torch.inference_mode():
                seen = self._probe_packed() if self._packed else self._probe_padded()
        except Exception as error:
            raise PlanError(f"{type(self._model).__name__} can't compute a stage: {error}") from error
        owned = list(range(self._spec.first, self._spec.end))
        if sorted(seen) != owned:
            raise PlanError(f"{type(self._model).__name__} keeps keys of layers {sorted(seen)}, not of {owned}")
        return tuple(
            LayerShape(kv_heads=key[1], key_dim=key[3], value_dim=value[3])
            for key, value in (seen[layer] for layer in owned)
        )

    def _probe_packed(self) -> Seen:
        seen: Seen = {}
        position = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        with attending(seen):
            self._call(self._one_input(), position, [0], use_cache=False)
        return seen

    def _probe_padded(self) -> Seen:
        batch = self._batch([Extent((), (), 0, 1)])
        self._run_batch(batch, self._one_input(), [0])
        return batch.seen()

    def _one_input(self) -> Tensor:
        if self.first:
            return torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        return torch.zeros((1, 1, self._hidden_size), dtype=self.dtype, device=self.device)
