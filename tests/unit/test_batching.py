"""The pure functions that form microbatches and share out a step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqinfer.batching import (
    MOST_TO_EACH,
    Limits,
    Pending,
    counts,
    extra_microbatches,
    fair,
    handed,
    microbatch_target,
    share,
    sizes,
)

LIMITS = Limits(microbatch_rows=8, rows=64, step_tokens=32, open_trips=100)
NEEDS = st.lists(st.integers(1, 200), min_size=1, max_size=40)


@given(NEEDS, st.integers(1, 300))
def test_a_step_advances_somebody_and_never_passes_its_tokens(needs: list[int], step_tokens: int) -> None:
    taken = counts([Pending(5, 5 + need) for need in needs], step_tokens)
    assert 1 <= sum(taken) <= step_tokens
    assert all(0 <= count <= need for count, need in zip(taken, needs, strict=True))


@given(NEEDS, st.integers(1, 300))
def test_no_prefill_advances_while_a_decode_waits(needs: list[int], step_tokens: int) -> None:
    taken = counts([Pending(0, need) for need in needs], step_tokens)
    if any(count == 0 for count, need in zip(taken, needs, strict=True) if need == 1):
        assert all(count == 0 for count, need in zip(taken, needs, strict=True) if need > 1)


@given(st.integers(0, 500), st.integers(0, 20), st.integers(1, 20))
def test_new_microbatches_take_only_rows_that_wait_and_never_pass_the_target(
    waiting: int, live: int, target: int
) -> None:
    formed = sizes(waiting, target - live, share(LIMITS, target))
    assert sum(formed) <= waiting
    assert len(formed) <= max(target - live, 0)
    assert all(1 <= size <= share(LIMITS, target) for size in formed)
    if waiting and live < target:
        assert formed


def test_waiting_rows_are_spread_over_the_microbatches_there_should_be() -> None:
    assert sizes(8, 4, 16) == [2, 2, 2, 2]
    assert sizes(3, 4, 16) == [1, 1, 1]
    assert sizes(100, 4, 8) == [8, 8, 8, 8]
    assert sizes(8, 1, 3) == [3]


def test_every_worker_more_raises_the_number_of_microbatches() -> None:
    targets = [microbatch_target([1, 1, extra], 8, LIMITS) for extra in range(1, 8)]
    assert targets == sorted(set(targets))
    assert microbatch_target([0, 0, 0], 8, LIMITS) == microbatch_target([1, 1, 1], 8, LIMITS)


def test_a_single_worker_gets_one_microbatch_unless_the_rows_do_not_fit_into_it() -> None:
    assert [microbatch_target([1], rows, LIMITS) for rows in (1, 8, 9, 64, 1000)] == [1, 1, 2, 8, 8]


def test_where_workers_share_a_stage_there_are_as_many_microbatches_as_are_worth_a_forward() -> None:
    limits = Limits(microbatch_rows=64, rows=128, step_tokens=256, open_trips=100)
    targets = [microbatch_target([1, 2, 1], 128, limits, worth_rows) for worth_rows in (1000.0, 30.0, 16.0, 1.0)]
    assert targets == [6, 6, 8, int(4 * MOST_TO_EACH)]
    assert microbatch_target([1, 2, 1], 128, limits) == 6
    assert microbatch_target([1, 1, 1], 128, limits, 1.0) == 3, "in a chain of single workers one has no choice"


@given(st.integers(1, 64), st.integers(1, 20), st.floats(0.0, 100.0))
def test_a_microbatch_has_room_for_a_row_and_never_more_than_allowed(rows: int, target: int, speed: float) -> None:
    assert 1 <= fair(rows, LIMITS, target, speed) <= LIMITS.microbatch_rows


def test_slower_microbatches_get_fewer_rows_and_faster_ones_more() -> None:
    limits = Limits(microbatch_rows=64, rows=128, step_tokens=256, open_trips=100)
    by_speed = {0.01: 4, 0.5: 4, 0.9: 13, 1.0: 16, 1.1: 19, 1.5: 36, 100.0: 64}
    assert {speed: fair(128, limits, 8, speed) for speed in by_speed} == by_speed


@given(st.floats(0.0, 100.0))
def test_where_all_microbatches_must_be_full_none_is_denied_a_row(speed: float) -> None:
    assert fair(64, LIMITS, 8, speed) == LIMITS.microbatch_rows


@pytest.mark.parametrize(
    ("at_stage_1", "target", "extra"),
    [
        ("aaaabb", 6, 0),
        ("aaaaab", 6, 2),
        ("aaaaaa", 6, 2),
        ("", 6, 2),
        ("aabbcc", 6, 0),  # one is full
        ("aaaab", 5, 0),  # too few microbatches to ask for two on each worker
        ("aaaaa", 5, 2),
    ],
)
def test_more_microbatches_may_be_made_where_a_worker_is_short_of_routes(
    at_stage_1: str, target: int, extra: int
) -> None:
    assert extra_microbatches([("w", worker) for worker in at_stage_1], [1, 2], target) == extra


def test_they_are_as_many_as_the_stage_has_workers_that_is_short_of_them() -> None:
    routes = [("ab"[i % 2], "cde"[i % 3]) for i in range(12)]
    assert extra_microbatches(routes, [2, 3], 12) == 0
    assert extra_microbatches(routes, [2, 4], 12) == 4
    assert extra_microbatches(routes, [3, 3], 12) == 3


def test_single_workers_are_never_short_of_routes() -> None:
    assert extra_microbatches([], [1, 0], 2) == 0
    assert extra_microbatches([("w",), ()], [1, 1], 2) == 0


@pytest.mark.parametrize(
    ("own", "others", "given"),
    [(5, [], []), (4, [4], [0]), (4, [3], [0]), (5, [3], [1]), (32, [1], [15]), (8, [0, 0], [3, 2]), (2, [9], [0])],
)
def test_a_microbatch_gives_until_none_has_two_rows_more_than_another(
    own: int, others: list[int], given: list[int]
) -> None:
    assert handed(own, others) == given
