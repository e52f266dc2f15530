"""Processes that stand still for longer than the heartbeat and then go on: zombies."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from counts import Report
from processes import wait_until
from roster import HEARTBEAT_S, Roster
from workload import SHORT, repeated

#: RabbitMQ gives up a client that was silent for two heartbeats, and looks once in each.
PAUSE_S = 5.0 * HEARTBEAT_S

pytestmark = pytest.mark.faults


def test_a_stopped_worker_is_taken_over_and_harmless_when_it_wakes(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGSTOP of a worker", f"for {PAUSE_S:g} s (heartbeat {HEARTBEAT_S} s), then SIGCONT"
    _pause("worker-1-1", healed, answers, report, tmp_path)


def test_a_stopped_coordinator_is_taken_over_and_harmless_when_it_wakes(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault = "SIGSTOP of a coordinator"
    report.done = f"for {PAUSE_S:g} s (heartbeat {HEARTBEAT_S} s), then SIGCONT"
    _pause("coordinator-1", healed, answers, report, tmp_path)


def _pause(name: str, roster: Roster, answers: dict[str, str], report: Report, folder: Path) -> None:
    zombie = roster.actors[name]
    mark = zombie.mark()
    job = roster.job(repeated(SHORT, 2), folder)
    job.reach(0.2)
    zombie.signal(signal.SIGSTOP)
    report.flowed(job.flows())
    began_s = time.monotonic()
    taken_over = job.lines
    time.sleep(PAUSE_S)  # the fault's own length
    # What it held comes back only when the broker has given it up; then everything can be answered without it.
    wait_until(lambda: job.lines > taken_over or not job.actor.lives, roster.fleet)
    zombie.signal(signal.SIGCONT)
    report.note = f"asleep for {time.monotonic() - began_s:.0f} s"
    wait_until(lambda: bool(zombie.events("link.lost", mark)), roster.fleet, why="it is to notice that it was dead")
    wait_until(lambda: bool(zombie.events("link.opened", mark)), roster.fleet, why="it is to come back")
    job.finish(answers, report)
    roster.ready()
