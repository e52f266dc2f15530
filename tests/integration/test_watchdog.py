"""Workers and coordinators under systemd's eyes: one that is stuck is not fed, one that idles or waits is."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from fakes import FakeEngine, FakeTokenizer, make_plan

from mqinfer.coordinator import Coordinator
from mqinfer.errors import Refused
from mqinfer.messages import Request
from mqinfer.observe import ACTOR_STALLED, add_sink
from mqinfer.plan import Plan
from mqinfer.producer import Producer
from mqinfer.queues import Topology, new_id
from mqinfer.settings import CoordinatorSettings, WorkerSettings, load
from mqinfer.stage_compute import StageCompute
from mqinfer.stage_worker import StageWorker
from mqinfer.systemd import kept_informed
from mqinfer.transports import memory, open_transport
from mqinfer.transports.base import Transport

PATIENCE_S = 20.0


class Systemd:
    """The receiving end of NOTIFY_SOCKET, with a watchdog that wants to be fed every 50 ms."""

    def __init__(self, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "100000", "WATCHDOG_PID": str(os.getpid())}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        lines: list[str] = []
        with suppress(BlockingIOError):
            while True:
                lines += self._socket.recv(65536).decode().splitlines()
        return lines

    async def until(self, said: str, times: int = 1) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while times > 0:
                times -= self.heard().count(said)
                await asyncio.sleep(0.001)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    found = Systemd(tmp_path / "notify")
    yield found
    found.close()


@pytest.fixture
def stalled() -> Iterator[asyncio.Event]:
    """Set when somebody is told to be stuck."""
    found = asyncio.Event()
    forget = add_sink(lambda event, _: found.set() if event == ACTOR_STALLED else None)
    yield found
    forget()


@pytest.fixture
def plan() -> Plan:
    return make_plan(new_id("watched"), stages=1)


class Broker:
    """A memory broker that can be out of reach."""

    def __init__(self, plan: Plan) -> None:
        self.name = plan.name
        self.away = False

    async def connect(self) -> Transport:
        if self.away:
            raise Refused("nothing listens")
        return await open_transport(f"memory://{self.name}")


@asynccontextmanager
async def worker(systemd: Systemd, plan: Plan, broker: Broker, engine: FakeEngine) -> AsyncIterator[asyncio.Event]:
    """A worker as the command runs it; what it gives makes it leave."""
    stop = asyncio.Event()
    compute = StageCompute(plan, 0, engine, codec="lossless", threads=1)  # type: ignore[arg-type]
    serving = StageWorker(plan, 0, compute, load(WorkerSettings, drain_s=0), broker.connect)

    async def command() -> None:
        async with kept_informed(serving.pulse, stop, systemd.environment):
            await serving.run(stop)

    task = asyncio.ensure_future(command())
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(task, PATIENCE_S)


async def ask(broker: Broker, plan: Plan) -> None:
    """Enqueue one request."""
    producer = Producer(await broker.connect(), Topology(plan.name), "job")
    await producer.open()
    await producer.submit([Request(id="job.1", job="job", plan=plan.digest, prompt=(5, 6), max_tokens=2)])


async def test_a_worker_is_ready_when_it_serves_is_fed_while_idle_and_says_when_it_leaves(
    systemd: Systemd, plan: Plan
) -> None:
    async with worker(systemd, plan, Broker(plan), FakeEngine(plan, 0)) as stop:
        await systemd.until("READY=1")
        await systemd.until("WATCHDOG=1", 3)
        stop.set()
        await systemd.until("STOPPING=1")


async def test_a_forward_that_hangs_is_not_fed_and_one_that_goes_on_is(
    systemd: Systemd, plan: Plan, stalled: asyncio.Event
) -> None:
    broker, hung, free = Broker(plan), threading.Event(), threading.Event()

    def hang(_: object) -> None:
        hung.set()
        assert free.wait(PATIENCE_S)

    coordinator = Coordinator(plan, FakeTokenizer(), load(CoordinatorSettings), broker.connect)  # type: ignore[arg-type]
    leave = asyncio.Event()
    coordinating = asyncio.ensure_future(coordinator.run(leave))
    async with worker(systemd, plan, broker, FakeEngine(plan, 0, before=hang)):
        try:
            await systemd.until("READY=1")
            await ask(broker, plan)
            assert await asyncio.to_thread(hung.wait, PATIENCE_S)
            await asyncio.wait_for(stalled.wait(), PATIENCE_S)
            await systemd.until("STATUS=stuck: the compute thread does not answer")
            assert "WATCHDOG=1" not in systemd.heard()
        finally:
            free.set()
        await systemd.until("WATCHDOG=1", 2)
    leave.set()
    await asyncio.wait_for(coordinating, PATIENCE_S)


async def test_a_worker_that_waits_for_a_lost_broker_is_fed(systemd: Systemd, plan: Plan) -> None:
    broker = Broker(plan)
    async with worker(systemd, plan, broker, FakeEngine(plan, 0)):
        await systemd.until("READY=1")
        broker.away = True
        memory.drop(broker.name)
        await systemd.until("STATUS=waits for the broker: the broker was dropped")
        await systemd.until("WATCHDOG=1", 3)
        broker.away = False
        await systemd.until("READY=1")


async def test_a_coordinator_is_ready_fed_and_says_when_it_leaves(systemd: Systemd, plan: Plan) -> None:
    stop = asyncio.Event()
    coordinator = Coordinator(plan, FakeTokenizer(), load(CoordinatorSettings), Broker(plan).connect)  # type: ignore[arg-type]

    async def command() -> None:
        async with kept_informed(partial(asyncio.sleep, 0), stop, systemd.environment):
            await coordinator.run(stop)

    task = asyncio.ensure_future(command())
    await systemd.until("READY=1")
    await systemd.until("WATCHDOG=1", 3)
    stop.set()
    await systemd.until("STOPPING=1")
    await asyncio.wait_for(task, PATIENCE_S)
