"""Rows that harm who computes them, and devices without memory. Stage 0 is sabotaged, for only it sees the tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from counts import Report
from private_broker import PrivateBroker
from processes import demo_model, rows, wait_until
from roster import Job, Roster
from workload import SHORT, Question

from mqinfer.verdicts import MAX_FAILURES

#: Tokens that no question has.
RAISES, KILLS, MEMORY, NAN = 48_001, 48_002, 48_003, 48_004
#: Rows that a forward at stage 0 has memory for.
CROWD = 2
#: Keys and values of three short rows: far fewer than the coordinator has under way.
SMALL_KV = {"MQINFER_KV_BYTES": "3MiB"}
#: A row of so many tokens fits in the other stages.
TOO_LONG = 1000


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory: pytest.TempPathFactory, node: PrivateBroker) -> Iterator[Roster]:
    """A fleet of its own: what is wrong with stage 0 strikes at certain tokens."""
    roster = Roster(tmp_path_factory.mktemp("sabotaged"), demo_model(), node, {})
    try:
        roster.coordinator("coordinator-0")
        wrong = f"raise:{RAISES},kill:{KILLS},memory:{MEMORY},nan:{NAN},crowd:{CROWD}"
        for number in range(2):
            roster.worker(f"worker-0-{number}", 0, sabotage=wrong)
        roster.worker("worker-1-0", 1)
        roster.worker("worker-2-0", 2)
        roster.ready()
        yield roster
    finally:
        roster.end()


@pytest.fixture
def run(
    sabotaged: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> Callable[[str, Question], tuple[Job, str]]:
    """Ask a bad question amid good ones; the job, and why the bad one failed."""
    sabotaged.heal()

    def run(name: str, question: Question) -> tuple[Job, str]:
        asked = {**dict(list(SHORT.items())[:100]), name: question, **dict(list(SHORT.items())[100:])}
        job = sabotaged.job(asked, tmp_path)
        while job.actor.lives:
            wait_until(lambda: not job.actor.lives or not _all_live(sabotaged), sabotaged.fleet, 300)
            for actor in sabotaged.actors.values():
                if not actor.lives:  # as systemd does
                    actor.restart()
        job.finish(answers, report, failing=frozenset({name}), code=3)
        (failure,) = [row["error"]["message"] for row in rows(job.output) if row["error"]]
        report.note = failure
        return job, failure

    return run


def _all_live(roster: Roster) -> bool:
    return all(actor.lives for actor in roster.actors.values())


def _strikes(roster: Roster, kind: str) -> int:
    return sum(event["kind"] == kind for actor in roster.actors.values() for event in actor.events("sabotage"))


def _attempts(roster: Roster, job: Job, name: str) -> int:
    """How often the row was given to workers: the replays, and the first time."""
    number = list(job.asked).index(name) + 1
    events = roster.actors["coordinator-0"].events("row.replayed")
    (job_id,) = {json.loads(line)["id"].rpartition(".")[0] for line in job.output.read_text().splitlines()}
    request = f"{job_id.removeprefix('batch_req_')}.{number}"
    blamed = {"lost", "compute", "memory"}
    return 1 + sum(event["request"] == request and event["reason"] in blamed for event in events)


def _poison(token: int) -> Question:
    return Question((504, 2644, token, 314), 4)


def test_a_row_that_makes_the_compute_raise_fails_alone(
    run: Callable[[str, Question], tuple[Job, str]], sabotaged: Roster, report: Report
) -> None:
    report.fault, report.done = "a poison request", "computing it raises, every time"
    pids = [actor.process.pid for actor in sabotaged.actors.values()]
    job, failure = run("poison", _poison(RAISES))
    assert "a poisoned row" in failure
    assert _strikes(sabotaged, "raise")
    assert _attempts(sabotaged, job, "poison") <= MAX_FAILURES
    assert [actor.process.pid for actor in sabotaged.actors.values()] == pids, "nobody died of it"


@pytest.mark.faults
def test_a_row_that_kills_its_workers_fails_after_three_of_them(
    run: Callable[[str, Question], tuple[Job, str]], sabotaged: Roster, report: Report
) -> None:
    report.fault, report.done = "a poison request", "computing it kills the process, every time"
    before = _strikes(sabotaged, "kill")
    run("deadly", _poison(KILLS))
    killed = _strikes(sabotaged, "kill") - before
    report.note = f"{killed} workers killed"
    assert 1 <= killed <= MAX_FAILURES


def test_out_of_memory_is_split_and_retried_and_then_a_failure_row(
    run: Callable[[str, Question], tuple[Job, str]], sabotaged: Roster, report: Report
) -> None:
    report.fault = "out of memory in compute"
    report.done = f"with more than {CROWD} rows at once always; with one row however few"
    pids = [actor.process.pid for actor in sabotaged.actors.values()]
    before = _strikes(sabotaged, "crowd")
    job, failure = run("greedy", _poison(MEMORY))
    assert "out of memory" in failure
    assert _strikes(sabotaged, "crowd") > before, "big forwards were to be split"
    assert _attempts(sabotaged, job, "greedy") <= MAX_FAILURES
    assert [actor.process.pid for actor in sabotaged.actors.values()] == pids, "the workers live"


@pytest.mark.faults
def test_a_full_cache_makes_rows_wait_and_one_that_never_fits_fails(
    run: Callable[[str, Question], tuple[Job, str]], sabotaged: Roster, report: Report
) -> None:
    report.fault, report.done = "KV full", "little room at stage 1, and one row that never fits"
    usual, small = "worker-1-0", "worker-1-1"
    sabotaged.replaced((usual,), lambda: sabotaged.worker(small, 1, environment=SMALL_KV))
    try:
        _, failure = run("huge", Question("A very long story:", TOO_LONG))
        (worker,) = sabotaged.survey().workers(1)
        assert worker.values["kv_used_bytes"] <= worker.values["kv_budget_bytes"]
    finally:
        sabotaged.replaced((small,), lambda: sabotaged.worker(usual, 1))
    assert "more memory for keys and values" in failure


@pytest.mark.faults
def test_hidden_states_that_are_not_numbers_are_buried_and_their_row_fails(
    run: Callable[[str, Question], tuple[Job, str]], sabotaged: Roster, report: Report
) -> None:
    report.fault, report.done = "NaN hidden", "what stage 0 makes of one row, every time"
    run("nan", _poison(NAN))
    seen = sabotaged.survey()
    assert seen.dead is not None
    assert seen.dead.ready > 0
    assert sabotaged.actors["worker-1-0"].events("body.refused")
