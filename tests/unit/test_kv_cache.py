"""The cache of keys and values: budget, epochs, growth, forgetting."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqinfer.kv_cache import Entry, KVCache, LayerShape, Refusal
from mqinfer.messages import MissReason, Row

SHAPES = (LayerShape(kv_heads=2, key_dim=4, value_dim=3), LayerShape(kv_heads=1, key_dim=8, value_dim=8))
TOKEN_BYTES = 4 * (2 * 7 + 16)
OWNER = "coordinator"


class Clock:
    """A clock that stands still."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def cache_of(tokens: int, clock: Clock | None = None) -> KVCache:
    """A cache with room for so many positions."""
    return KVCache(
        shapes=SHAPES,
        dtype=torch.float32,
        device=torch.device("cpu"),
        budget_bytes=tokens * TOKEN_BYTES,
        clock=clock or Clock(),
    )


def row_of(row: int = 0, *, start: int = 0, count: int = 1, epoch: int = 0, reserve: int = 0) -> Row:
    return Row(row=row, epoch=epoch, start=start, count=count, reserve=reserve)


def admitted(cache: KVCache, row: Row) -> Entry:
    """The row's entry after its positions have been computed."""
    entry = cache.prepare(OWNER, row)
    assert isinstance(entry, Entry)
    cache.advance(entry, row.start + row.count)
    return entry


def held_bytes(cache: KVCache, rows: range) -> int:
    """What the tensors really take."""
    entries = [entry for row in rows if (entry := cache.entry(OWNER, row)) is not None]
    return sum(tensor.nbytes for entry in entries for tensor in (*entry.keys, *entry.values))


def test_a_position_takes_the_bytes_of_all_layers() -> None:
    assert cache_of(1).bytes_per_token == TOKEN_BYTES


def test_a_new_row_gets_its_reserve_rounded_up_but_no_more_than_128_beyond_what_it_brings() -> None:
    cache = cache_of(10_000)
    assert admitted(cache, row_of(0, count=10, reserve=100)).capacity == 128
    assert admitted(cache, row_of(1, count=10, reserve=10_000)).capacity == 192
    assert admitted(cache, row_of(2, count=70, reserve=0)).capacity == 128
    assert cache.used_bytes == held_bytes(cache, range(3)) == (128 + 192 + 128) * TOKEN_BYTES


def test_keys_and_values_have_the_shapes_of_their_layer() -> None:
    entry = admitted(cache_of(64), row_of())
    assert [tuple(tensor.shape) for tensor in entry.keys] == [(1, 2, 64, 4), (1, 1, 64, 8)]
    assert [tuple(tensor.shape) for tensor in entry.values] == [(1, 2, 64, 3), (1, 1, 64, 8)]


def test_a_row_without_room_is_refused_until_another_is_forgotten() -> None:
    cache = cache_of(128)
    admitted(cache, row_of(0))
    admitted(cache, row_of(1))
    assert not cache.fits([row_of(2)])
    refusal = cache.prepare(OWNER, row_of(2))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is MissReason.ROOM
    cache.forget(OWNER, [(0, 0)])
    assert cache.fits([row_of(2)])
    assert not cache.fits([row_of(2), row_of(3)])
    admitted(cache, row_of(2))


def test_rows_past_their_beginning_do_not_count_as_new() -> None:
    cache = cache_of(64)
    admitted(cache, row_of(0))
    assert cache.fits([row_of(0, start=1)])
    assert not cache.fits([row_of(1)])


def test_a_row_larger_than_the_whole_cache_is_refused_for_ever() -> None:
    refusal = cache_of(64).prepare(OWNER, row_of(count=65))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is MissReason.NEVER


def test_an_unknown_row_past_its_beginning_is_a_miss() -> None:
    refusal = cache_of(64).prepare(OWNER, row_of(start=3))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is MissReason.CACHE


def test_a_gap_is_a_miss_and_the_entry_stays() -> None:
    cache = cache_of(64)
    entry = admitted(cache, row_of(count=3))
    refusal = cache.prepare(OWNER, row_of(start=4))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is MissReason.CACHE
    assert cache.prepare(OWNER, row_of(start=3)) is entry


def test_a_repeated_step_never_makes_a_row_shorter() -> None:
    cache = cache_of(64)
    admitted(cache, row_of(count=3))
    admitted(cache, row_of(start=3))
    assert admitted(cache, row_of(count=3)).length == 4


def test_positions_that_were_prepared_and_never_computed_are_not_held() -> None:
    cache = cache_of(64)
    admitted(cache, row_of(count=3))
    cache.prepare(OWNER, row_of(start=3, count=5))
    assert isinstance(cache.prepare(OWNER, row_of(start=8)), Refusal)


def test_an_older_epoch_is_a_miss_and_changes_nothing() -> None:
    cache = cache_of(64)
    entry = admitted(cache, row_of(epoch=2, count=3))
    assert cache.prepare(OWNER, row_of(epoch=1)) == Refusal(MissReason.CACHE, "old epoch")
    assert cache.entry(OWNER, 0) is entry


def test_a_newer_epoch_starts_from_nothing_in_the_place_of_the_old_one() -> None:
    cache = cache_of(64)
    admitted(cache, row_of(epoch=0, count=3))
    entry = admitted(cache, row_of(epoch=1, count=2))
    assert (entry.length, len(cache), cache.used_bytes) == (2, 1, 64 * TOKEN_BYTES)


def test_a_newer_epoch_past_its_beginning_is_a_miss_and_the_old_one_is_gone() -> None:
    cache = cache_of(64)
    admitted(cache, row_of(epoch=0, count=3))
    assert isinstance(cache.prepare(OWNER, row_of(epoch=1, start=3)), Refusal)
    assert (len(cache), cache.used_bytes) == (0, 0)


def test_rows_of_two_owners_are_strangers() -> None:
    cache = cache_of(128)
    admitted(cache, row_of(0, count=3))
    assert isinstance(cache.prepare("other", row_of(0, start=3)), Refusal)
    assert isinstance(cache.prepare("other", row_of(0)), Entry)
    assert len(cache) == 2


def test_growth_is_by_half_and_keeps_what_was_held() -> None:
    cache = cache_of(10_000)
    entry = admitted(cache, row_of(count=128))
    for number, tensor in enumerate((*entry.keys, *entry.values)):
        tensor.fill_(float(number))
    grown = cache.prepare(OWNER, row_of(start=128, reserve=5000))
    assert grown is entry
    assert entry.capacity == 192
    for number, tensor in enumerate((*entry.keys, *entry.values)):
        assert tensor.shape[2] == 192
        assert (tensor[:, :, :128] == number).all()
    assert cache.used_bytes == held_bytes(cache, range(1))


def test_growth_goes_no_further_than_the_reserve() -> None:
    cache = cache_of(10_000)
    admitted(cache, row_of(count=1280))
    entry = cache.prepare(OWNER, row_of(start=1280, reserve=1300))
    assert isinstance(entry, Entry)
    assert entry.capacity == 1344


def test_a_row_that_cannot_grow_is_preempted() -> None:
    cache = cache_of(256)
    admitted(cache, row_of(0, count=64))
    admitted(cache, row_of(1, count=64))
    admitted(cache, row_of(2, count=64))
    refusal = cache.prepare(OWNER, row_of(0, start=64))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is MissReason.ROOM
    assert (cache.entry(OWNER, 0), cache.used_bytes) == (None, 128 * TOKEN_BYTES)
    assert isinstance(cache.prepare(OWNER, row_of(1, start=64)), Entry)


def test_a_row_that_could_not_grow_even_alone_is_refused_for_ever() -> None:
    cache = cache_of(130)  # 128 fit, but not beside the layer that is being copied
    admitted(cache, row_of(0, count=64))
    refusal = cache.prepare(OWNER, row_of(0, start=64))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is MissReason.NEVER


def test_release_gives_back_this_epoch_and_earlier_ones_only() -> None:
    cache = cache_of(256)
    admitted(cache, row_of(0, epoch=3))
    admitted(cache, row_of(1, epoch=3))
    cache.forget(OWNER, [(0, 3), (1, 2), (7, 0)])
    assert cache.entry(OWNER, 0) is None
    assert cache.entry(OWNER, 1) is not None
    cache.forget(OWNER, [(1, 4)])
    assert cache.used_bytes == 0


def test_rows_that_nobody_asks_for_are_forgotten() -> None:
    clock = Clock()
    cache = cache_of(256, clock)
    admitted(cache, row_of(0))
    admitted(cache, row_of(1))
    clock.now_s += 100
    admitted(cache, row_of(1, start=1))
    clock.now_s += 30
    assert cache.forget_idle(120.0) == 1
    assert cache.entry(OWNER, 1) is not None
    assert cache.used_bytes == 64 * TOKEN_BYTES


def test_all_can_be_forgotten() -> None:
    cache = cache_of(256)
    admitted(cache, row_of(0))
    cache.forget_all()
    assert (len(cache), cache.used_bytes) == (0, 0)


def test_an_allocation_that_fails_while_growing_can_be_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(1024)
    admitted(cache, row_of(0, count=64))
    admitted(cache, row_of(1, count=64))
    real, left = torch.empty, [3]

    def scarce(*args: Any, **kwargs: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no more")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        cache.prepare(OWNER, row_of(0, start=64))
    cache.drop(OWNER, 0)
    assert cache.used_bytes == held_bytes(cache, range(2)) == 64 * TOKEN_BYTES


class Meter:
    """Counts the bytes of all tensors that `torch.empty` has made and that are still alive."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.real = torch.empty

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = self.real(*args, **kwargs)
        self.alive.add(made)
        assert sum(tensor.nbytes for tensor in self.alive) <= self.limit_bytes
        return made


STEPS = st.tuples(st.integers(0, 3), st.integers(1, 150), st.integers(0, 400), st.sampled_from(["go", "new", "drop"]))


@settings(max_examples=60)
@given(tokens=st.integers(64, 700), steps=st.lists(STEPS, max_size=40))
def test_the_budget_is_never_passed_not_even_while_growing(tokens: int, steps: list[tuple[int, int, int, str]]) -> None:
    cache = cache_of(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", Meter(cache.budget_bytes))
        for row, count, reserve, what in steps:
            held = cache.entry(OWNER, row)
            start = held.length if held is not None and what == "go" else 0
            epoch = (0 if held is None else held.epoch) + (what == "new")
            held = None
            if what == "drop":
                cache.drop(OWNER, row)
            else:
                entry = cache.prepare(OWNER, row_of(row, start=start, count=count, epoch=epoch, reserve=reserve))
                if isinstance(entry, Entry):
                    cache.advance(entry, start + count)
                del entry
            assert cache.used_bytes == held_bytes(cache, range(4)) <= cache.budget_bytes
