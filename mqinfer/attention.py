"""Attention over ragged rows: many rows packed in one forward, each over its own keys and values, without padding.

transformers calls `ragged_attention` in every decoder layer of a model built with `attn_implementation=RAGGED`; what
it attends to is given by `attending`, for one forward in one thread. A kernel for variable lengths takes the place
of `_attend`'s loop, nothing else changes. Which rows those are and where their memory comes from is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

RAGGED = "mqinfer_ragged"


@dataclass(frozen=True, slots=True)
class Extent:
    """One row's part of a forward: the new positions [start, start + count) of what is kept of it."""

    #: By layer of the stage: [1, kv_heads, capacity >= start + count, dim]; the new positions are written there.
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    start: int
    count: int

    @property
    def end(self) -> int:
        """Positions that the last new one sees."""
        return self.start + self.count

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new positions, [(1,) kv_heads, count, dim]; all positions up to them."""
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.start, self.count).copy_(key)
        values.narrow(2, self.start, self.count).copy_(value)
        return keys.narrow(2, 0, self.end), values.narrow(2, 0, self.end)


@dataclass(frozen=True, slots=True)
class Attending:
    """What the attention of one forward works on."""

    #: The stage's first layer: extents count from it, transformers from 0.
    first: int
    #: In the order in which the rows are packed.
    extents: Sequence[Extent]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How a layer weighs positions."""

    scaling: float | None
    #: How many positions back a position sees, itself included; None: all.
    window: int | None
    #: Scores are bent towards ±softcap (Gemma 2).
    softcap: float | None
    #: [heads]: a score that takes part in the softmax and stands for no position (gpt-oss).
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch's own kernels know it."""
        return self.softcap is None and self.sinks is None


#: Layer -> shapes of the key and value that it wanted to store for one position.
Seen = dict[int, tuple[torch.Size, torch.Size]]

_attending: ContextVar[Attending | Seen] = ContextVar("attending")


@contextmanager
def attending(what: Attending | Seen) -> Iterator[None]:
    """What `ragged_attention` works on within; given a dict it computes nothing and notes what it was asked."""
    token = _attending.set(what)
    try:
        yield
    finally:
        _attending.reset(token)


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [1, heads, tokens, dim] -> [1, tokens, heads, dim].

    Raises: NotImplementedError if the family has built a mask, for then it wants something that would be lost here.
    """
    if attention_mask is not None:
        raise NotImplementedError("a family with attention masks of its own")
    what = _attending.get()
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(what, dict):
        what[layer] = (key.shape, value.shape)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    rule = Rule(scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
    return _attend(query, key, value, layer - what.first, what.extents, rule), None


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, extents: Sequence[Extent], rule: Rule) -> Tensor:
    """Row by row; as `ragged_attention`.

    Rows are many and small, and each view of a row costs a twentieth of its attention: they are split once for all of
    them, and have the kernel's own shapes from then on.
    """
    _, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    counts = [extent.count for extent in extents]
    queries = query.reshape(1, kv_heads, heads // kv_heads, tokens, dim).split_with_sizes(counts, dim=3)
    new_keys, new_values = (new.split_with_sizes(counts, dim=2) for new in (key, value))
    outs = []
    for extent, row_query, row_key, row_value in zip(extents, queries, new_keys, new_values, strict=True):
        keys, values = extent.store(layer, row_key, row_value)
        outs.append(attend_row(row_query, keys, values, rule))
    return torch.cat(outs).view(1, tokens, heads, value.shape[3])


def attend_row(query: Tensor, keys: Tensor, values: Tensor, rule: Rule) -> Tensor:
    """A row's last `count` positions over all `end`; heads that share keys are a group.

    query: [1, kv_heads, group, count, dim]. keys, values: [1, kv_heads, end, dim].
    Returns [count, kv_heads, group, value_dim].
    """
    count = query.shape[3]
    if rule.window is not None:
        first_seen = max(0, keys.shape[2] - count - rule.window + 1)
        keys, values = keys[:, :, first_seen:], values[:, :, first_seen:]
    if not rule.is_plain:
        return _by_hand(query[0], keys[0], values[0], rule).permute(2, 0, 1, 3)
    if count == 1:  # a group's heads are to the kernel so many queries: nothing is repeated
        return scaled_dot_product_attention(query.squeeze(3), keys, values, scale=rule.scaling)
    return _by_kernel(query[0], keys[0], values[0], rule).permute(2, 0, 1, 3)


def _by_kernel(query: Tensor, keys: Tensor, values: Tensor, rule: Rule) -> Tensor:
    """query: [kv_heads, group, count, dim], keys, values: [kv_heads, end, dim]."""
    kv_heads, group, count, _ = query.shape
    end = keys.shape[1]
    keys = keys[:, None].expand(kv_heads, group, end, keys.shape[2])
    values = values[:, None].expand(kv_heads, group, end, values.shape[2])
    if count == end and (rule.window is None or end <= rule.window):
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=rule.scaling)
    mask = visible(count, end, rule.window, query.device)
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=rule.scaling)


def _by_hand(query: Tensor, keys: Tensor, values: Tensor, rule: Rule) -> Tensor:
    """As the families' own eager attention computes it; shapes as in `_by_kernel`."""
    scaling = query.shape[3] ** -0.5 if rule.scaling is None else rule.scaling
    scores = torch.matmul(query, keys[:, None].transpose(2, 3)) * scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    mask = visible(query.shape[2], keys.shape[1], rule.window, query.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.reshape(query.shape[0], query.shape[1], 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=3)
    weights = torch.softmax(scores, dim=3, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights[..., : keys.shape[1]], values[:, None])


def visible(count: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `end` positions each of the last `count` sees: bool [count, end]."""
    behind = torch.arange(end - count, end, device=device)[:, None] - torch.arange(end, device=device)
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)


def _no_mask(*_: Any, **__: Any) -> None:
    """Rows see what their extents say."""


AttentionInterface.register(RAGGED, ragged_attention)
AttentionMaskInterface.register(RAGGED, _no_mask)
