"""Queues that are deleted, a stage without workers, a worker of another plan."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from counts import Report
from processes import demo_model, wait_until
from roster import Roster
from workload import SHORT

from mqinfer import checkpoint, plan
from mqinfer.queues import results

GONE_S = 60.0


def test_a_deleted_stage_queue_is_made_again(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "a queue deleted", "the shared queue of stage 1, with what it held"
    _delete(healed.topology.stage(1).name, healed, answers, report, tmp_path)


@pytest.mark.faults
def test_a_deleted_requests_queue_is_made_again_and_asked_anew(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "a queue deleted", "`requests`, with all that waited"
    _delete(healed.topology.requests.name, healed, answers, report, tmp_path)


@pytest.mark.faults
def test_a_deleted_results_queue_is_made_again_and_asked_anew(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "a queue deleted", "the job's results"
    _delete("", healed, answers, report, tmp_path)


def _delete(queue: str, roster: Roster, answers: dict[str, str], report: Report, folder: Path) -> None:
    job = roster.job(SHORT, folder)
    job.reach(0.2)
    if not queue:
        ticket = job.output.with_name(job.output.name + ".job").read_text()
        queue = results(ticket.partition('"job": "')[2].partition('"')[0]).name
    roster.ask(lambda link: link.delete(queue))
    report.flowed(job.flows())
    job.finish(answers, report)


@pytest.mark.faults
def test_a_stage_without_workers_is_waited_for(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "a stage's only worker gone", f"for {GONE_S:g} s, then started again"
    only, other = healed.workers(1)
    job = healed.job(SHORT, tmp_path)
    job.reach(0.1)
    other.signal(signal.SIGTERM)
    other.wait()
    job.flows()
    only.kill()
    time.sleep(GONE_S)  # the fault's own length
    status = healed.fleet.ask("status")
    assert job.actor.lives
    assert job.lines < len(SHORT)
    assert "no worker" in status.stdout + status.stderr, status.stdout
    only.restart()
    wait_until(lambda: bool(healed.survey().workers(1)), healed.fleet)
    report.flowed(job.flows())
    job.finish(answers, report)


@pytest.mark.faults
def test_a_worker_of_another_plan_is_refused_and_spoils_nothing(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "a worker of another plan joins", "the same pipeline's name, cut elsewhere"
    other, _ = checkpoint.make_plan(
        str(demo_model()), stages=None, cuts=[5, 20], dtype="float32", name=healed.plan.name
    )
    file = tmp_path / "other.toml"
    plan.write(other, file)
    healed.ask(lambda link: link.purge(healed.topology.dead.name))
    stranger = healed.stranger("stranger", file, 0)
    job = healed.job(SHORT, tmp_path)
    job.finish(answers, report)
    assert stranger.lives
    refused = stranger.events("body.refused")
    report.note = f"it refused {len(refused)} bodies"
    assert refused
    assert all("plan" in event["reason"] for event in refused)
    assert not stranger.events("step.computed")
    stranger.signal(signal.SIGTERM)
    assert stranger.wait() == 0
    assert len(healed.survey().workers(0)) == len(healed.workers(0))
