"""Rows of equal count as one padded batch over transformers' own cache, for families with an attention of their own.

Pasts are padded on the left, so that the new positions of all rows stand in line; what comes back is written into each
row's own keys and values. Slower than packing (pasts are copied at every step), right all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mqinfer.attention import Extent, Seen


def equal_counts(extents: Sequence[Extent]) -> list[list[int]]:
    """Indices of the extents that can share a batch: those with equally many new positions."""
    by_count: dict[int, list[int]] = {}
    for index, extent in enumerate(extents):
        by_count.setdefault(extent.count, []).append(index)
    return list(by_count.values())


class PaddedBatch:
    """Rows of equal count, and their pasts as a DynamicCache over all of the model's layers."""

    def __init__(self, extents: Sequence[Extent], *, first: int, end: int, layers: int) -> None:
        self.count = extents[0].count
        self._extents = extents
        self._first = first
        self._owned: list[Any] = [self._past(layer) for layer in range(end - first)]
        self.cache = DynamicCache()
        # transformers reads lengths off layers that the stage does not own
        self.cache.layers = [self._owned[0]] * first + self._owned + [self._owned[-1]] * (layers - end)

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the new tokens: int64 [rows, count]."""
        starts = torch.tensor([extent.start for extent in self._extents], device=device)
        return starts[:, None] + torch.arange(self.count, device=device)

    def mask(self, device: torch.device) -> Tensor:
        """1 where something stands, 0 on padding: int64 [rows, longest past + count]. ALiBi is counted along it."""
        longest = max(extent.start for extent in self._extents)
        padding = torch.tensor([longest - extent.start for extent in self._extents], device=device)
        return (torch.arange(longest + self.count, device=device) >= padding[:, None]).long()

    def store(self) -> None:
        """Write the new positions that a forward has added to the cache into the rows' own keys and values."""
        for layer, states in enumerate(self._owned):
            for row, extent in enumerate(self._extents):
                extent.store(layer, states.keys[row, :, -self.count :], states.values[row, :, -self.count :])

    def seen(self) -> Seen:
        """Shapes of what a forward has added, by layer."""
        held = [(self._first + index, states) for index, states in enumerate(self._owned) if states.is_initialized]
        return {layer: (states.keys.shape, states.values.shape) for layer, states in held}

    def _past(self, layer: int) -> DynamicLayer:
        states = DynamicLayer()  # type: ignore[no-untyped-call]
        if any(extent.start for extent in self._extents):
            keys = _left_padded([extent.keys[layer][0, :, : extent.start] for extent in self._extents])
            values = _left_padded([extent.values[layer][0, :, : extent.start] for extent in self._extents])
            states.update(keys, values)
        return states


def _left_padded(pasts: Sequence[Tensor]) -> Tensor:
    """[heads, past, dim] each -> [rows, heads, longest past, dim]; zeros, since NaN would get through a mask."""
    heads, _, dim = pasts[0].shape
    longest = max(past.shape[1] for past in pasts)
    out = pasts[0].new_zeros(len(pasts), heads, longest, dim)
    for row, past in enumerate(pasts):
        out[row, :, longest - past.shape[1] :] = past
    return out
