"""Every cell of the table of verdicts."""

import pytest

from mqinfer.messages import MissReason
from mqinfer.verdicts import MAX_FAILURES, Verdict, decide, explain

ONE_TO_THREE = (Verdict.REPLAY_FRESH, Verdict.REPLAY_ALONE, Verdict.FAIL)
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
