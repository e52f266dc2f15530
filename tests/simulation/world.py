"""One run of a scenario: real actors on a virtual clock, started again when they end, and what is left of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch

from mqinfer.coordinator import Coordinator, CoordinatorSession
from mqinfer.errors import Refused
from mqinfer.leases import slack
from mqinfer.queues import Topology
from mqinfer.settings import CoordinatorSettings, WorkerSettings
from mqinfer.stage_compute import StageCompute
from mqinfer.stage_inbox import OWN_PREFETCH
from mqinfer.stage_worker import IDLE_ROUND_S, StageWorker, WorkerSession
from simulation import faults
from simulation.actor import Actor
from simulation.job import Disk, SimTokenizer, batch_job
from simulation.link import SimTransport
from simulation.model import FIRST_TOKEN, VOCABULARY, SimEngine, SimModel, Truth, make_plan
from simulation.network import Network
from simulation.oracle import Oracle, Poison
from simulation.scenario import Job, Scenario
from simulation.virtual import PROCESS, Process, VirtualLoop

#: When everything is mended, all jobs are done within this: four looks of a stalled batch, leases, replays.
PATIENCE_S = 1200.0
#: On SIGTERM every actor has ended within this.
DRAIN_PATIENCE_S = 60.0
#: An idle actor has its session's loops and what they wait with; more tasks are left over from something.
MOST_IDLE_TASKS = 16
TICK_S = 0.5
#: For releases to reach their workers.
QUIET_S = 2.0


class World:
    """See the module's docstring."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.loop = VirtualLoop()
        self.random = Random(f"world {scenario.seed}")
        self.plan = make_plan(len(scenario.workers))
        self.topology = Topology(self.plan.name)
        heartbeat_s = scenario.weather.heartbeat_s
        detection_s = 3 * (heartbeat_s + 1) + scenario.step_timeout_s + 2 * scenario.weather.late_s
        self.oracle = Oracle(Truth(self.plan), self.loop.time, detection_s)
        self.network = Network(
            self.loop, self.random, scenario.weather, self.oracle.entered, self.oracle.complain, self._link_lost
        )
        self.actors: dict[str, list[Actor]] = {
            "worker": [
                self._worker(f"worker {stage}.{number}", stage, forward_s)
                for stage, speeds in enumerate(scenario.workers)
                for number, forward_s in enumerate(speeds)
            ],
            "coordinator": [Actor(f"coordinator {n}", self._coordinate) for n in range(scenario.coordinators)],
        }
        self.disks: list[Disk] = []
        self.asked: list[list[str]] = []
        self.actors["producer"] = [self._producer(number, job) for number, job in enumerate(scenario.jobs)]
        #: So many forwards to come will run out of memory.
        self.out_of_memory = 0
        self._moved = asyncio.Event()
        self.loop.set_exception_handler(self._unhandled)

    # -- the actors ------------------------------------------------------------------------------

    def _worker(self, name: str, stage: int, forward_s: float) -> Actor:
        scenario = self.scenario
        settings = WorkerSettings.model_construct(
            codec=scenario.codec, merge_tokens=1024, drain_s=scenario.drain_s, idle_s=scenario.idle_s, threads=0
        )

        async def run(actor: Actor) -> None:
            PROCESS.get().call_s = lambda work: forward_s * self.random.uniform(0.5, 1.5) if work == "run" else 0.0005
            actor.engine = SimEngine(
                SimModel(self.plan, stage, self.oracle.truth, self.oracle.complain),
                stage=stage,
                budget_tokens=scenario.budget_tokens,
                idle_s=scenario.idle_s,
                clock=self.loop.time,
                computing=lambda owners, rows: self._computing(actor, owners, rows),
                complain=self.oracle.complain,
            )
            compute = StageCompute(self.plan, stage, actor.engine, codec=scenario.codec, threads=0)
            await StageWorker(self.plan, stage, compute, settings, self.network.connect).run(actor.stop)

        return Actor(name, run)

    async def _coordinate(self, actor: Actor) -> None:
        scenario = self.scenario
        settings = CoordinatorSettings.model_construct(
            rows=scenario.rows,
            microbatch_rows=scenario.microbatch_rows,
            step_tokens=scenario.step_tokens,
            open_trips=scenario.open_trips,
            checkpoint_s=scenario.checkpoint_s,
            lease_s=scenario.lease_s,
            probe_s=scenario.probe_s,
            step_timeout_s=scenario.step_timeout_s,
        )
        await Coordinator(self.plan, SimTokenizer(), settings, self.network.connect).run(actor.stop)  # type: ignore[arg-type]

    def _producer(self, number: int, job: Job) -> Actor:
        disk, lines = Disk(), []
        first = sum(len(names) for names in self.asked)
        for at, prompt in enumerate(job.prompts):
            name = f"{number}-{at}"
            own = FIRST_TOKEN + (first + at) % (VOCABULARY - FIRST_TOKEN)
            tokens = (own, *(self.random.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(prompt.length - 1)))
            self.oracle.truth.add(name, tokens, prompt.max_tokens)
            if prompt.poison:
                self.oracle.poisons[name] = Poison(prompt.poison, prompt.poison_at)
            lines.append((name, tokens, prompt.max_tokens))
        self.disks.append(disk)
        self.asked.append([name for name, _, _ in lines])

        async def run(actor: Actor) -> None:
            PROCESS.get().call_s = lambda work: self.random.uniform(0, 0.2) if work == "append" else 0.0005
            batch = batch_job(disk, self.plan, lines, job.window, self._requests_lost)
            await batch.run(self.network.connect, actor.stop)
            actor.retired |= batch.finished

        return Actor(f"producer {number}", run)

    def _computing(self, actor: Actor, owners: Sequence[str], rows: Sequence[tuple[str, int]]) -> None:
        """A worker is about to compute these (request, end)."""
        self.oracle.computing(owners, [request for request, _ in rows])
        for request, end in rows:
            poison = self.oracle.poisons.get(request)
            if poison is not None and end > poison.at:
                if poison.what == "raises":
                    raise RuntimeError("poison")
                self.oracle.poison_kills[request] += 1
                actor.poisoned = True
                self.kill(actor)
                raise SystemExit
        if self.out_of_memory:
            self.out_of_memory -= 1
            self.oracle.deaths += len(rows) == 1  # alone it is blamed
            raise torch.OutOfMemoryError("injected")

    # -- their lives -----------------------------------------------------------------------------

    def start(self, actor: Actor) -> None:
        """Give it a process, unless it has one or is retired."""
        if actor.retired or actor.lives:
            return
        actor.stop = asyncio.Event()
        actor.poisoned = False
        actor.starts += 1
        process = actor.process = Process(self.loop, f"{actor.name} #{actor.starts}")
        process.on_death.append(lambda: self._start_again(actor))
        process.start(self._main(actor), lambda task: self._ended(actor, task))

    async def _main(self, actor: Actor) -> None:
        await actor.run(actor)

    def start_later(self, actor: Actor, delay_s: float) -> None:
        """After so long, unless it lives then."""
        self.loop.call_later(delay_s, self.start, actor, context=self.network.context)

    def kill(self, actor: Actor, after_callbacks: int = 0) -> None:
        """As SIGKILL."""
        if actor.process is not None:
            actor.process.kill(after_callbacks)

    def _ended(self, actor: Actor, task: asyncio.Task[Any]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Refused):
            self.oracle.complain(f"{actor.name} ended with {_told(error)}")
        self._start_again(actor)

    def _start_again(self, actor: Actor) -> None:
        self._moved.set()
        self.start_later(actor, self.random.uniform(0.1, 5))

    def actor_of(self, process: Process) -> Actor:
        """Whose process it is."""
        return next(a for actors in self.actors.values() for a in actors if process.name.startswith(f"{a.name} #"))

    def _link_lost(self, link: SimTransport) -> None:
        actor = self.actor_of(link.process)
        if actor in self.actors["worker"] and not actor.retired and not actor.poisoned:
            self.oracle.deaths += 1  # also one that drains: a row that it could not finish in time may be seen as lost
        if actor in self.actors["coordinator"]:
            self.oracle.coordinators_lost += not link.closed_in_order
            ready = [
                m.body
                for queue in self.network.broker.queues()
                if ".leases." in queue.spec.name
                for _, m in queue.ready
            ]
            self.oracle.leases_lost([*(delivery.body for delivery in link.server.unsettled), *ready])

    def _requests_lost(self) -> None:
        """A batch has found that nobody has its requests: only a queue that vanished may take them along."""
        self.oracle.counts["enqueued again"] += 1
        if not (
            self.scenario.weather.forgets_new_queues or any(f.kind == "delete queue" for f in self.scenario.faults)
        ):
            self.oracle.complain("requests or results vanished, and were enqueued again")

    def _unhandled(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.oracle.complain(f"unhandled: {context.get('message')} {_told(context.get('exception'))}")

    def name_of(self, request: str) -> str:
        """The custom_id of a request's id."""
        job, _, line = request.rpartition(".")
        number = next(number for number, disk in enumerate(self.disks) if job in disk.jobs)
        return self.asked[number][int(line) - 1]

    def adopt(self, session: CoordinatorSession | WorkerSession) -> None:
        """A session that an actor has begun."""
        self.actor_of(PROCESS.get()).session = session

    # -- one run ---------------------------------------------------------------------------------

    async def live(self) -> None:
        """From the first start to the last judgement."""
        for actor in (*self.actors["worker"], *self.actors["coordinator"]):
            self.start_later(actor, self.random.uniform(0, 2))
        for actor, job in zip(self.actors["producer"], self.scenario.jobs, strict=True):
            self.start_later(actor, job.starts_s)
            if job.cancelled_s is not None:
                self.at(job.cancelled_s, faults.cancel_job, actor)
        for fault in self.scenario.faults:
            self.at(fault.at_s, faults.do, fault)
        self._tick()
        await asyncio.sleep(self.scenario.healed_s)
        self.network.calm_weather()
        await self._until(lambda: all(a.retired for a in self.actors["producer"]), PATIENCE_S, "jobs are not done")
        await self._until(lambda: not self._work_left(), PATIENCE_S, "no end of work")
        if self._was_quiet():
            await asyncio.sleep(QUIET_S)
            self._judge_caches("at once")
        # A step that was given up may be computed until it expires; what that leaves is forgotten when idle.
        await asyncio.sleep(self.scenario.step_timeout_s + self.scenario.idle_s + 2 * IDLE_ROUND_S)
        self._judge_idle()
        actors = [*self.actors["coordinator"], *self.actors["worker"]]
        for actor in actors:
            actor.retired = True
            actor.stop.set()
        await self._until(lambda: not any(a.lives for a in actors), DRAIN_PATIENCE_S, "actors do not end")
        await asyncio.sleep(10)
        self._judge_end()

    def at(self, when_s: float, do: Callable[..., None], *arguments: object) -> None:
        """Have it done to this world then."""
        self.loop.call_at(when_s, do, self, *arguments, context=self.network.context)

    async def _until(self, holds: Callable[[], bool], patience_s: float, otherwise: str) -> None:
        try:
            async with asyncio.timeout(patience_s):
                while not holds():
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            self.oracle.complain(otherwise)

    # -- judgement -------------------------------------------------------------------------------

    @staticmethod
    def _held(actor: Actor) -> int:
        return len(actor.session._held) if isinstance(actor.session, CoordinatorSession) and actor.lives else 0

    def _work_left(self) -> bool:
        """Whether some request is held or waits: a copy of one that is answered, or of a job that was given up."""
        ready = any(q.ready for q in self.network.broker.queues() if q.spec.name != self.topology.dead.name)
        held = any(link.server.unsettled for link in self.network.links)  # also by links whose end nobody noticed yet
        return ready or held or any(self._held(actor) for actor in self.actors["coordinator"])

    def _tick(self) -> None:
        self._moved.set()
        self.network.tick()
        most = self.scenario.rows + slack(self.scenario.rows)
        for actor in self.actors["coordinator"]:
            if self._held(actor) > most:
                self.oracle.complain(f"{actor.name} holds {self._held(actor)} requests, {most} are allowed")
        for actor in self.actors["worker"]:
            if isinstance(actor.session, WorkerSession) and len(actor.session._inbox.own) > OWN_PREFETCH:
                self.oracle.complain(f"{actor.name} has more than {OWN_PREFETCH} steps at hand")
        self.loop.call_later(TICK_S, self._tick, context=self.network.context)

    def _judge_idle(self) -> None:
        self._judge_caches("when idle")
        for actors in self.actors.values():
            for actor in actors:
                tasks = [task for task in self.loop.tasks if task.process is actor.process and not task.done()]
                if actor.lives and len(tasks) > MOST_IDLE_TASKS:
                    self.oracle.complain(f"{actor.name} has {len(tasks)} tasks when idle")

    def _was_quiet(self) -> bool:
        """Whether nothing happened after which rows may be left on workers until they are idle."""
        weather = self.scenario.weather
        rough = weather.late or weather.reordered or weather.duplicated or self.oracle.overdue or self.oracle.poisons
        cancelled = any(job.cancelled_s is not None for job in self.scenario.jobs)
        return not (rough or cancelled or self.scenario.faults)

    def _judge_caches(self, when: str) -> None:
        for actor in self.actors["worker"]:
            if actor.lives and actor.engine is not None and len(actor.engine.cache):
                self.oracle.complain(f"{actor.name} still keeps {len(actor.engine.cache)} rows, {when}")

    def _judge_end(self) -> None:
        durable = {spec.name for spec in self.topology.shared(len(self.plan.stages))}
        for queue in self.network.broker.queues():
            name = queue.spec.name
            if name == self.topology.dead.name:
                self.oracle.judge_dead([message.body for _, message in queue.ready])
            elif queue.ready:
                self.oracle.complain(f"{len(queue.ready)} messages are left in {name}")
            elif name not in durable and queue.spec.expires_s is None and not self._is_cancelled(name):
                self.oracle.complain(f"the queue {name} is left")
        for names, disk, job in zip(self.asked, self.disks, self.scenario.jobs, strict=True):
            if job.cancelled_s is None:
                self.oracle.judge_rows(names, disk.rows)
        self.oracle.duplicates = self.network.duplicates
        self.oracle.judge_leases()
        self.oracle.judge_poison()

    def _is_cancelled(self, queue: str) -> bool:
        """Whether it has the results of a job that its owner gave up."""
        jobs = zip(self.scenario.jobs, self.disks, strict=True)
        return any(job.cancelled_s is not None and queue.rpartition(".")[2] in disk.jobs for job, disk in jobs)


def _told(error: BaseException | None) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_told(one) for one in error.exceptions)
    return repr(error)
