"""The cutting of layers into stages, against every possible cut."""

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqinfer.partition import cut


def brute_force(costs: Sequence[int], stages: int) -> list[tuple[int, int]]:
    def rank(bounds: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        loads = [sum(costs[first:end]) for first, end in pairwise(bounds)]
        return max(loads), sum(load * load for load in loads), tuple(-bound for bound in bounds)

    cuts = ((0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1))
    return list(pairwise(min(cuts, key=rank)))


@given(data=st.data(), costs=st.lists(st.integers(0, 20), min_size=1, max_size=9))
def test_the_cut_is_the_best_of_all_cuts(data: st.DataObject, costs: list[int]) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    assert cut(costs, stages) == brute_force(costs, stages)


def test_a_heavy_head_makes_the_last_stage_short() -> None:
    layer, head = 3_538_944, 28_311_552
    costs = [2 * layer] * 29 + [2 * layer + head]  # SmolLM2, as anatomy.py counts it
    assert cut(costs, 3) == [(0, 12), (12, 23), (23, 30)]
    assert cut(costs, 2) == [(0, 17), (17, 30)]


def test_equal_layers_are_cut_evenly() -> None:
    assert cut([1] * 30, 4) == [(0, 8), (8, 16), (16, 23), (23, 30)]


def test_a_tie_in_the_costliest_stage_is_broken_towards_even() -> None:
    assert cut([1, 1, 1, 1, 10], 3) == [(0, 2), (2, 4), (4, 5)]


def test_as_many_stages_as_layers_is_one_layer_each() -> None:
    assert cut([5, 0, 7], 3) == [(0, 1), (1, 2), (2, 3)]


def test_a_hundred_and_twenty_six_layers_are_no_problem() -> None:
    bounds = cut([100] * 125 + [300], 8)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 126
    assert max(end - first for first, end in bounds) == 16


@pytest.mark.parametrize("stages", [0, -1, 4])
def test_more_stages_than_layers_or_none_is_refused(stages: int) -> None:
    with pytest.raises(ValueError, match="3 layers can't be cut into"):
        cut([1, 1, 1], stages)
