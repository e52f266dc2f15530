"""A hop through RabbitMQ, twice: over mqinfer's transport and over bare aio-pika, driven alike.

A hop is publish (mandatory, transient), confirm, deliver, ack; two connections, one for each direction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from benchmarks.rabbit import tree_cpu_s
from mqinfer.queues import Topology, new_id
from mqinfer.transports import open_transport

#: Messages that are published and not yet acked, as a few microbatches are between two stages.
IN_FLIGHT = 8
PREFETCH = 2 * IN_FLIGHT


class Arrived(Protocol):
    """A message in our hands."""

    @property
    def body(self) -> bytes: ...

    async def ack(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Link:
    """Both ends of a queue."""

    #: Returns when the broker has confirmed.
    publish: Callable[[bytes], Awaitable[object]]
    #: What was delivered, with the time (of perf_counter) at which it was.
    inbox: asyncio.Queue[tuple[float, Arrived]]


#: Opens a link at a broker's URL, with a queue of its own.
Open = Callable[[str], AbstractAsyncContextManager[Link]]


@dataclass(frozen=True, slots=True)
class Hops:
    """What messages have cost, each of them."""

    python_s: float
    broker_s: float
    elapsed_s: float


@asynccontextmanager
async def mqinfer_link(url: str) -> AsyncIterator[Link]:
    """Over the transport that every actor uses; the queue is a stage's."""
    inbox: asyncio.Queue[tuple[float, Arrived]] = asyncio.Queue()
    spec = Topology(new_id("bench")).stage(0)
    transport = await open_transport(url, name="bench")
    try:
        await transport.declare(spec)
        subscription = await transport.consume(
            spec.name, prefetch=PREFETCH, sink=lambda delivery: inbox.put_nowait((time.perf_counter(), delivery))
        )
        yield Link(lambda body: transport.publish(spec.name, body), inbox)
        await subscription.cancel()
        await transport.delete(spec.name)
    finally:
        await transport.close()


@asynccontextmanager
async def aio_pika_link(url: str) -> AsyncIterator[Link]:
    """The client library as its documentation uses it, with nothing around it."""
    inbox: asyncio.Queue[tuple[float, Arrived]] = asyncio.Queue()

    async def arrived(message: AbstractIncomingMessage) -> None:
        inbox.put_nowait((time.perf_counter(), message))

    async with await aio_pika.connect(url) as publishing, await aio_pika.connect(url) as consuming:
        channel = await consuming.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.declare_queue(new_id("bare"), durable=True)
        tag = await queue.consume(arrived)
        sending = await publishing.channel(publisher_confirms=True, on_return_raises=True)
        exchange = sending.default_exchange

        async def publish(body: bytes) -> None:
            message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT)
            await exchange.publish(message, queue.name, mandatory=True)

        yield Link(publish, inbox)
        await queue.cancel(tag)
        await queue.delete(if_unused=False, if_empty=False)


async def busy(link: Link, body: bytes, count: int, broker_pid: int) -> Hops:
    """The cost of each of `count` messages, IN_FLIGHT of them at any time."""
    await _run(link, body, max(count // 10, IN_FLIGHT))
    began = time.perf_counter(), time.process_time(), tree_cpu_s(broker_pid)
    await _run(link, body, count)
    ended = time.perf_counter(), time.process_time(), tree_cpu_s(broker_pid)
    elapsed_s, python_s, broker_s = (b - a for a, b in zip(began, ended, strict=True))
    return Hops(python_s / count, broker_s / count, elapsed_s / count)


async def _run(link: Link, body: bytes, count: int) -> None:
    free = asyncio.Semaphore(IN_FLIGHT)

    async def take() -> None:
        for _ in range(count):
            _, arrived = await link.inbox.get()
            check(arrived, body)
            await arrived.ack()
            free.release()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(take())
        for _ in range(count):
            await free.acquire()
            tasks.create_task(_awaited(link.publish(body)))


async def _awaited(publishing: Awaitable[object]) -> None:
    await publishing


async def latencies_s(link: Link, body: bytes, count: int) -> list[float]:
    """From the publish to the delivery, of one message at a time; sorted."""
    taken_s = []
    for _ in range(count):
        began_s = time.perf_counter()
        await link.publish(body)
        at_s, arrived = await link.inbox.get()
        taken_s.append(at_s - began_s)
        check(arrived, body)
        await arrived.ack()
    return sorted(taken_s)


def check(arrived: Arrived, body: bytes) -> None:
    """Raises: RuntimeError unless that is what was sent, by its length and its end: more would cost time."""
    if len(arrived.body) != len(body) or arrived.body[-16:] != body[-16:]:
        raise RuntimeError("a message arrived that is not the one that was sent")
