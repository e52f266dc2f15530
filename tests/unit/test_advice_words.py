"""Advice in sentences, and as an object for machines."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mqinfer.advice_words import as_object, sentences
from mqinfer.scaling import Advice, Change, StageSeen, Why, Window, Worked

WINDOW = Window(
    stages=(
        StageSeen(consumers=2, worked=(Worked(seconds=10, busy_s=3),), ready=1),
        StageSeen(consumers=1, worked=(Worked(seconds=10, busy_s=9.6),), ready=4),
    ),
    coordinators=1,
    rows=17,
    coordinator_busy=0.91,
    blocked="low on memory",
)
ADVICE = Advice(
    change=Change.UP, why=Why.BOUND, stage=1, gain=0.4, rows_per_s=20.0, busy=(0.3, 0.96), gains={1: 0.4, 0: 0.01}
)


def test_a_bound_stage_is_told_with_what_one_more_consumer_brings() -> None:
    assert sentences(ADVICE, WINDOW) == (
        "Stage 1 is bound: it has 1 consumer that computed 96% of the time, those of the other stages 30%. "
        "One more there brings +40% (20.0 → 28.0 rows/s)."
    )


def test_a_consumer_too_many_is_told_with_what_is_lost_without_it() -> None:
    down = replace(ADVICE, change=Change.DOWN, why=Why.SPARE, stage=0, gain=-0.01)
    assert sentences(down, WINDOW) == (
        "Stage 0 has a consumer too many: of 2, each computed 30% of the time. "
        "Without one the throughput changes by -1.0% (20.0 → 19.8 rows/s)."
    )


@pytest.mark.parametrize(
    ("why", "words"),
    [
        (Why.UNSERVED, "No worker serves stage 1: start one there (mqinfer worker --stage 1)."),
        (Why.BELOW_LEAST, "Stage 1 has 1 consumer, fewer than it should: start one there."),
    ],
)
def test_what_needs_no_forecast_is_told_without_one(why: Why, words: str) -> None:
    assert sentences(replace(ADVICE, why=why), WINDOW) == words


@pytest.mark.parametrize(
    ("why", "words"),
    [
        (Why.BLOCKED, "low on memory"),
        (Why.NO_COORDINATOR, "mqinfer coordinator"),
        (Why.IDLE, "Nothing is under way"),
        (Why.UNSEEN, "look again later"),
        (Why.COORDINATOR, "91%"),
        (Why.ELSEWHERE, "stage 1, computes only 96%"),
        (Why.LITTLE_WORK, "17 requests in flight"),
        (Why.AT_MOST, "Stage 1 is bound"),
        (Why.BALANCED, "+40% at most"),
    ],
)
def test_where_nothing_helps_it_is_said_why(why: Why, words: str) -> None:
    said = sentences(replace(ADVICE, change=Change.NONE, why=why), WINDOW)
    assert words in said
    assert "{" not in said


@pytest.mark.parametrize("why", Why)
def test_there_are_words_for_every_reason_even_where_nothing_was_seen(why: Why) -> None:
    changes = {Why.BOUND: Change.UP, Why.SPARE: Change.DOWN, Why.UNSERVED: Change.UP, Why.BELOW_LEAST: Change.UP}
    change = changes.get(why, Change.NONE)
    assert sentences(Advice(change=change, why=why, stage=0 if change is not Change.NONE else None), WINDOW)


def test_machines_get_all_the_numbers_and_the_words() -> None:
    found = json.loads(json.dumps(as_object(ADVICE, WINDOW)))
    assert (found["change"], found["stage"], found["gain"], found["gains"]) == ("up", 1, 0.4, {"1": 0.4, "0": 0.01})
    assert (found["consumers"], found["ready"], found["words"]) == ([2, 1], [1, 4], sentences(ADVICE, WINDOW))
