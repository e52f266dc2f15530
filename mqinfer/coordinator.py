"""The coordinator: leases requests, sends microbatches around the ring, publishes results. No torch here.

It does what its `Scheduler` decides; all that is here is queues, clocks and the order of publish and
settle. A session ends with its link; nothing of it outlives the link but what the broker keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

from mqinfer import __version__
from mqinfer.batching import Limits
from mqinfer.errors import RequestError, Unroutable, WireError
from mqinfer.leases import Intake, Lease, LeaseQueue
from mqinfer.link import Connect, bury, keep_linked, publish_declared
from mqinfer.messages import Ask, FinishReason, Probe, Report, Request, Result, StepDone
from mqinfer.observe import (
    COORDINATOR_DRAINED,
    REQUEST_ENDED,
    REQUEST_REFUSED,
    RESULT_UNCLAIMED,
    ROW_REPLAYED,
    WORKER_GONE,
    emit,
)
from mqinfer.plan import Plan
from mqinfer.queues import PRIORITY_BEGUN, Topology, new_id, results
from mqinfer.scheduler import Decision, Ended, Forget, LiveRow, Replayed, Scheduler, Send
from mqinfer.settings import CoordinatorSettings
from mqinfer.tokenizer import Tokenizer, find_stop
from mqinfer.transports.base import Delivery, Transport
from mqinfer.wire import MAX_STEP_BYTES, decode, encode

#: How often leases are looked over for those that are due.
LEASE_ROUND_S = 1.0


@dataclass(slots=True)
class Held:
    """A row and the lease on its request."""

    row: LiveRow
    lease: Lease
    kept_tokens: int


class Coordinator:
    """One coordinator process; any number of them share the `requests` queue."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, settings: CoordinatorSettings, connect: Connect) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._settings = settings
        self._connect = connect

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then give back what is not finished. Raises: Refused at the first link."""

        async def session(transport: Transport) -> None:
            await CoordinatorSession(self._plan, self._tokenizer, self._settings, transport).run(stop)

        await keep_linked("coordinator", self._connect, session, stop)


class CoordinatorSession:
    """What a coordinator is as long as its link holds."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, settings: CoordinatorSettings, transport: Transport) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._settings = settings
        self._transport = transport
        self._topology = Topology(plan.name)
        self.id = new_id("c")
        self._queue = self._topology.coordinator(self.id)
        self._scheduler = Scheduler(
            plan, self._queue.name, _limits(settings, plan), functools.partial(find_stop, tokenizer)
        )
        self._held: dict[int, Held] = {}
        self._ids: set[str] = set()
        self._inbox: asyncio.Queue[tuple[Delivery, int]] = asyncio.Queue()
        self._leases = LeaseQueue(transport, self._topology.leases(self.id))
        self._intake = Intake(
            transport,
            self._topology.requests.name,
            settings.rows,
            lambda d, round_: self._inbox.put_nowait((d, round_)),
        )
        self._counts = {"results": 0, "failures": 0, "output_tokens": 0, "replays": 0, "replayed_tokens": 0}
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
        await self._tune()

    # -- what comes in -------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            delivery, round_ = await self._inbox.get()
            try:
                message = decode(delivery.body)
            except WireError as error:
                await bury(self._transport, self._topology.dead, delivery, str(error))
                continue
            match message:
                case Request():
                    await self._admit(message, delivery, round_)
                case StepDone():
                    await delivery.ack()
                    self._perform(self._scheduler.done(message, time.monotonic()))
                case Ask():
                    await delivery.ack()
                    self._tasks.create_task(self._report(message))
                case Probe():
                    await delivery.ack()
                case _:
                    await bury(self._transport, self._topology.dead, delivery, f"a {type(message).__name__} here")

    async def _admit(self, request: Request, delivery: Delivery, round_: int) -> None:
        if request.id in self._ids:  # a repeat: the first delivery holds the lease
            await delivery.ack()
            return
        lease = Lease(delivery, round_, time.monotonic())
        try:
            check_request(request, self._plan)
        except RequestError as error:
            await self._refuse(request, lease, str(error))
            return
        self._ids.add(request.id)
        row = self._scheduler.add(request)
        self._held[row.number] = Held(row, lease, len(request.output))
        self._perform(self._scheduler.form(time.monotonic()))

    async def _refuse(self, request: Request, lease: Lease, why: str) -> None:
        emit(REQUEST_REFUSED, request=request.id, error=why)
        failure = Result(
            id=request.id,
            job=request.job,
            tag=request.tag,
            finish_reason=FinishReason.ERROR,
            prompt_tokens=len(request.prompt),
            error_code="request",
            error=why,
        )
        await self._publish_result(failure)
        await lease.settle()

    async def _report(self, ask: Ask) -> None:
        live = self._scheduler.microbatches
        report = Report(
            role="coordinator",
            id=self.id,
            host=socket.gethostname(),
            stage=-1,
            clock_s=time.monotonic(),
            values={
                "rows": len(self._scheduler.rows),
                "waiting": len(self._scheduler.waiting),
                "microbatches": len(live),
                **self._counts,
            },
            facts={"version": __version__, "plan": self._plan.digest},
        )
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
                    self._tasks.create_task(self._finish(decision))
                case Replayed():
                    self._counts["replays"] += 1
                    self._counts["replayed_tokens"] += decision.lost_tokens
                    emit(
                        ROW_REPLAYED,
                        request=decision.row.request.id,
                        reason=decision.reason.value,
                        detail=decision.detail,
                        lost_tokens=decision.lost_tokens,
                    )

    async def _send(self, send: Send) -> None:
        body = encode(send.step)
        if send.queue is None:
            ttl_s = self._settings.step_timeout_s
            await publish_declared(self._transport, self._topology.stage(0), body, ttl_s=ttl_s)
            return
        try:
            await self._transport.publish(send.queue, body)
        except Unroutable:
            self._perform(self._scheduler.unsent(send.step.microbatch, send.queue, time.monotonic()))

    async def _forget(self, forget: Forget) -> None:
        with contextlib.suppress(Unroutable):
            await self._transport.publish(forget.queue, encode(forget.release))

    async def _finish(self, ended: Ended) -> None:
        held = self._held[ended.row.number]
        await self._publish_result(self._result(ended))
        await held.lease.settle()
        del self._held[ended.row.number]
        self._ids.discard(ended.row.request.id)
        await self._tune()

    async def _publish_result(self, result: Result) -> None:
        body = encode(result)
        try:
            await self._transport.publish(results(result.job).name, body, persistent=True)
        except Unroutable:  # the job was deleted while it ran
            emit(RESULT_UNCLAIMED, request=result.id, job=result.job)
            reason = {"reason": f"the results queue of job {result.job} is gone"}
            await publish_declared(self._transport, self._topology.dead, body, persistent=True, headers=reason)
        failed = result.finish_reason is FinishReason.ERROR
        self._counts["failures" if failed else "results"] += 1
        self._counts["output_tokens"] += len(result.output)
        emit(
            REQUEST_ENDED,
            request=result.id,
            finish_reason=result.finish_reason.value,
            prompt_tokens=result.prompt_tokens,
            output_tokens=len(result.output),
        )

    def _result(self, ended: Ended) -> Result:
        request, output = ended.row.request, ended.row.output
        text = ended.text if ended.text is not None else self._tokenizer.decode(output)
        return Result(
            id=request.id,
            job=request.job,
            tag=request.tag,
            finish_reason=ended.reason,
            prompt_tokens=len(request.prompt),
            output=tuple(output),
            text=text,
            logprobs=tuple(ended.row.logprobs),
            error_code=ended.error_code,
            error=ended.error,
        )

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
                    emit(WORKER_GONE, queue=queue)
                    self._perform(self._scheduler.gone(queue, time.monotonic()))
            for stage in range(len(self._plan.stages)):
                state = await self._transport.inspect(self._topology.stage(stage).name)
                self._scheduler.consumers[stage] = state.consumers if state else 0
            self._perform(self._scheduler.overdue(time.monotonic(), self._settings.step_timeout_s))
            self._perform(self._scheduler.form(time.monotonic()))

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_ROUND_S)
            due = [held for held in self._held.values() if self._due(held, time.monotonic())]
            if not due:
                continue
            await self._intake.pause()
            await asyncio.gather(*(self._renew(held) for held in due))
            await self._tune()

    def _due(self, held: Held, now_s: float) -> bool:
        age_s = now_s - held.lease.renewed_at_s
        grown = len(held.row.output) > held.kept_tokens
        return held.row.number in self._scheduler.rows and (
            age_s >= self._settings.lease_s or (grown and age_s >= self._settings.checkpoint_s)
        )

    async def _renew(self, held: Held) -> None:
        request = held.row.checkpoint()
        if await self._leases.renew(held.lease, request, time.monotonic()):
            held.kept_tokens = len(request.output)

    async def _tune(self) -> None:
        of_round = sum(1 for held in self._held.values() if held.lease.round == self._intake.round)
        await self._intake.tune(len(self._held), of_round)

    async def _drain(self) -> None:
        """Stop taking; every row goes back to `requests` with the tokens it has; workers may forget it."""
        await self._intake.stop()
        unfinished = [held for held in self._held.values() if held.row.number in self._scheduler.rows]
        given_back = len(unfinished)
        await asyncio.gather(*(self._give_back(held) for held in unfinished))
        for decision in self._scheduler.abandon_all():
            await self._forget(decision)
        await self._leases.close()
        emit(COORDINATOR_DRAINED, given_back=given_back)

    async def _give_back(self, held: Held) -> None:
        body = encode(held.row.checkpoint())
        await publish_declared(self._transport, self._topology.requests, body, persistent=True, priority=PRIORITY_BEGUN)
        await held.lease.settle()


def check_request(request: Request, plan: Plan) -> None:
    """Raises: RequestError where computing the request under this plan can't be right."""
    if request.plan != plan.digest:
        raise RequestError(
            f"the request was made for plan {request.plan}, this pipeline runs {plan.digest}: "
            "use the plan file that the fleet was started with"
        )
    if not request.prompt:
        raise RequestError("the prompt has no tokens")
    if len(request.prompt) + 1 > plan.context_tokens:
        raise RequestError(f"the prompt has {len(request.prompt)} tokens, the model takes {plan.context_tokens}")
    if request.max_tokens <= len(request.output):
        raise RequestError("max_tokens must be at least 1")
    if not all(0 <= token < plan.vocab_size for token in (*request.prompt, *request.output)):
        raise RequestError("a token id is outside the model's vocabulary")


def _limits(settings: CoordinatorSettings, plan: Plan) -> Limits:
    position_bytes = plan.hidden_size * 4  # what the widest codec makes of one position
    return Limits(
        microbatch_rows=settings.microbatch_rows,
        rows=settings.rows,
        step_tokens=max(1, min(settings.step_tokens, MAX_STEP_BYTES // position_bytes)),
        open_trips=settings.open_trips,
    )
