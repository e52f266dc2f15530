"""What happens to the broker: killed, short of memory, short of disk, impatient with consumers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from counts import Report
from private_broker import PrivateBroker
from processes import LOOK_S, Actor, demo_model, wait_until
from roster import ALLOWANCE, Roster
from workload import SHORT, repeated

#: By the issue, from when the broker is up again.
FLOWING_S = 15.0
ALARM_S = 30.0
#: Until the alarm is there and somebody has told of it.
ALARMED_S = 180.0
#: What was on its way when the alarm came may still arrive.
SETTLING_S = 5.0


@pytest.mark.faults  # test_smollm2.py has a plainer one, for every day
def test_a_broker_killed_in_the_middle_costs_no_row(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGKILL of the broker", "once, started again at once"
    _kill_broker(healed, answers, report, tmp_path, times=1)


@pytest.mark.faults
def test_a_broker_killed_three_times_costs_no_row(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGKILL of the broker", "three times in one job"
    _kill_broker(healed, answers, report, tmp_path, times=3)


def _kill_broker(roster: Roster, answers: dict[str, str], report: Report, folder: Path, *, times: int) -> None:
    asked = repeated(SHORT, times)
    job = roster.job(asked, folder)
    for turn in range(times):
        job.reach((0.3 + turn) / times)
        roster.broker.kill()
        roster.broker.start()
        report.flowed(job.flows())
    job.finish(answers, report)
    assert report.flowing_s is not None
    assert report.flowing_s <= FLOWING_S * ALLOWANCE


ALARMS = {
    "memory": (
        ("set_vm_memory_high_watermark", "absolute", "1MB"),
        ("set_vm_memory_high_watermark", "absolute", "1GB"),
    ),
    "disk": (("set_disk_free_limit", str(10**15)), ("set_disk_free_limit", "50MB")),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", ALARMS)
def test_under_an_alarm_everything_pauses_says_so_and_goes_on(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path, kind: str
) -> None:
    report.fault, report.done = f"{kind} alarm", f"for {ALARM_S:g} s"
    marks = {actor.name: actor.mark() for actor in healed.actors.values()}

    def told(event: str) -> list[Actor]:
        return [actor for actor in healed.actors.values() if actor.events(event, marks[actor.name])]

    asked = repeated(SHORT, 2)
    job = healed.job(asked, tmp_path)
    job.reach(0.1)
    on, off = ALARMS[kind]
    try:
        with ThreadPoolExecutor(1) as thread:
            alarm = thread.submit(healed.broker.ctl, *on)
            began_s = time.monotonic()
            while not (
                alarm.done() and (alarm.exception() or told("link.blocked"))
            ):  # rabbitmqctl takes its time on a busy machine
                assert time.monotonic() - began_s < ALARMED_S, "nobody says that the broker blocks it"
                if not job.actor.lives:
                    job.finish(answers, report)
                    job = healed.job(asked, tmp_path)
                time.sleep(LOOK_S)
            alarm.result()
        time.sleep(SETTLING_S)  # the fault's own length, as below
        before = job.lines
        time.sleep(ALARM_S)
        assert job.lines == before < len(asked), "it is to pause"
    finally:
        healed.broker.ctl(*off)
    report.flowed(job.flows())
    job.finish(answers, report)
    wait_until(lambda: told("link.unblocked") == told("link.blocked"), healed.fleet, why="link.unblocked")
    assert not told("link.lost"), "an alarm is no reason to give up a link"
    blocked_s = max(seen.values.get("blocked_s", 0.0) for seen in healed.survey().reports.values())
    report.note = f"blocked for {blocked_s:.0f} s by the actors' own count"
    assert blocked_s >= ALARM_S, "the metric says it too"


# -- consumer_timeout --------------------------------------------------------------------------

TIMEOUT_S = 5


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roster]:
    """A broker that takes a delivery back after 5 s and looks every second; a fleet with leases of 1.5 s."""
    broker = PrivateBroker(
        config=f"consumer_timeout = {TIMEOUT_S * 1000}\n", advanced="[{rabbit, [{channel_tick_interval, 1000}]}]."
    )
    roster = None
    try:
        broker.start()
        folder = tmp_path_factory.mktemp("impatient")
        roster = Roster(folder, demo_model(), broker, {"MQINFER_LEASE_S": "1.5"})
        roster.whole()
        yield roster
    finally:
        if roster is not None:
            roster.end()
        broker.close()


@pytest.mark.faults
def test_no_lease_is_ever_taken_back_from_a_living_coordinator(
    impatient: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = f"consumer_timeout of {TIMEOUT_S} s", "over a whole job, leases of 1.5 s"
    asked = repeated(SHORT, 2)
    job = impatient.job(asked, tmp_path)
    began_s = time.monotonic()
    job.finish(answers, report)
    assert time.monotonic() - began_s > 2 * TIMEOUT_S, "too short to show anything"
    lost = [actor.name for actor in impatient.actors.values() if actor.events("link.lost")]
    assert lost == []


@pytest.mark.faults
def test_a_lease_longer_than_the_consumer_timeout_is_taken_back_and_costs_no_row(
    impatient: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    """That the test above can fail."""
    report.fault, report.done = f"consumer_timeout of {TIMEOUT_S} s", "with leases of 10 minutes: taken back"
    names = ("coordinator-0", "coordinator-1")
    careless = {"MQINFER_LEASE_S": "600", "MQINFER_CHECKPOINT_S": "600", "MQINFER_ROWS": "128"}
    # A coordinator that holds many rows holds each of them for long.
    impatient.replaced(names, lambda: impatient.coordinator("coordinator-9", environment=careless))
    job = impatient.job(SHORT, tmp_path)
    wait_until(lambda: bool(impatient.actors["coordinator-9"].events("link.lost")), impatient.fleet, why="link.lost")
    patient = {"MQINFER_LEASE_S": "1.5"}
    impatient.replaced(("coordinator-9",), lambda: [impatient.coordinator(name, environment=patient) for name in names])
    job.finish(answers, report)
