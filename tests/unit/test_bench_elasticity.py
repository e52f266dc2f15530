"""What the benchmark of elasticity makes of what it sees: bounds, rows that came out wrong, figures of one scenario."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

from benchmarks.elasticity import LOST, REPEATED, WRONG, best_assignment, bound, outcome
from benchmarks.live import read_results
from benchmarks.measure import Case, run
from benchmarks.rounds import Rounds
from hypothesis import given
from hypothesis import strategies as st


def row(number: int, text: str, tokens: int) -> str:
    body: dict[str, Any] = {"choices": [{"text": text}], "usage": {"completion_tokens": tokens}}
    return json.dumps({"custom_id": f"row-{number}", "response": {"body": body}, "error": None})


def test_the_slowest_stage_is_the_bound() -> None:
    assert bound([0.002, 0.002, 0.004, 0.002], [1, 1, 1, 1]) == 250
    assert bound([0.002, 0.002, 0.004, 0.002], [1, 1, 2, 1]) == 500


@given(st.lists(st.floats(0.001, 0.1), min_size=1, max_size=4), st.integers(0, 5))
def test_no_assignment_of_the_spare_workers_has_a_higher_bound_than_the_best(cost: list[float], spare: int) -> None:
    best = best_assignment(cost, spare)
    assert sum(best) == len(cost) + spare
    assert min(best) >= 1
    every = (each for each in product(range(1, spare + 2), repeat=len(cost)) if sum(each) == sum(best))
    assert bound(cost, best) == max(bound(cost, each) for each in every)


def test_rows_that_are_all_there_once_and_begin_alike_are_as_they_should_be() -> None:
    results = read_results([row(1, "ab", 2), row(0, "abc", 3)], [3, 2])
    assert set(outcome(results).values()) == {0}


def test_rows_that_are_missing_or_there_twice_or_wrong_are_counted() -> None:
    lines = [row(0, "abc", 3), row(0, "abc", 3), row(1, "ax", 2), row(2, "a", 1), row(4, "", 0)]
    failed = json.dumps({"custom_id": "row-5", "response": None, "error": {"message": "no"}})
    assert outcome(read_results([*lines, failed], [3, 2, 2, 2, 0, 2])) == {LOST: 1, REPEATED: 1, WRONG: 3}


def test_a_scenario_is_played_once_in_a_round_for_all_of_its_figures() -> None:
    plays: list[int] = []

    def play() -> dict[str, float]:
        plays.append(len(plays))
        return {"a": plays[-1], "b": 10 + plays[-1]}

    rounds = Rounds(play)
    outcomes = [run(Case(name, "", "", rounds.contenders(name), rounds=3, warmups=0)) for name in ("a", "b")]
    assert [list(each.figures[0].values) for each in outcomes] == [[0, 1, 2], [10, 11, 12]]
    assert len(plays) == 3
