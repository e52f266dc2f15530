"""Every cell of the table of verdicts."""

import re

import pytest

from mqinfer import errors
from mqinfer.errors import CacheMiss, ComputeError, MqinferError, OutOfMemory, PlanMismatch, Unroutable
from mqinfer.messages import MissReason
from mqinfer.verdicts import (
    DEAD_LETTERS,
    FAILURE_ROWS,
    FATES,
    MAX_FAILURES,
    MISS_REASONS,
    Fate,
    Verdict,
    decide,
    explain,
)

ONE_TO_THREE = (Verdict.REPLAY, Verdict.REPLAY_ALONE, Verdict.FAIL)
TABLE = {
    MissReason.CACHE: (Verdict.REPLAY,) * 3,
    MissReason.ROOM: (Verdict.REPLAY_FRESH,) * 3,
    MissReason.GONE: (Verdict.REPLAY_FRESH,) * 3,
    MissReason.PLAN: ONE_TO_THREE,
    MissReason.NEVER: ONE_TO_THREE,
    MissReason.LOST: ONE_TO_THREE,
    MissReason.COMPUTE: ONE_TO_THREE,
    MissReason.MEMORY: ONE_TO_THREE,
}


FATE_OF = {
    "SettingsError": "tell",
    "PlanError": "tell",
    "OutputError": "tell",
    "WireError": "dead",
    "PlanMismatch": "dead",
    "RequestError": "fail",
    "CacheMiss": "miss",
    "ComputeError": "miss",
    "OutOfMemory": "miss",
    "TransportError": "retry",
    "Refused": "tell",
    "Forbidden": "tell",
    "Unroutable": "miss",
    "Disconnected": "retry",
}


def kinds(of: type[MqinferError] = MqinferError) -> set[type[MqinferError]]:
    """Every class of error that is ours."""
    ours = {kind for kind in of.__subclasses__() if kind.__module__ == "mqinfer.errors"}
    return ours.union(*(kinds(kind) for kind in ours))


@pytest.mark.parametrize("kind", sorted(kinds(), key=lambda kind: kind.__name__))
def test_every_error_has_the_fate_that_it_should(kind: type[MqinferError]) -> None:
    assert FATES[kind].value == FATE_OF[kind.__name__]


def test_the_tree_in_the_docstring_and_the_table_agree() -> None:
    drawn = dict(re.findall(r"── (\w+) +(\w+) ", errors.__doc__ or ""))
    assert drawn == {kind.__name__: fate.value for kind, fate in FATES.items()}
    assert set(FATES) == kinds()


def test_what_is_caught_by_its_fate_has_no_subclass_of_another_fate() -> None:
    for caught, fate in ((DEAD_LETTERS, Fate.DEAD), (FAILURE_ROWS, Fate.FAIL)):
        assert {FATES[kind] for kind in kinds() if issubclass(kind, caught)} == {fate}


def test_whatever_is_missed_has_a_reason() -> None:
    missed = {kind for kind, fate in FATES.items() if fate is Fate.MISS}
    assert MISS_REASONS.keys() == missed | {PlanMismatch}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (CacheMiss, MissReason.CACHE),
        (ComputeError, MissReason.COMPUTE),
        (OutOfMemory, MissReason.MEMORY),
        (Unroutable, MissReason.GONE),
        (PlanMismatch, MissReason.PLAN),
    ],
)
def test_the_reason_of_a_miss_is_the_error_s(kind: type[MqinferError], reason: MissReason) -> None:
    assert MISS_REASONS[kind] is reason


def test_the_table_has_every_reason() -> None:
    assert set(TABLE) == set(MissReason)


@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.parametrize("reason", list(MissReason))
def test_each_cell(reason: MissReason, failures: int) -> None:
    assert decide(reason, failures) is TABLE[reason][failures - 1]


@pytest.mark.parametrize("reason", list(MissReason))
def test_a_failure_row_says_why_and_carries_the_detail(reason: MissReason) -> None:
    assert "12 GiB" in explain(reason, "12 GiB")
    assert explain(reason, "")


def test_more_failures_than_the_limit_still_fail() -> None:
    assert decide(MissReason.LOST, MAX_FAILURES + 5) is Verdict.FAIL
