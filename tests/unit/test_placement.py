"""Where one more worker helps most, against trying everything."""

from __future__ import annotations

from itertools import combinations_with_replacement

from hypothesis import given
from hypothesis import strategies as st

from mqinfer.placement import MARGIN, Served, best_stage, better_stage

COSTS = st.lists(st.floats(0.5, 20), min_size=1, max_size=5)


def served(costs: list[float], workers: list[int], *, measured: bool = False) -> list[Served]:
    return [
        Served(workers=count, cost=cost, rows_per_s=100 / cost if measured and count else None)
        for cost, count in zip(costs, workers, strict=True)
    ]


def rate(costs: list[float], workers: list[int]) -> float:
    return min(count / cost for cost, count in zip(costs, workers, strict=True))


def test_who_comes_to_an_empty_pipeline_takes_the_costliest_stage_that_nobody_serves() -> None:
    assert best_stage(served([1, 3, 2], [0, 0, 0]), range(3)) == 1
    assert best_stage(served([1, 3, 2], [0, 1, 0]), range(3)) == 2
    assert best_stage(served([1, 3, 2], [0, 1, 1]), range(3)) == 0


def test_only_a_stage_that_fits_is_taken() -> None:
    assert best_stage(served([1, 3, 2], [1, 1, 1]), [0, 2]) == 2


def test_what_was_measured_counts_more_than_what_the_model_says() -> None:
    stages = [Served(workers=1, cost=1, rows_per_s=10), Served(workers=1, cost=5, rows_per_s=90)]
    assert best_stage(stages, range(2)) == 0


@given(COSTS, st.integers(0, 8), st.booleans())
def test_workers_that_come_one_after_another_end_as_well_as_can_be(
    costs: list[float], more: int, measured: bool
) -> None:
    workers = [0] * len(costs)
    for _ in range(len(costs) + more):
        stage = best_stage(served(costs, workers, measured=measured), range(len(costs)))
        workers[stage] += 1
    best = max(
        rate(costs, [1 + extra.count(stage) for stage in range(len(costs))])
        for extra in combinations_with_replacement(range(len(costs)), more)
    )
    assert rate(costs, workers) >= best * (1 - 1e-9)


def test_a_worker_moves_to_where_the_others_wait_and_not_for_a_little() -> None:
    assert better_stage(served([1, 4], [3, 1]), 0, range(2)) == 1
    assert better_stage(served([1, 1.1], [2, 2]), 0, range(2)) is None


def test_where_several_stages_have_nobody_workers_that_are_too_many_elsewhere_serve_them() -> None:
    assert better_stage(served([1, 2, 3], [4, 0, 0]), 0, range(3)) == 2
    assert better_stage(served([1, 2, 3], [3, 0, 1]), 0, range(3)) == 1
    assert better_stage(served([1, 2, 3], [1, 0, 1]), 0, range(3)) is None


def test_nobody_leaves_a_stage_alone() -> None:
    assert better_stage(served([1, 9], [1, 1]), 0, range(2)) is None
    assert better_stage(served([1, 9, 1], [2, 1, 0]), 0, range(3)) == 2


@given(COSTS.filter(lambda costs: len(costs) > 1), st.data())
def test_moving_brings_the_margin_or_nobody_moves_and_it_comes_to_rest(costs: list[float], data: st.DataObject) -> None:
    workers = data.draw(st.lists(st.integers(1, 6), min_size=len(costs), max_size=len(costs)))
    for _ in range(sum(workers) * len(costs)):
        moves = [
            (mine, to)
            for mine in range(len(costs))
            if (to := better_stage(served(costs, workers, measured=True), mine, range(len(costs)))) is not None
        ]
        if not moves:
            return
        before = rate(costs, workers)
        mine, to = moves[0]
        workers[mine] -= 1
        workers[to] += 1
        assert rate(costs, workers) >= MARGIN * before * (1 - 1e-9)
    raise AssertionError("they move for ever")
