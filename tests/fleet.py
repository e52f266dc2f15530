"""Actors around fake engines, in tasks of the test, to be stopped or killed as processes are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fakes import FakeEngine, FakeTokenizer

from mqinfer.coordinator import Coordinator
from mqinfer.plan import Plan
from mqinfer.queues import Topology
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

    def coordinator(self, **settings: object) -> Actor:
        actor = Actor(self.url)
        options = load(CoordinatorSettings, **(QUICK | settings))
        actor.start(Coordinator(self.plan, FakeTokenizer(), options, actor.connect).run)  # type: ignore[arg-type]
        self.actors.append(actor)
        return actor

    def worker(
        self, stage: int, *, drain_s: float = 5.0, instance: str = "", plan: Plan | None = None, **fake: object
    ) -> Actor:
        actor = Actor(self.url)
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


async def until(condition: Callable[[], bool]) -> None:
    """Look until it is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)
