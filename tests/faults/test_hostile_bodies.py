"""Bodies that nobody should have sent, in the queues of a fleet at work."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zstandard
from counts import Report
from processes import wait_until
from roster import Roster
from workload import SHORT

from mqinfer.messages import Packed, Row, Step
from mqinfer.plan import Plan
from mqinfer.tensor_codec import pack
from mqinfer.transports.base import Delivery, Transport
from mqinfer.wire import MAX_STEP_BYTES, PREFIX_BYTES, encode

STAGE = 1
#: What a worker may grow by over all of them: bodies that are read, and nothing that they claim to hold.
GROWTH_BYTES = 64 * 2**20


def _step(plan: Plan, hidden: Packed, digest: str = "") -> bytes:
    row = Row(row=0, epoch=0, start=0, count=4, reserve=8)
    return encode(
        Step(
            plan=digest or plan.digest,
            owner="nobody",
            microbatch=0,
            number=0,
            stage=STAGE,
            route=("nobody",),
            rows=(row,),
            hidden=hidden,
        )
    )


def _good(plan: Plan) -> Packed:
    return pack(torch.zeros(4, plan.hidden_size), "raw")


def _bomb(plan: Plan) -> bytes:
    """A tensor whose pieces are 256 MiB of zeros, pressed into a few KiB."""
    packed = pack(torch.zeros(4, plan.hidden_size), "lossless")
    pressed = zstandard.ZstdCompressor().compress(bytes(256 * 2**20))
    blobs = tuple(pressed for _ in packed.blobs)
    return _step(plan, Packed(codec=packed.codec, dtype=packed.dtype, shape=packed.shape, blobs=blobs))


def _oversize() -> bytes:
    """Right but for its size: it is refused before its checksum is looked at."""
    behind = 2 * MAX_STEP_BYTES + 1 - PREFIX_BYTES
    return struct.pack("<4sHHQQQ", b"\x93MQI", 1, 0, 32, behind - 32, 0) + bytes(behind)


def _flipped(body: bytes) -> bytes:
    return body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]


#: What is sent, and a word of the reason with which it must be buried.
BODIES: dict[str, tuple[Callable[[Plan], bytes], str]] = {
    "garbage": (lambda plan: b"\x00garbage" * 1000, "not a body"),
    "truncated": (lambda plan: _step(plan, _good(plan))[:-100], "add up"),
    "flipped": (lambda plan: _flipped(_step(plan, _good(plan))), "checksum"),
    "oversize": (lambda plan: _oversize(), f"the limit is {2 * MAX_STEP_BYTES}"),
    "oversize header": (lambda plan: struct.pack("<4sHHQQQ", b"\x93MQI", 1, 0, 2**60, 0, 0), "limit"),
    "bomb": (_bomb, "bytes"),
    "wrong digest": (lambda plan: _step(plan, _good(plan), "0" * len(plan.digest)), "plan"),
}


def _peak_bytes(pid: int) -> int:
    """The most memory that the process has had: what was taken and given back again counts too."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_hostile_bodies_are_buried_with_their_reason_and_the_workers_live(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "hostile bodies", f"{', '.join(BODIES)}, amid a job"
    _bury(healed, answers, report, tmp_path, BODIES)


def test_hidden_states_that_are_not_numbers_are_buried_with_their_reason(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "hostile bodies", "NaN hidden"
    nan = (lambda plan: _step(plan, pack(torch.full((4, plan.hidden_size), float("nan")), "raw")), "finite")
    _bury(healed, answers, report, tmp_path, {"NaN": nan})


def _bury(
    roster: Roster,
    answers: dict[str, str],
    report: Report,
    folder: Path,
    bodies: dict[str, tuple[Callable[[Plan], bytes], str]],
) -> None:
    roster.ask(lambda link: link.purge(roster.topology.dead.name))
    workers = roster.workers(STAGE)
    pids = [worker.process.pid for worker in workers]
    job = roster.job(SHORT, folder)
    job.reach(0.1)
    before = [_peak_bytes(pid) for pid in pids]
    for make, _ in bodies.values():
        body = make(roster.plan)
        roster.ask(lambda link, body=body: link.publish(roster.topology.stage(STAGE).name, body))
    reasons: list[str] = []
    wait_until(lambda: _take(roster, reasons) >= len(bodies), roster.fleet, 60, "dead letters")
    for name, (_, word) in bodies.items():
        assert any(word in reason for reason in reasons), f"{name}: {word!r} in none of {reasons}"
    job.finish(answers, report)
    assert [worker.process.pid for worker in workers if worker.lives] == pids
    grown = max(_peak_bytes(pid) - then for pid, then in zip(pids, before, strict=True))
    report.note = f"{len(reasons)} buried, a worker grew by {grown / 2**20:.0f} MiB"
    assert grown < GROWTH_BYTES


def _take(roster: Roster, reasons: list[str]) -> int:
    """Take dead letters and note their reasons; how many there were in all."""

    async def take(link: Transport) -> None:
        deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        await link.consume(roster.topology.dead.name, prefetch=0, sink=deliveries.put_nowait)
        while True:
            try:
                delivery = await asyncio.wait_for(deliveries.get(), 0.5)
            except TimeoutError:
                return
            reasons.append(delivery.headers["reason"])
            await delivery.ack()

    roster.ask(take)
    return len(reasons)


@pytest.mark.faults
def test_dead_letters_can_be_listed_shown_requeued_and_purged(healed: Roster, report: Report) -> None:
    report.fault, report.done = "hostile bodies", "`mqinfer dead list`, `show`, `requeue`, `purge`"
    dead = healed.topology.dead.name
    healed.ask(lambda link: link.purge(dead))
    stage = healed.topology.stage(STAGE).name
    before = sum(len(worker.events("body.refused")) for worker in healed.workers(STAGE))
    healed.ask(lambda link: link.publish(stage, b"garbage" * 100))

    def buried(times: int) -> bool:
        refused = sum(len(worker.events("body.refused")) for worker in healed.workers(STAGE)) - before
        state = healed.survey().dead
        return refused == times and state is not None and state.ready == 1

    wait_until(lambda: buried(1), healed.fleet, 60, "a dead letter")
    assert "not a body" in _told(healed, "list")
    assert stage in _told(healed, "show", "1")
    _told(healed, "requeue", "1")
    wait_until(lambda: buried(2), healed.fleet, 60, "it is still garbage")
    _told(healed, "purge", "--all", "--yes")
    state = healed.survey().dead
    assert state is not None
    assert state.ready == 0


def _told(roster: Roster, *command: str) -> str:
    done = roster.fleet.ask("dead", *command)
    assert done.returncode == 0, done.stderr
    return done.stdout
