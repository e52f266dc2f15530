"""The coordinator: leases requests, sends microbatches around the ring, publishes results. No torch here.

It does what its `Scheduler` decides; all that is here is queues, clocks and the order of publish and
settle. A session ends with its link; nothing of it outlives the link but what the broker keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mqinfer.coordinator_counts import CoordinatorCounts, Trace, load_of, untraced
from mqinfer.errors import SettingsError, Unroutable
from mqinfer.leases import Intake, Lease, LeaseQueue
from mqinfer.link import Connect, bury, keep_linked, now_s, publish_declared
from mqinfer.messages import Ask, Probe, Request, Result, StepDone, StepTaken
from mqinfer.observe import (
    ACTOR_READY,
    COORDINATOR_DRAINED,
    REQUEST_LEASED,
    REQUEST_REFUSED,
    REQUESTS_SEEN,
    RESULT_UNCLAIMED,
    STAGE_SEEN,
    STEP_RETURNED,
    WORKER_GONE,
    emit,
)
from mqinfer.plan import Plan
from mqinfer.queues import PRIORITY_BEGUN, Topology, check_name, new_id, results
from mqinfer.reports import link_values, make_report
from mqinfer.requests import check_request, encoded, limits, refusal, result_of
from mqinfer.rows import Decision, Ended, Forget, LiveRow, Replayed, Send
from mqinfer.scheduler import Scheduler
from mqinfer.settings import CoordinatorSettings
from mqinfer.tokenizer import Tokenizer, find_stop
from mqinfer.transports.base import Delivery, QueueState, Transport
from mqinfer.verdicts import DEAD_LETTERS, FAILURE_ROWS
from mqinfer.wire import decode, encode

#: How often leases are looked over for those that are due.
LEASE_ROUND_S = 1.0


@dataclass(slots=True)
class Held:
    """A row and the lease on its request."""

    row: LiveRow
    lease: Lease
    #: What its checkpoint has.
    kept_tokens: int


class Coordinator:
    """One coordinator process; any number of them share the `requests` queue."""

    def __init__(
        self, plan: Plan, tokenizer: Tokenizer, settings: CoordinatorSettings, connect: Connect, trace: Trace = untraced
    ) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._settings = settings
        self._connect = connect
        self._trace = trace
        #: What it would report just now; nothing while it has no link. May be asked from any thread.
        self.values: Callable[[], Mapping[str, float]] = dict

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then give back what is not finished. Raises: Refused at the first link."""

        async def session(transport: Transport) -> None:
            begun = CoordinatorSession(self._plan, self._tokenizer, self._settings, transport, self._trace)
            self.values = begun.values
            try:
                await begun.run(stop)
            finally:
                self.values = dict

        await keep_linked("coordinator", self._connect, session, stop)


class CoordinatorSession:
    """What a coordinator is as long as its link holds."""

    def __init__(
        self, plan: Plan, tokenizer: Tokenizer, settings: CoordinatorSettings, transport: Transport, trace: Trace
    ) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._settings = settings
        self._transport = transport
        self._trace = trace
        self._topology = Topology(plan.name)
        self.id = new_id("c")
        self._queue = self._topology.coordinator(self.id)
        self._scheduler = Scheduler(
            plan,
            self._queue.name,
            limits(settings, plan),
            functools.partial(find_stop, tokenizer),
            step_timeout_s=settings.step_timeout_s,
        )
        self._held: dict[int, Held] = {}
        self._ids: set[str] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._inbox: asyncio.Queue[tuple[Delivery, int]] = asyncio.Queue()
        #: Set when a row waits for its blame to be kept.
        self._blamed = asyncio.Event()
        self._leases = LeaseQueue(transport, self._topology.leases(self.id))
        self._intake = Intake(
            transport, self._topology.requests.name, settings.rows, self._request_came, self._held_now
        )
        #: Requests in the inbox, by the round that they came in.
        self._unread: Counter[int] = Counter()
        self._counts = CoordinatorCounts()
        self._tasks: asyncio.TaskGroup

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set (then drained) or the link is lost. Raises: TransportError (in a group)."""
        async with asyncio.TaskGroup() as self._tasks:
            await self._open()
            loops = [
                self._tasks.create_task(loop)
                for loop in (self._transport.closed(), self._receive(), self._probe(), self._keep_leases())
            ]
            await stop.wait()
            for loop in loops[1:]:
                loop.cancel()
            await self._drain()
            loops[0].cancel()

    async def _open(self) -> None:
        for spec in self._topology.shared(len(self._plan.stages)):
            await self._transport.declare(spec)
        await self._transport.declare(self._queue)
        await self._transport.consume(
            self._queue.name, prefetch=0, sink=lambda delivery: self._inbox.put_nowait((delivery, 0))
        )
        await self._leases.open()
        await self._intake.tune()
        emit(ACTOR_READY, actor=self._queue.name)

    # -- what comes in -------------------------------------------------------------------------

    def _request_came(self, delivery: Delivery, round_: int) -> None:
        self._unread[round_] += 1
        self._inbox.put_nowait((delivery, round_))

    async def _receive(self) -> None:
        while True:
            delivery, round_ = await self._inbox.get()
            if round_:  # by the intake; the ends of trips are many more
                self._unread -= Counter({round_: 1})  # what comes to nothing is no longer kept
            try:
                message = decode(delivery.body)
            except DEAD_LETTERS as error:
                await self._bury(delivery, str(error))
                continue
            match message:
                case Request():
                    await self._admit(message, delivery, round_)
                case StepTaken():
                    await delivery.ack()
                    self._scheduler.taken(message, self._clock_s())
                case StepDone():
                    await delivery.ack()
                    emit(STEP_RETURNED, microbatch=message.microbatch, number=message.number)
                    self._perform(self._scheduler.done(message, self._clock_s()))
                case Ask():
                    await delivery.ack()
                    self._tasks.create_task(self._report(message))
                case Probe():
                    await delivery.ack()
                case _:
                    await self._bury(delivery, f"a {type(message).__name__} here")

    def _clock_s(self) -> float:
        """The scheduler's clock: it stands still while the broker takes nothing; nothing is overdue for that."""
        return now_s() - self._transport.blockage().total_s

    async def _admit(self, request: Request, delivery: Delivery, round_: int) -> None:
        if request.id in self._ids:  # a repeat: the first delivery holds the lease
            await delivery.ack()
            return
        try:
            check_name(request.job)
        except SettingsError as error:  # there is nowhere to send even a failure
            await self._bury(delivery, f"the job: {error}")
            return
        lease = Lease(delivery, round_, now_s())
        try:
            check_request(request, self._plan)
        except FAILURE_ROWS as error:
            await self._refuse(request, lease, str(error))
            return
        self._ids.add(request.id)
        row, ended = self._scheduler.add(request)
        emit(REQUEST_LEASED, request=request.id, row=row.number)
        self._held[row.number] = Held(row, lease, len(request.output))
        self._perform([*ended, *self._scheduler.form(self._clock_s())])

    async def _refuse(self, request: Request, lease: Lease, why: str) -> None:
        emit(REQUEST_REFUSED, request=request.id, error=why)
        await self._publish_result(refusal(request, why))
        await lease.settle()

    async def _bury(self, delivery: Delivery, reason: str) -> None:
        await bury(self._transport, self._topology.dead, delivery, reason)
        self._counts.values["dead_letters"] += 1

    def values(self) -> dict[str, float]:
        """See Coordinator.values."""
        return self._counts.now(self._scheduler) | link_values(self._transport)

    async def _report(self, ask: Ask) -> None:
        report = make_report("coordinator", self.id, self._plan, self.values() | load_of(self._settings))
        with contextlib.suppress(Unroutable):
            await self._transport.publish(ask.reply_to, encode(report))

    # -- what goes out -------------------------------------------------------------------------

    def _perform(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Send():
                    self._tasks.create_task(self._send(decision))
                case Forget():
                    self._tasks.create_task(self._forget(decision))
                case Ended():
                    finishing = self._tasks.create_task(self._finish(decision))
                    self._finishing.add(finishing)
                    finishing.add_done_callback(self._finishing.discard)
                case Replayed():
                    if not decision.row.ready:
                        self._blamed.set()
                    self._counts.replayed(decision)

    async def _send(self, send: Send) -> None:
        body = encode(self._trace(send.step))
        if send.queue is None:
            await publish_declared(self._transport, self._topology.stage(0), body, ttl_s=send.step.ttl_s)
            return
        try:
            await self._transport.publish(send.queue, body)
        except Unroutable:
            self._perform(self._scheduler.unsent(send.step.microbatch, send.queue, self._clock_s()))

    async def _forget(self, forget: Forget) -> None:
        with contextlib.suppress(Unroutable):
            await self._transport.publish(forget.queue, encode(forget.release))

    async def _finish(self, ended: Ended) -> None:
        held = self._held[ended.row.number]
        await self._publish_result(result_of(ended, self._tokenizer))
        await held.lease.settle()
        del self._held[ended.row.number]
        self._ids.discard(ended.row.request.id)
        await self._intake.tune()

    async def _publish_result(self, result: Result) -> None:
        try:
            await self._transport.publish(results(result.job).name, encoded(result), persistent=True)
        except Unroutable:  # its owner deleted the job while it ran
            emit(RESULT_UNCLAIMED, request=result.id, job=result.job)
        self._counts.ended(result)

    # -- clocks --------------------------------------------------------------------------------

    async def _probe(self) -> None:
        """That a worker's queue exists shows that it lives: see docs/protocol.md."""
        probe = encode(Probe(plan=self._plan.digest))
        while True:
            await asyncio.sleep(self._settings.probe_s)
            for queue in self._scheduler.workers:
                try:
                    await self._transport.publish(queue, probe)
                except Unroutable:
                    decisions = self._scheduler.gone(queue, self._clock_s())
                    if decisions:  # or it is looked again until what a suspect's worker does is known
                        emit(WORKER_GONE, queue=queue)
                    self._perform(decisions)
            await self._look_at_queues()
            self._perform(self._scheduler.overdue(self._clock_s()))
            self._perform(self._scheduler.form(self._clock_s()))

    async def _look_at_queues(self) -> None:
        for stage in range(len(self._plan.stages)):
            state = await self._transport.inspect(self._topology.stage(stage).name) or QueueState(0, 0)
            self._scheduler.seen(stage, state.consumers)
            emit(STAGE_SEEN, stage=stage, ready=state.ready, consumers=state.consumers)
        waiting = await self._transport.inspect(self._topology.requests.name) or QueueState(0, 0)
        emit(REQUESTS_SEEN, ready=waiting.ready)

    async def _keep_leases(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._blamed.wait(), LEASE_ROUND_S)
            self._blamed.clear()
            due = [held for held in self._held.values() if self._due(held, now_s())]
            if not due:
                continue
            await self._intake.pause()
            await asyncio.gather(*(self._renew(held) for held in due))
            self._perform(self._scheduler.form(self._clock_s()))
            await self._intake.tune()

    def _due(self, held: Held, now_s: float) -> bool:
        """Blame is kept at once, its end in the next round: a row must not begin afresh with every coordinator."""
        age_s = now_s - held.lease.renewed_at_s
        grown = len(held.row.output) > held.kept_tokens and age_s >= self._settings.checkpoint_s
        blamed = held.row.failures != held.row.kept_failures
        return held.row.number in self._scheduler.rows and (blamed or grown or age_s >= self._settings.lease_s)

    async def _renew(self, held: Held) -> None:
        row = held.row
        kept = await self._leases.renew(
            held.lease, lambda: row.outgoing() if row.number in self._scheduler.rows else None, now_s()
        )
        if kept is not None:
            held.kept_tokens, row.kept_failures = len(kept.output), kept.failures

    def _held_now(self, round_: int) -> tuple[int, int]:
        """Requests here in all, and by deliveries of that round; also those that nobody has looked at yet."""
        of_round = sum(1 for held in self._held.values() if held.lease.round == round_)
        return len(self._held) + self._unread.total(), of_round + self._unread[round_]

    async def _drain(self) -> None:
        """Stop taking; every row goes back to `requests` with the tokens it has; workers may forget it."""
        await self._intake.stop()
        unfinished = [held for held in self._held.values() if held.row.number in self._scheduler.rows]
        given_back = len(unfinished)
        await asyncio.gather(*(self._give_back(held) for held in unfinished))
        for decision in self._scheduler.abandon_all():
            await self._forget(decision)
        if self._finishing:  # while a result is not confirmed, its request must not go with the lease queue
            await asyncio.wait(self._finishing)
        await self._leases.close()
        emit(COORDINATOR_DRAINED, given_back=given_back)

    async def _give_back(self, held: Held) -> None:
        body = encode(held.row.checkpoint())
        await publish_declared(self._transport, self._topology.requests, body, persistent=True, priority=PRIORITY_BEGUN)
        await held.lease.settle()
