"""What networks do to one actor's connections: cut, half-open, slow, late, a flipped byte."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from counts import Report
from processes import Actor, wait_until
from roster import ALLOWANCE, HEARTBEAT_S, NOTICED_S, Job, Roster
from workload import SHORT, repeated

HALF_OPEN_S = 60.0
SLOW_BYTES_PER_S = 2**20
DELAY_S = 0.2
#: Each has a proxy of its own.
ACTORS = ("worker-1-0", "coordinator-0", "producer")


def _job(roster: Roster, folder: Path, times: int = 1) -> Job:
    return roster.job(repeated(SHORT, times), folder, proxied=True)


def _faulty(name: str, roster: Roster, job: Job) -> Actor:
    return job.actor if name == "producer" else roster.actors[name]


def test_connections_cut_at_each_actor_cost_no_row(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "connections cut", "a worker's, a coordinator's and the producer's in turn"
    job = _job(healed, tmp_path)
    for turn, name in enumerate(ACTORS):
        job.reach(0.1 + 0.25 * turn)
        actor = _faulty(name, healed, job)
        mark = actor.mark()
        healed.do(healed.proxy(actor.name).cut)
        report.flowed(job.flows(NOTICED_S * ALLOWANCE))
        wait_until(lambda actor=actor, mark=mark: bool(actor.events("link.opened", mark)), healed.fleet, why=name)
    job.finish(answers, report)


def test_a_byte_flipped_on_the_wire_costs_no_row(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "a byte flipped", "in what a worker sends, three times"
    job = _job(healed, tmp_path)
    proxy = healed.proxy("worker-1-0")
    for turn in range(3):
        job.reach(0.1 + 0.2 * turn)
        healed.do(lambda: proxy.flip(from_bytes=4096))  # so long a chunk is hidden states for the most part
        wait_until(lambda turn=turn: proxy.flipped > turn or not job.actor.lives, healed.fleet, why="a long chunk")
    flipped = proxy.flipped
    job.finish(answers, report)
    assert flipped
    report.note = f"{flipped} bytes flipped"


@pytest.mark.faults
@pytest.mark.parametrize("name", ACTORS)
def test_a_half_open_connection_is_given_up_in_time(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path, name: str
) -> None:
    report.fault, report.done = "connections half-open", f"of a {name.partition('-')[0]}, for {HALF_OPEN_S:g} s"
    job = _job(healed, tmp_path, times=2)
    job.reach(0.1)
    actor = _faulty(name, healed, job)
    mark, began_s = actor.mark(), time.monotonic()
    healed.do(healed.proxy(actor.name).half_open)
    back_s = wait_until(lambda: bool(actor.events("link.opened", mark)), healed.fleet, why="it is to come back")
    report.note = f"a new link after {back_s:.1f} s (heartbeat {HEARTBEAT_S} s)"
    assert back_s <= NOTICED_S * ALLOWANCE
    report.flowed(back_s + job.flows())
    while time.monotonic() - began_s < HALF_OPEN_S and job.actor.lives:
        time.sleep(0.5)  # the fault's own length
    healed.do(healed.proxy(actor.name).heal)  # what was swallowed arrives now, much too late
    job.finish(answers, report)


@pytest.mark.faults
@pytest.mark.parametrize("name", ACTORS)
@pytest.mark.parametrize("fault", ["1 MiB/s", "200 ms later"])
def test_a_poor_line_only_makes_it_slower(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path, name: str, fault: str
) -> None:
    report.fault, report.done = f"a line of {fault}" if "/" in fault else "everything 200 ms later", f"at a {name}"
    job = _job(healed, tmp_path)
    job.reach(0.1)
    actor = _faulty(name, healed, job)
    mark = actor.mark()
    proxy = healed.proxy(actor.name)
    healed.do(lambda: proxy.slow(SLOW_BYTES_PER_S) if "/" in fault else proxy.delay(DELAY_S))
    report.flowed(job.flows())
    job.finish(answers, report)
    assert not actor.events("link.lost", mark), "slow is not dead"
