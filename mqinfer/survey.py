"""Asks every actor of a pipeline how it is, and the broker about its queues: the facts behind `mqinfer status`.

Reads only. How it is shown belongs to the doors.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import fmean

from mqinfer.errors import WireError
from mqinfer.messages import Ask, Report
from mqinfer.plan import Plan
from mqinfer.queues import Topology, new_id
from mqinfer.scaling import StageSeen, Window, Worked
from mqinfer.transports.base import Delivery, QueueState, Transport
from mqinfer.wire import decode, encode

#: How often a question that is not out yet looks whether the broker keeps it back.
BLOCKED_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How a stage fares, summed over its workers."""

    workers: int
    unacknowledged: float
    rows_per_s: float
    tokens_per_s: float
    #: Share of the time that its workers compute, from 0 to 1.
    busy: float
    kv_used_bytes: float
    kv_budget_bytes: float
    #: Of a step in a worker's hands before its forward, in the mean.
    wait_s: float
    #: Rows of a forward, in the mean.
    batch_rows: float
    #: Bytes of the bodies passed on.
    out_bytes_per_s: float
    #: Hidden states passed on, bytes before the codec by bytes after it; 0 where none were.
    compression: float


@dataclass(frozen=True, slots=True)
class Survey:
    """What was seen at one moment."""

    requests: QueueState | None
    dead: QueueState | None
    stages: tuple[QueueState | None, ...]
    #: By actor id.
    reports: Mapping[str, Report]
    #: Why the broker takes nothing from who publishes: nobody could be asked then. "": it takes everything.
    blocked: str = ""

    def in_role(self, role: str) -> list[Report]:
        """Actors of that role (see Report) that answered."""
        return [report for report in self.reports.values() if report.role == role]

    def coordinators(self) -> list[Report]:
        """Coordinators that answered."""
        return self.in_role("coordinator")

    def workers(self, stage: int) -> list[Report]:
        """Workers of the stage that answered."""
        return [report for report in self.in_role("worker") if report.stage == stage]

    def consumers(self, stage: int) -> int:
        """Workers of the stage. One that the broker knows is one, even where it is in a long forward and silent."""
        return max(len(self.workers(stage)), _count(self.stages[stage]))

    def blocked_s(self) -> float:
        """How long the broker kept the actor that it kept longest from publishing, since that one's link is open."""
        return max((report.values.get("blocked_s", 0.0) for report in self.reports.values()), default=0.0)

    def in_flight(self) -> int:
        """Requests that some coordinator holds."""
        return int(sum(report.values.get("rows", 0) for report in self.coordinators()))

    def holds_nothing(self) -> bool:
        """Whether no request waits and no coordinator holds one; False where nobody could be asked."""
        return not self.blocked and not (self.requests and self.requests.ready) and not self.in_flight()

    def rates(self, earlier: Survey, stage: int) -> Rates:
        """The stage's rates between two surveys; workers that did not answer both count only as present."""
        return self.rates_of(earlier, self.workers(stage))

    def rates_of(self, earlier: Survey, workers: Sequence[Report]) -> Rates:
        """The same of these workers, which answered this survey."""
        both = [(earlier.reports[now.id], now) for now in workers if now.id in earlier.reports]

        def rate(name: str) -> float:
            return sum(_grown(then, now)(name) / max(now.clock_s - then.clock_s, 1e-6) for then, now in both)

        def mean(name: str, of: str) -> float:
            return rate(name) / rate(of) if rate(of) else 0.0

        def total(name: str) -> float:
            return sum(now.values.get(name, 0.0) for now in workers)

        return Rates(
            workers=len(workers),
            unacknowledged=total("unacknowledged"),
            rows_per_s=rate("rows"),
            tokens_per_s=rate("tokens"),
            busy=rate("busy_s") / max(len(both), 1),
            kv_used_bytes=total("kv_used_bytes"),
            kv_budget_bytes=total("kv_budget_bytes"),
            wait_s=mean("wait_s", "steps"),
            batch_rows=mean("rows", "forwards"),
            out_bytes_per_s=rate("out_bytes"),
            compression=mean("hidden_bytes", "packed_bytes"),
        )

    def bound_stage(self, earlier: Survey) -> int | None:
        """The stage that the pipeline waits for: the busiest where work is under way; None when idle."""
        if not self.in_flight():
            return None
        unserved = [k for k in range(len(self.stages)) if not self.workers(k)]
        if unserved:
            return unserved[0]
        return max(range(len(self.stages)), key=lambda stage: self.rates(earlier, stage).busy, default=None)

    def complaint(self) -> str:
        """Why nothing is computed, where that can be seen; "" otherwise."""
        if self.blocked:
            return f"the broker blocks publishers: memory or disk alarm ({self.blocked}); all goes on when it ends"
        if not self.coordinators():
            return "no coordinator answers: start one with `mqinfer coordinator`"
        missing = [str(k) for k in range(len(self.stages)) if not self.workers(k)]
        return f"no worker serves stage {', '.join(missing)}" if missing else ""


def window(surveys: Sequence[Survey]) -> Window:
    """What several surveys, the oldest first, show of the time between the first and the last of them."""
    first, last = surveys[0], surveys[-1]

    def gauge(name: str) -> float:
        return fmean(sum(one.values.get(name, 0.0) for one in each.coordinators()) for each in surveys)

    return Window(
        stages=tuple(_seen(surveys, stage) for stage in range(len(last.stages))),
        coordinators=len(last.coordinators()),
        requests=last.requests.ready if last.requests else 0,
        rows=gauge("rows"),
        waiting=gauge("waiting"),
        microbatches=gauge("microbatches"),
        microbatch_rows=max((one.values.get("microbatch_rows", 0.0) for one in last.coordinators()), default=0.0),
        coordinator_busy=max(
            (
                _grown(then, now)("cpu_s") / (now.clock_s - then.clock_s)
                for then, now in _both(first, last.coordinators())
            ),
            default=0.0,
        ),
        blocked=last.blocked,
    )


def _seen(surveys: Sequence[Survey], stage: int) -> StageSeen:
    first, last = surveys[0], surveys[-1]
    states = [each.stages[stage] for each in surveys]
    return StageSeen(
        consumers=last.consumers(stage),
        worked=tuple(_worked(then, now) for then, now in _both(first, last.workers(stage))),
        ready=fmean(state.ready if state else 0 for state in states),
        unacknowledged=fmean(
            sum(one.values.get("unacknowledged", 0.0) for one in each.workers(stage)) for each in surveys
        ),
    )


def _both(earlier: Survey, reports: Sequence[Report]) -> list[tuple[Report, Report]]:
    """Of the actors that answered earlier, too, and since then have begun no new session: then and now."""
    pairs = [(earlier.reports[now.id], now) for now in reports if now.id in earlier.reports]
    return [(then, now) for then, now in pairs if now.clock_s > then.clock_s]


def _grown(then: Report, now: Report) -> Callable[[str], float]:
    return lambda name: now.values.get(name, 0.0) - then.values.get(name, 0.0)


def _worked(then: Report, now: Report) -> Worked:
    grown = _grown(then, now)
    return Worked(
        seconds=now.clock_s - then.clock_s,
        busy_s=grown("busy_s"),
        forwards=grown("forwards"),
        steps=grown("steps"),
        rows=grown("rows"),
        tokens=grown("tokens"),
        tokens_squared=grown("tokens_squared"),
        token_busy_s=grown("token_busy_s"),
    )


async def take(transport: Transport, plan: Plan, *, wait_s: float = 0.5, patience_s: float = 0.0) -> Survey:
    """Ask, wait `wait_s` for answers, look at the queues. Raises: TransportError.

    `patience_s`: how much longer to wait while fewer workers of a stage have answered than the broker counted consumers
    before, for a worker answers between two forwards. One that has come since has not heard the question.
    """
    topology = Topology(plan.name)
    replies: asyncio.Queue[Delivery] = asyncio.Queue()
    spec = topology.reports(new_id("ask"))
    await transport.declare(spec)
    subscription = await transport.consume(spec.name, prefetch=0, sink=replies.put_nowait)
    reports: dict[str, Report] = {}
    try:
        asked = await _stages(transport, plan) if patience_s else ()
        blocked = await _ask(transport, topology.control, encode(Ask(plan=plan.digest, reply_to=spec.name)))
        for _ in range(1 if blocked else 1 + ceil(patience_s / wait_s)):
            if not blocked:
                await _hear(replies, reports, wait_s)
            seen = Survey(None, None, await _stages(transport, plan), reports, blocked)
            if all(len(seen.workers(k)) >= min(_count(asked[k]), _count(seen.stages[k])) for k in range(len(asked))):
                break
    finally:
        await subscription.cancel()
        await transport.delete(spec.name)
    requests, dead = [await transport.inspect(spec.name) for spec in (topology.requests, topology.dead)]
    return replace(seen, requests=requests, dead=dead)


async def _stages(transport: Transport, plan: Plan) -> tuple[QueueState | None, ...]:
    topology = Topology(plan.name)
    return tuple([await transport.inspect(topology.stage(k).name) for k in range(len(plan.stages))])


def _count(state: QueueState | None) -> int:
    return state.consumers if state else 0


async def _hear(replies: asyncio.Queue[Delivery], reports: dict[str, Report], wait_s: float) -> None:
    """Add what comes in that time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            while True:
                delivery = await replies.get()
                await delivery.ack()
                with contextlib.suppress(WireError):
                    message = decode(delivery.body)
                    if isinstance(message, Report):
                        reports[message.id] = message


async def _ask(transport: Transport, exchange: str, ask: bytes) -> str:
    """Broadcast; or, where the broker keeps us from it, its reason."""
    asking = asyncio.ensure_future(transport.broadcast(exchange, ask))
    try:
        while not (await asyncio.wait({asking}, timeout=BLOCKED_LOOK_S))[0]:
            if reason := transport.blockage().reason:
                return reason
        await asking
        return ""
    finally:
        asking.cancel()
