"""Actors around fake engines, in tasks of the test, to be stopped or killed as processes are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fakes import FakeEngine, FakeTokenizer, continuation

from mqinfer.coordinator import Coordinator
from mqinfer.coordinator_counts import Trace, untraced
from mqinfer.messages import FinishReason, Request, Result
from mqinfer.plan import Plan
from mqinfer.producer import Producer
from mqinfer.queues import Topology, new_id
from mqinfer.settings import CoordinatorSettings, WorkerSettings, load
from mqinfer.stage_compute import StageCompute
from mqinfer.stage_worker import StageWorker
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

#: Long enough for a broken link to be noticed, far below the test's own time limit.
PATIENCE_S = 60.0

QUICK: dict[str, object] = {"probe_s": 0.1, "checkpoint_s": 1.0, "step_timeout_s": 20.0, "rows": 32}


class Actor:
    """An actor running in a task, with the links that it opened, so that it can be killed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._links: list[Transport] = []
        self._stop = asyncio.Event()
        self.task: asyncio.Task[None]
        self.engine: FakeEngine | None = None

    async def connect(self) -> Transport:
        transport = await open_transport(self._url)
        self._links.append(transport)
        return transport

    def start(self, run: Callable[[asyncio.Event], object]) -> None:
        self.task = asyncio.ensure_future(run(self._stop))  # type: ignore[call-overload]

    async def stop(self) -> None:
        """As SIGTERM does."""
        self._stop.set()
        await asyncio.wait_for(self.task, PATIENCE_S)

    async def kill(self) -> None:
        """As SIGKILL does: its links end at once, nothing is said or given back."""
        self.task.cancel()
        _, stuck = await asyncio.wait({self.task}, timeout=PATIENCE_S / 4)
        if stuck:
            for task in asyncio.all_tasks():
                task.print_stack()
            raise AssertionError("an actor that was cancelled goes on")
        for link in self._links:
            await link.close()


class Fleet:
    """A pipeline of fake engines."""

    def __init__(self, url: str, plan: Plan) -> None:
        self.url = url
        self.plan = plan
        self.actors: list[Actor] = []

    def coordinator(self, *, url: str | None = None, trace: Trace = untraced, **settings: object) -> Actor:
        actor = Actor(url or self.url)
        options = load(CoordinatorSettings, **(QUICK | settings))
        coordinator = Coordinator(self.plan, FakeTokenizer(), options, actor.connect, trace)  # type: ignore[arg-type]
        actor.start(coordinator.run)
        self.actors.append(actor)
        return actor

    def worker(
        self,
        stage: int,
        *,
        drain_s: float = 5.0,
        instance: str = "",
        plan: Plan | None = None,
        url: str | None = None,
        **fake: object,
    ) -> Actor:
        actor = Actor(url or self.url)
        plan = plan or self.plan
        actor.engine = FakeEngine(plan, stage, **fake)  # type: ignore[arg-type]
        options = load(WorkerSettings, drain_s=drain_s, instance=instance)
        compute = StageCompute(plan, stage, actor.engine, codec="lossless", threads=1)  # type: ignore[arg-type]
        actor.start(StageWorker(plan, stage, compute, options, actor.connect).run)
        self.actors.append(actor)
        return actor

    async def close(self) -> None:
        """Kill all and remove the queues."""
        for actor in self.actors:
            await actor.kill()
        transport = await open_transport(self.url)
        for spec in Topology(self.plan.name).shared(len(self.plan.stages)):
            await transport.delete(spec.name)
        await transport.close()


class Job:
    """A job whose results are checked as they come."""

    def __init__(self, fleet: Fleet, transport: Transport) -> None:
        self.name = new_id("job")
        self._fleet = fleet
        self.transport = transport
        self._producer = Producer(transport, Topology(fleet.plan.name), self.name)
        self.results: dict[str, Result] = {}
        self.repeats = 0
        self._asked: dict[str, Request] = {}

    async def ask(self, count: int, *, first: int = 0, prompt: int = 9, max_tokens: int = 6, **more: object) -> None:
        await self._producer.open()
        requests = [
            Request(
                id=f"{self.name}.{i}",
                job=self.name,
                plan=self._fleet.plan.digest,
                prompt=tuple(3 + (7 * i + k) % 500 for k in range(1 + (prompt + i) % (2 * prompt))),
                max_tokens=1 + (max_tokens + i) % (2 * max_tokens),
                **more,  # type: ignore[arg-type]
            )
            for i in range(first, first + count)
        ]
        self._asked.update({request.id: request for request in requests})
        await self._producer.submit(requests)

    async def gather(self, count: int | None = None) -> None:
        """Until so many results have come."""
        wanted = len(self._asked) if count is None else count
        if not self.results:
            await self._producer.listen(prefetch=100)
        async with asyncio.timeout(PATIENCE_S):
            arrivals = self._producer.arrivals()
            while len(self.results) < wanted:
                for message, delivery in await anext(arrivals):
                    assert isinstance(message, Result)
                    self.repeats += message.id in self.results
                    self.results[message.id] = message
                    await delivery.ack()

    def check(self) -> None:
        """Every result is the fault-free one."""
        for name, request in self._asked.items():
            result = self.results[name]
            assert result.finish_reason is FinishReason.LENGTH, result.error
            assert list(result.output) == continuation(self._fleet.plan, request.prompt, request.max_tokens)

    def failures(self) -> dict[str, Result]:
        return {name: result for name, result in self.results.items() if result.finish_reason is FinishReason.ERROR}


async def until(condition: Callable[[], bool]) -> None:
    """Look until it is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)
