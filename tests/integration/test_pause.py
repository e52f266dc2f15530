"""Workers that choose their stage, give their devices back and return: real processes over a real RabbitMQ."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from broker import Broker
from processes import Actor, Fleet, demo_model, rows, wait_until

pytestmark = [pytest.mark.smollm2, pytest.mark.broker, pytest.mark.timeout(400)]

PROMPTS = 40
#: A Python without torch, and far below any worker's.
SMALL_BYTES = 150 * 2**20


@pytest.fixture
def fleet(tmp_path: Path, broker: Broker) -> Iterator[Fleet]:
    """One coordinator, two workers on stage 0, one on each other stage."""
    fleet = Fleet(tmp_path, demo_model(), broker.url)
    try:
        fleet.start("coordinator", "coordinator", "--rows", "8")
        for name, stage in (("first", 0), ("second", 0), ("one", 1), ("two", 2)):
            fleet.start(name, "worker", "--stage", str(stage))
        yield fleet
    finally:
        fleet.end()


def workers(fleet: Fleet) -> dict[str, int]:
    """Consumers of each stage, as status shows them."""
    shown = fleet.ask("status").stdout
    return {stage: int(count) for stage, count in re.findall(r"^stage (\d) +\S+ +\S+ +(\d+)", shown, re.MULTILINE)}


def resident_bytes(actor: Actor) -> int:
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{actor.process.pid}/status").read_text(), re.MULTILINE)
    return int(kib) * 1024


def worker_id(fleet: Fleet, actor: Actor) -> str:
    """As it said when it began to serve."""
    wait_until(lambda: "actor.ready" in actor.said(), fleet, why="it does not serve")
    return re.findall(r"worker\.(s\d-\w+)", actor.said())[-1]


def job(fleet: Fleet, folder: Path) -> tuple[Actor, Path]:
    output = folder / "out.jsonl"
    lines = [
        {"custom_id": f"p{i}", "prompt": f"{i}. Once upon a time", "max_tokens": 12, "ignore_eos": True}
        for i in range(PROMPTS)
    ]
    output.with_suffix(".prompts").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return fleet.start("batch", "batch", str(output.with_suffix(".prompts")), "-o", str(output)), output


def test_a_worker_paused_in_the_middle_of_a_job_frees_its_memory_loses_nothing_and_comes_back(
    fleet: Fleet, tmp_path: Path
) -> None:
    first = fleet.actors[1]
    name, pid = worker_id(fleet, first), first.process.pid
    wait_until(lambda: workers(fleet) == {"0": 2, "1": 1, "2": 1}, fleet, why="the fleet is not complete")
    asked, output = job(fleet, tmp_path)
    wait_until(lambda: len(rows(output)) >= 4, fleet)
    assert resident_bytes(first) > 2 * SMALL_BYTES
    told = fleet.ask("pause", name)
    assert (told.returncode, f"{name} (stage 0" in told.stdout, "paused" in told.stdout) == (0, True, True), told.stderr
    assert resident_bytes(first) < SMALL_BYTES
    assert first.process.pid == pid
    assert first.lives
    assert len(rows(output)) < PROMPTS, "it was to pause in the middle"
    assert asked.wait() == 0, fleet.logs()
    assert sorted(row["custom_id"] for row in rows(output)) == sorted(f"p{i}" for i in range(PROMPTS))
    assert all(row["error"] is None for row in rows(output))
    assert workers(fleet)["0"] == 1
    assert "paused" in fleet.ask("status").stdout
    again = fleet.ask("resume", "all")
    assert (again.returncode, "loads its layers again" in again.stdout) == (0, True), again.stderr
    wait_until(lambda: workers(fleet) == {"0": 2, "1": 1, "2": 1}, fleet, why="it does not come back")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0, fleet.logs()


def test_nobody_of_that_name_is_said_together_with_who_is_there(fleet: Fleet) -> None:
    name = worker_id(fleet, fleet.actors[1])
    told = fleet.ask("pause", "nobody")
    assert told.returncode == 2
    assert "no worker is 'nobody': there are" in told.stderr
    assert name in told.stderr


def test_outside_of_its_hours_a_worker_waits_without_torch_and_ends_at_once_on_sigterm(
    tmp_path: Path, broker: Broker
) -> None:
    fleet = Fleet(tmp_path, demo_model(), broker.url)
    begin, end = (datetime.now() + timedelta(hours=hours) for hours in (3, 4))
    try:
        actor = fleet.start("night", "worker", "--stage", "0", "--hours", f"{begin:%H:%M}-{end:%H:%M}")
        wait_until(lambda: "worker.paused" in actor.said(), fleet, why="it does not pause")
        wait_until(lambda: "actor.ready" in actor.said(), fleet, why="it can't be seen")
        assert "reason=hours" in actor.said()
        assert "stage.loaded" not in actor.said()
        assert resident_bytes(actor) < SMALL_BYTES
        actor.signal(signal.SIGTERM)
        assert actor.wait() == 0, fleet.logs()
    finally:
        fleet.end()


def test_workers_that_choose_their_stages_make_a_pipeline(tmp_path: Path, broker: Broker) -> None:
    fleet = Fleet(tmp_path, demo_model(), broker.url)
    try:
        fleet.start("coordinator", "coordinator")
        spares = [fleet.start(f"spare-{number}", "worker", "--stage", "auto") for number in range(3)]
        wait_until(lambda: workers(fleet) == {"0": 1, "1": 1, "2": 1}, fleet, why="they do not spread")
        asked, output = job(fleet, tmp_path)
        assert asked.wait() == 0, fleet.logs()
        assert len(rows(output)) == PROMPTS
        for spare in spares:
            spare.signal(signal.SIGTERM)
        assert [spare.wait() for spare in spares] == [0] * 3, fleet.logs()
    finally:
        fleet.end()


def test_a_worker_whose_memory_holds_no_stage_says_so(tmp_path: Path, broker: Broker) -> None:
    fleet = Fleet(tmp_path, demo_model(), broker.url)
    told = fleet.ask("worker", "--stage", "auto", "--kv-bytes", "1000TiB")
    assert told.returncode == 2
    assert "no stage fits here; the last, for example: not enough memory on cpu" in told.stderr
