"""The stage worker: take -> unpack -> compute -> pack -> publish, confirmed -> ack. Stateless but for a cache.

The event loop moves messages, one compute thread does all that needs the device. While a forward runs, the last one's
output is being published and the next one's input arrives: a stage with work waiting is never idle.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from mqinfer.errors import ComputeError, PlanMismatch, WireError
from mqinfer.link import Connect, bury, keep_linked, now_s
from mqinfer.messages import Ask, MissReason, Pause, Probe, Release, Step, StepTaken
from mqinfer.observe import WORKER_DRAINED, emit
from mqinfer.paused import BY_HAND, Leave
from mqinfer.plan import Plan
from mqinfer.queues import Topology, new_id
from mqinfer.reports import link_values, make_report
from mqinfer.settings import WorkerSettings
from mqinfer.stage_compute import Outgoing, StageCompute
from mqinfer.stage_counts import StageCounts
from mqinfer.stage_inbox import Arrived, StageInbox, Taken, forwards
from mqinfer.stage_outbox import StageOutbox
from mqinfer.transports.base import Delivery, Transport
from mqinfer.verdicts import DEAD_LETTERS
from mqinfer.wire import MAX_STEP_BYTES, decode, encode

#: Forwards whose outputs may still be on their way out when the next one ends.
PUBLISHING = 2
#: How long a worker that met another plan keeps away from the shared queue.
PLAN_PAUSE_S = 30.0
#: After so many steps in a row of which every row failed to compute, the worker ends.
MOST_FAILED_STEPS = 12
#: How often rows whose coordinator is gone are looked for.
IDLE_ROUND_S = 5.0

T = TypeVar("T")


class StageWorker:
    """One consumer of one stage; any number of them share the stage's queue."""

    def __init__(
        self, plan: Plan, stage: int, compute: StageCompute, settings: WorkerSettings, connect: Connect
    ) -> None:
        self.stage = stage
        #: What it computes on and with; for metrics, so nothing that is another one at every start.
        self.facts = compute.facts
        self._plan = plan
        self._compute = compute
        self._settings = settings
        self._connect = connect
        self._thread: ThreadPoolExecutor | None = None
        #: What it would report just now; nothing while it has no link. May be asked from any thread.
        self.values: Callable[[], Mapping[str, float]] = dict
        self._leave = Leave()

    @property
    def left(self) -> str:
        """Why it left its device, once `run` has returned; "": it has been stopped."""
        return self._leave.reason

    def leave(self, reason: str) -> None:
        """Drain and return from `run`."""
        self._leave.pause(reason)

    async def pulse(self) -> None:
        """Returns when the compute thread is free for a moment: not while a forward hangs. Idle, that is at once."""
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, int)

    async def run(self, stop: asyncio.Event, *, called: bool = False) -> None:
        """Work until `stop` is set or it is to pause, then drain. `called`: see Leave. Raises: Refused at first."""
        with ThreadPoolExecutor(1, thread_name_prefix=f"stage-{self.stage}") as thread:
            self._thread = thread
            await asyncio.get_running_loop().run_in_executor(thread, self._compute.prepare_thread)

            async def session(transport: Transport) -> None:
                begun = WorkerSession(
                    self._plan, self.stage, self._compute, self._settings, transport, thread, self._leave, self.facts
                )
                self.values = begun.values
                try:
                    await begun.run(self._leave.asked)
                finally:
                    self.values = dict

            async with self._leave.watching(stop, self._settings, called=called):
                await keep_linked(f"worker of stage {self.stage}", self._connect, session, self._leave.asked)


class WorkerSession:
    """What a worker is as long as its link holds."""

    def __init__(
        self,
        plan: Plan,
        stage: int,
        compute: StageCompute,
        settings: WorkerSettings,
        transport: Transport,
        thread: ThreadPoolExecutor,
        leave: Leave,
        facts: Mapping[str, str],
    ) -> None:
        self._plan = plan
        self._stage = stage
        self._compute = compute
        self._settings = settings
        self._transport = transport
        self._thread = thread
        self._leave = leave
        self._facts = {**facts, "instance": settings.instance, "process": str(os.getpid())}
        self._topology = Topology(plan.name)
        self.id = new_id(f"s{stage}")
        self._queue = self._topology.worker(self.id)
        self._inbox = StageInbox(transport, self._queue, self._topology.stage(stage))
        self._publishing = asyncio.Semaphore(PUBLISHING)
        self._closing = False
        self._failed_in_a_row = 0
        self._counts = StageCounts(stage)
        self._outbox = StageOutbox(transport, self._topology, stage, self._counts)
        self._tasks: asyncio.TaskGroup

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set (then drained) or the link is lost. Raises: TransportError (in a group)."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._open()
                background = [
                    self._tasks.create_task(loop)
                    for loop in (self._transport.closed(), self._forget_idle(), self._wake_when(stop))
                ]
                await self._work_until(stop.is_set)
                await self._drain()
                for task in background:
                    task.cancel()
        finally:
            await self._in_thread(self._compute.engine.forget_all)

    async def _open(self) -> None:
        for spec in self._topology.shared(len(self._plan.stages)):
            await self._transport.declare(spec)
        await self._inbox.open(self._tasks)

    # -- taking --------------------------------------------------------------------------------

    async def _work_until(self, enough: Callable[[], bool]) -> None:
        while not enough():
            self._inbox.arrived.clear()
            taken = await self._take()
            for group in forwards(taken, self._counts.worth_tokens()):
                await self._run(group)
            if not (taken or self._inbox.own or self._inbox.shared or enough()):
                await self._inbox.arrived.wait()

    async def _take(self) -> list[Taken]:
        """The steps of the next forward: all that wait here already, then a new microbatch if there is room."""
        taken: list[Taken] = []
        tokens = 0
        while self._inbox.own and tokens < self._settings.merge_tokens:
            item = await self._read(*self._inbox.own.popleft())
            if item is not None:
                taken.append(item)
                tokens += sum(row.count for row in item.step.rows)
        if self._inbox.shared and tokens < self._settings.merge_tokens:
            item = await self._read(*self._inbox.shared.popleft())
            if item is not None and await self._accept(item):
                taken.append(item)
        return taken

    async def _read(self, delivery: Delivery, arrived_s: float) -> Taken | None:
        """The step in the delivery; everything else is dealt with here."""
        try:
            message = decode(delivery.body, limit_bytes=2 * MAX_STEP_BYTES)
            if not isinstance(message, Probe | Ask | Pause | Release | Step):
                raise WireError(f"a {type(message).__name__} is not for a worker")
            if isinstance(message, Step):
                await self._check(message)
                return Taken(message, delivery, arrived_s)
        except DEAD_LETTERS as error:
            await self._bury(delivery, str(error))
            return None
        if isinstance(message, Release):
            await self._in_thread(self._compute.engine.forget, message.owner, message.rows)
        elif isinstance(message, Ask):
            self._tasks.create_task(self._report(message))
        elif isinstance(message, Pause) and message.paused:
            self._leave.pause(BY_HAND)
        await delivery.ack()
        return None

    async def _check(self, step: Step) -> None:
        if step.plan != self._plan.digest:
            await self._outbox.give_up(step, MissReason.PLAN, f"a worker of plan {self._plan.digest}")
            # Of another plan, they or we: keep from swallowing what a worker of the right one could do.
            until_s = now_s() + PLAN_PAUSE_S
            await self._inbox.stop_until(lambda: now_s() > until_s)
            raise PlanMismatch(f"made for plan {step.plan}, this worker serves {self._plan.digest}")
        if step.stage != self._stage or len(step.route) < self._stage:
            raise WireError(f"a step for stage {step.stage} with a route of {len(step.route)} at stage {self._stage}")

    async def _accept(self, taken: Taken) -> bool:
        """Whether a new microbatch is to be computed here now; if not, it has been dealt with."""
        if await self._told_lost(taken):
            return False
        if self._has_room(taken.step):
            return True
        await self._inbox.stop_until(lambda: self._has_room(taken.step))
        await self._inbox.put_back(taken.delivery, ttl_s=taken.step.ttl_s)
        return False

    async def _told_lost(self, taken: Taken) -> bool:
        """If a worker died with this new microbatch, tell its owner, who counts that; whether it is settled thus."""
        if taken.delivery.redelivered:
            await self._outbox.give_up(taken.step, MissReason.LOST, "its worker died")
            await taken.delivery.ack()
        return taken.delivery.redelivered

    async def _tell_taken(self, step: Step, *, passed: bool = False) -> None:
        """Before it is computed: a stage's only worker that dies of it has no peer who would see it redelivered."""
        me = self._queue.name
        told = StepTaken(plan=step.plan, microbatch=step.microbatch, number=step.number, worker=me, passed=passed)
        await self._outbox.to_owner(step.owner, encode(told))

    def _has_room(self, step: Step) -> bool:
        """An empty worker takes anything: what does not fit it then never will, and its owner is told."""
        return self._compute.is_empty or self._compute.fits(step.rows)

    # -- computing and publishing --------------------------------------------------------------

    async def _run(self, taken: Sequence[Taken]) -> None:
        if taken[0].step.alone:
            await self._run_alone(taken[0])
            return
        for item in taken:
            if len(item.step.route) == self._stage:  # on its first trip
                await self._tell_taken(item.step)
        outgoing = await self._compute_steps(taken)
        await self._publishing.acquire()
        self._tasks.create_task(self._publish(taken, outgoing))

    async def _run_alone(self, item: Taken) -> None:
        """A suspect: its owner knows just when it is computed, and nothing else is or has yet to be published then."""
        for _ in range(PUBLISHING):
            await self._publishing.acquire()
        await self._tell_taken(item.step)
        outgoing = await self._compute_steps([item])
        await self._publish([item], outgoing)
        for _ in range(PUBLISHING - 1):
            self._publishing.release()
        await self._tell_taken(item.step, passed=True)

    async def _compute_steps(self, taken: Sequence[Taken]) -> list[Outgoing]:
        began_s = now_s()
        steps = [item.step for item in taken]
        outgoing = await self._in_thread(
            self._compute.run, steps, self._queue.name, self._closing, self._counts.speed()
        )
        self._counts.computed(taken, outgoing, began_s, now_s())
        return outgoing

    async def _publish(self, taken: Sequence[Taken], outgoing: Sequence[Outgoing]) -> None:
        try:
            for item, out in zip(taken, outgoing, strict=True):
                self._counts.missed(out.misses)
                if out.ends:
                    await self._outbox.to_owner(item.step.owner, out.body)
                else:
                    began_s = now_s()
                    await self._outbox.to_next(item.step, out)
                    self._compute.published(out, now_s() - began_s)
                if out.unreadable:
                    await self._bury(item.delivery, out.unreadable)
                else:
                    await item.delivery.ack()
        finally:
            self._publishing.release()
        self._check_health(outgoing)

    def _check_health(self, outgoing: Sequence[Outgoing]) -> None:
        """A device that fails at everything must not go on drawing work to itself."""
        for out in outgoing:
            failed = any(miss.reason in (MissReason.COMPUTE, MissReason.MEMORY) for miss in out.misses)
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed and not out.computed else 0
        if self._failed_in_a_row >= MOST_FAILED_STEPS:
            raise ComputeError(f"{self._failed_in_a_row} steps in a row failed here: is the device all right?")

    async def _bury(self, delivery: Delivery, reason: str) -> None:
        await bury(self._transport, self._topology.dead, delivery, reason)
        self._counts.values["dead_letters"] += 1

    # -- the rest ------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Take nothing new, serve the rows that are cached here for a while, give back the rest."""
        self._closing = True
        await self._inbox.close()
        await self._give_back(self._inbox.shared)
        deadline_s = now_s() + self._leave.drain_s(self._settings.drain_s)
        alarm = asyncio.get_running_loop().call_at(deadline_s, self._inbox.arrived.set)
        await self._work_until(lambda: now_s() >= deadline_s or (self._compute.is_empty and not self._inbox.own))
        alarm.cancel()
        emit(WORKER_DRAINED, given_back=await self._give_back(self._inbox.own))

    async def _give_back(self, inbox: deque[Arrived]) -> int:
        """Microbatches on their first trip are put back, others end theirs here; how many rows that were."""
        rows = 0
        while inbox:
            taken = await self._read(*inbox.popleft())
            if taken is None:
                continue
            rows += len(taken.step.rows)
            if inbox is self._inbox.shared:
                if not await self._told_lost(taken):
                    await self._inbox.put_back(taken.delivery, ttl_s=taken.step.ttl_s)
            else:
                await self._outbox.give_up(replace(taken.step, closing=True), MissReason.GONE, "the worker leaves")
                await taken.delivery.ack()
        return rows

    async def _forget_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_ROUND_S)
            if await self._in_thread(self._compute.engine.forget_idle):
                self._inbox.arrived.set()

    async def _wake_when(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._inbox.arrived.set()

    def values(self) -> dict[str, float]:
        """See StageWorker.values."""
        return self._counts.now(self._compute.engine, self._inbox) | link_values(self._transport)

    async def _report(self, ask: Ask) -> None:
        report = make_report("worker", self.id, self._plan, self.values(), self._facts, stage=self._stage)
        await self._outbox.to_owner(ask.reply_to, encode(report))

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
