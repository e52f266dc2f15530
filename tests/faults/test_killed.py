"""Processes that die by SIGKILL: workers, coordinators, producers."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from counts import Report, used_tokens
from processes import rows, wait_until
from roster import ALLOWANCE, STAGES, Roster, fault_free
from workload import LONG, SHORT, repeated

#: By the issue.
FLOWING_S = 5.0
REPLAYED_PERCENT = 5.0
KILLS = 20
#: Between two kills at least; no stage loses a worker while its other one is not back.
INTERVAL_S = 4.0
#: Rows done between two kills at least. A kill costs what its worker had cached of the rows under way, up to 3 or so of
#: 8 rows, whatever the machine: this is a few seconds' work where each process has a core, and longer where not.
INTERVAL_ROWS = 60


@pytest.mark.faults  # test_smollm2.py has a plainer one, for every day
def test_a_worker_killed_on_every_stage_costs_no_row(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGKILL of a worker", "one worker of each stage in turn"
    job = healed.job(SHORT, tmp_path)
    for stage in range(STAGES):
        job.reach(0.1 + 0.2 * stage)
        healed.workers(stage)[stage % 2].kill()
        report.flowed(job.flows())
    job.finish(answers, report)


@pytest.fixture
def few_rows(healed: Roster) -> Iterator[Roster]:
    """Coordinators that hold so few rows that a kill can lose only a little; what is killed is drawn at random."""
    usual = ("coordinator-0", "coordinator-1")
    few = ("coordinator-2", "coordinator-3")
    environment = {"MQINFER_ROWS": "4"}
    healed.replaced(usual, lambda: [healed.coordinator(name, environment=environment) for name in few])
    yield healed
    healed.replaced(few, lambda: [healed.coordinator(name, proxied=name == usual[0]) for name in usual])


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_twenty_killed_workers_cost_no_row_and_little_work(
    few_rows: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGKILL of a worker", f"{KILLS} random ones over all stages, restarted empty"
    draw = random.Random(3)
    asked = repeated(SHORT, 4)
    killed, needed_tokens = 0, 0
    while killed < KILLS:
        job = few_rows.job(asked, tmp_path)
        job.reach(0.01)
        while killed < KILLS and job.lines < 0.9 * len(asked):
            stage = killed % STAGES
            wait_until(lambda stage=stage: len(few_rows.survey().workers(stage)) == 2, few_rows.fleet, why="a peer")
            victim = draw.choice(few_rows.workers(stage))
            victim.kill()
            killed, before = killed + 1, job.lines
            report.flowed(job.flows())
            victim.restart()
            time.sleep(INTERVAL_S)  # the fault's own rhythm, nothing is waited for
            job.advance(INTERVAL_ROWS, since=before)
        job.finish(answers, report)
        needed_tokens += used_tokens(job.output)
    report.note = f"{killed} killed"
    replayed = sum(seen.values["replayed_tokens"] for seen in few_rows.survey().coordinators())
    report.replayed_percent = 100 * replayed / needed_tokens
    assert report.replayed_percent <= REPLAYED_PERCENT
    assert report.flowing_s is not None
    assert report.flowing_s <= FLOWING_S * ALLOWANCE


@pytest.mark.faults
def test_each_coordinator_killed_in_turn_costs_no_row(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGKILL of a coordinator", "each in turn, started again"
    job = healed.job(SHORT, tmp_path)
    for share, victim in ((0.15, healed.coordinators()[0]), (0.5, healed.coordinators()[1])):
        job.reach(share)
        victim.kill()
        report.flowed(job.flows())
        victim.restart()
        healed.ready()
    job.finish(answers, report)


@pytest.mark.faults
def test_after_all_coordinators_died_work_goes_on_from_the_checkpoints(
    healed: Roster, report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGKILL of all coordinators", "at once, started again 10 s later"
    answers = fault_free(healed, LONG, tmp_path, ignore_eos=True)
    marks = {actor.name: actor.mark() for actor in healed.coordinators()}
    job = healed.job(LONG, tmp_path, ignore_eos=True)

    def kept() -> dict[str, int]:
        """Tokens in the newest checkpoint of every request."""
        found: dict[str, int] = {}
        for actor in healed.coordinators():
            for event in actor.events("checkpoint.kept", marks[actor.name]):
                found[event["request"]] = max(found.get(event["request"], 0), event["output_tokens"])
        return found

    most = max(question.max_tokens for question in LONG.values())
    wait_until(lambda: len(kept()) == len(LONG) and min(kept().values()) >= most // 4, healed.fleet)
    assert job.lines == 0, "no row was to be done yet"
    for actor in healed.coordinators():
        actor.kill()
    saved = kept()
    drawn_before = _rows_of_the_last_stage(healed)
    time.sleep(10)  # the fault's own length
    for actor in healed.coordinators():
        actor.restart()
    job.finish(answers, report)
    drawn = _rows_of_the_last_stage(healed) - drawn_before
    left = sum(question.max_tokens for question in LONG.values()) - sum(saved.values())
    report.note = f"{drawn:.0f} tokens drawn after it, {left} not in a checkpoint"
    # What was under way when they died is drawn once more, and a replay may take several steps for one token.
    assert drawn <= left + 4 * len(LONG), report.note
    assert left < 0.8 * sum(question.max_tokens for question in LONG.values())


def _rows_of_the_last_stage(roster: Roster) -> float:
    """Each of them is a token, for the prompts fit in one step."""
    return sum(seen.values.get("rows", 0) for seen in roster.survey().workers(STAGES - 1))


def test_a_killed_producer_goes_on_where_it_was(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGKILL of the producer", "`mqinfer batch` in the middle, run again"
    job = healed.job(SHORT, tmp_path)
    job.reach(0.3)
    job.actor.signal(signal.SIGKILL)
    job.actor.process.wait()
    finished = {row["custom_id"]: row for row in rows(job.output)}
    again = healed.run(job.output.with_suffix(".prompts"), job.output, SHORT)
    again.finish(answers, report)
    assert len(finished) < len(SHORT)
    assert finished.items() <= {row["custom_id"]: row for row in rows(job.output)}.items(), "finished rows are kept"
