"""Rows -> keys and values: a byte budget that is never passed, epochs, growth. Only ever a cache.

A miss here is no fault: whoever owns the row replays it. Which positions a forward may see is decided here, what
it does with them is not: no model, no attention and no message may be known here but `Row`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mqinfer.messages import MissReason, Row

#: Capacities are multiples of this, so that decoding does not grow a row at every step.
ROUND_TOKENS = 64
#: What a new row gets beyond its first positions, if its reserve goes that far: a bound on what a reserve can claim.
AHEAD_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one layer keeps of a position."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(slots=True, kw_only=True)
class Entry:
    """What is kept of a row. Positions below `length` are always right; those above are nobody's."""

    epoch: int
    #: Positions there is room for.
    capacity: int
    #: By layer: [1, kv_heads, capacity, key_dim] and [1, kv_heads, capacity, value_dim]: as kernels want them.
    keys: list[Tensor]
    values: list[Tensor]
    #: Positions held.
    length: int = 0
    touched_s: float = 0.0


class Refusal(NamedTuple):
    """Why a row can't be computed here."""

    reason: MissReason
    detail: str


Key = tuple[str, int]


@dataclass(slots=True, kw_only=True)
class KVCache:
    """The keys and values of one stage, by (owner, row). For one compute thread; `fits` may be asked from any."""

    shapes: Sequence[LayerShape]
    dtype: torch.dtype
    device: torch.device
    #: Bound on all tensors kept here, also while one is being copied into a larger one.
    budget_bytes: int
    clock: Callable[[], float] = time.monotonic
    used_bytes: int = 0
    _entries: dict[Key, Entry] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._entries)

    # -- asking --------------------------------------------------------------------------------

    def rows(self) -> list[Key]:
        """(owner, row) of every row that is here."""
        return list(self._entries)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position of one row takes."""
        return self.dtype.itemsize * sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in self.shapes)

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether those of the rows that are at their beginning can be admitted together now."""
        needed = sum(self._bytes(first_capacity(row)) for row in rows if row.start == 0)
        return self.used_bytes + needed <= self.budget_bytes

    def entry(self, owner: str, row: int) -> Entry | None:
        """What is kept of the row."""
        return self._entries.get((owner, row))

    # -- doing ---------------------------------------------------------------------------------

    def prepare(self, owner: str, row: Row) -> Entry | Refusal:
        """The row's entry with room for [start, start + count), or why there is none.

        A row whose entry can't grow loses it: it is preempted, and its owner replays it.
        """
        key = (owner, row.row)
        entry = self._entries.get(key)
        if entry is None or entry.epoch < row.epoch:
            del entry  # or the old tensors would still be here when the new ones are made
            return self._admit(key, row)
        if entry.epoch > row.epoch:
            return Refusal(MissReason.CACHE, "old epoch")
        if entry.length < row.start:
            return Refusal(MissReason.CACHE, f"{entry.length} positions are here, {row.start} are needed")
        entry.touched_s = self.clock()
        return entry if row.start + row.count <= entry.capacity else self._extend(key, entry, row)

    def advance(self, entry: Entry, end: int) -> None:
        """Positions up to `end` have been computed."""
        entry.length = max(entry.length, end)

    def drop(self, owner: str, row: int) -> None:
        """Give back what the row takes, if anything."""
        entry = self._entries.pop((owner, row), None)
        if entry is not None:
            self.used_bytes -= self._bytes(entry.capacity)

    def forget(self, owner: str, rows: Sequence[tuple[int, int]]) -> None:
        """Drop those of the (row, epoch) pairs that are here with this epoch or an earlier one."""
        for row, epoch in rows:
            entry = self._entries.get((owner, row))
            if entry is not None and entry.epoch <= epoch:
                self.drop(owner, row)

    def forget_idle(self, idle_s: float) -> int:
        """Drop rows that were not touched for so long; how many."""
        old_s = self.clock() - idle_s
        idle = [key for key, entry in self._entries.items() if entry.touched_s < old_s]
        for key in idle:
            self.drop(*key)
        return len(idle)

    def forget_all(self) -> None:
        """Drop every row."""
        self._entries.clear()
        self.used_bytes = 0

    # -- within --------------------------------------------------------------------------------

    def _admit(self, key: Key, row: Row) -> Entry | Refusal:
        self.drop(*key)  # of an older epoch: nobody will ask for it again
        if row.start > 0:
            return Refusal(MissReason.CACHE, f"the row is not here, {row.start} positions are needed")
        capacity = first_capacity(row)
        if self._bytes(capacity) > self.budget_bytes:
            return self._never(capacity)
        if self.used_bytes + self._bytes(capacity) > self.budget_bytes:
            return Refusal(MissReason.ROOM, f"no room for a new row of {capacity} positions")
        entry = self._allocate(row.epoch, capacity)
        self._entries[key] = entry
        self.used_bytes += self._bytes(capacity)
        return entry

    def _extend(self, key: Key, entry: Entry, row: Row) -> Entry | Refusal:
        needed = row.start + row.count
        ahead = min(entry.capacity + entry.capacity // 2, row.reserve)
        for capacity in (rounded(max(needed, ahead)), rounded(needed)):
            if self.used_bytes + self._growth_bytes(entry, capacity) <= self.budget_bytes:
                self._grow(entry, capacity)
                return entry
        alone_bytes = self._bytes(entry.capacity) + self._growth_bytes(entry, rounded(needed))
        self.drop(*key)
        if alone_bytes > self.budget_bytes:
            return self._never(needed)
        return Refusal(MissReason.ROOM, f"no room to grow the row to {needed} positions")

    def _never(self, tokens: int) -> Refusal:
        return Refusal(MissReason.NEVER, f"{tokens} positions do not fit in {self.budget_bytes} bytes")

    def _allocate(self, epoch: int, capacity: int) -> Entry:
        keys = [self._empty(shape.kv_heads, capacity, shape.key_dim) for shape in self.shapes]
        values = [self._empty(shape.kv_heads, capacity, shape.value_dim) for shape in self.shapes]
        return Entry(epoch=epoch, capacity=capacity, keys=keys, values=values, touched_s=self.clock())

    def _grow(self, entry: Entry, capacity: int) -> None:
        """Tensor by tensor, so that never more than one is here twice."""
        for tensors in (entry.keys, entry.values):
            for index, old in enumerate(tensors):
                new = self._empty(old.shape[1], capacity, old.shape[3])
                new[:, :, : entry.length] = old[:, :, : entry.length]
                tensors[index] = new
        self.used_bytes += self._bytes(capacity - entry.capacity)
        entry.capacity = capacity

    def _growth_bytes(self, entry: Entry, capacity: int) -> int:
        """What growing takes at its worst moment: the difference, and one old tensor beside its copy."""
        widest = max(shape.kv_heads * max(shape.key_dim, shape.value_dim) for shape in self.shapes)
        return self._bytes(capacity - entry.capacity) + widest * entry.capacity * self.dtype.itemsize

    def _bytes(self, tokens: int) -> int:
        return tokens * self.bytes_per_token

    def _empty(self, heads: int, tokens: int, dim: int) -> Tensor:
        return torch.empty((1, heads, tokens, dim), dtype=self.dtype, device=self.device)


def first_capacity(row: Row) -> int:
    """Positions set aside for a row that is new."""
    needed = row.start + row.count
    return rounded(max(needed, min(row.reserve, needed + AHEAD_TOKENS)))


def rounded(tokens: int) -> int:
    """The next multiple of ROUND_TOKENS."""
    return -(-tokens // ROUND_TOKENS) * ROUND_TOKENS
