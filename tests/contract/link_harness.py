"""What the contract tests are written with: links that can be lost, an inbox, and waiting without sleeping."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from proxy import Proxy

from mqinfer.queues import QueueSpec
from mqinfer.transports import open_transport
from mqinfer.transports.base import Delivery, Transport
from mqinfer.transports.memory import MemoryTransport

#: Nothing here takes so long; a test that waits longer has failed.
PATIENCE_S = 20.0

#: Makes a QueueSpec with a fresh name and these fields.
NewQueue = Callable[..., QueueSpec]


class Inbox:
    """A sink that keeps what it gets, as every sink must."""

    def __init__(self) -> None:
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()

    def __call__(self, delivery: Delivery) -> None:
        self._deliveries.put_nowait(delivery)

    def __len__(self) -> int:
        return self._deliveries.qsize()

    async def take(self) -> Delivery:
        """The next one, still to be settled."""
        return await asyncio.wait_for(self._deliveries.get(), PATIENCE_S)

    async def bodies(self, count: int) -> list[bytes]:
        """Take and ack that many."""
        bodies = []
        for _ in range(count):
            delivery = await self.take()
            bodies.append(delivery.body)
            await delivery.ack()
        return bodies


class Links:
    """Opens links to one broker, and takes them away as a failing network would."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url = url
        self._stack = stack
        self._proxies: dict[Transport, Proxy] = {}

    async def open(self, **how: Any) -> Transport:
        """A link; over RabbitMQ it goes through a proxy of its own."""
        proxy = None
        if not self.url.startswith("memory:"):
            proxy = await self._stack.enter_async_context(Proxy(self.url))
        link = await open_transport(proxy.url if proxy else self.url, **how)
        self._stack.push_async_callback(link.close)
        if proxy is not None:
            self._proxies[link] = proxy
        return link

    def proxy(self, link: Transport) -> Proxy:
        """The proxy that the link goes through."""
        return self._proxies[link]

    async def lose(self, link: Transport) -> None:
        """Take the link away."""
        if isinstance(link, MemoryTransport):
            await link.lose()
        else:
            self.proxy(link).cut()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask the broker again and again: it has no event for what we wait for."""
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():
            await asyncio.sleep(0.01)


async def until_ready(link: Transport, queue: str, count: int) -> None:
    """Until that many messages wait in the queue."""

    async def holds() -> bool:
        state = await link.inspect(queue)
        return state is not None and state.ready == count

    await until(holds)


async def until_gone(link: Transport, queue: str) -> None:
    """Until the queue does not exist."""

    async def holds() -> bool:
        return await link.inspect(queue) is None

    await until(holds)


async def ended(link: Transport) -> None:
    """Wait until the link ends; raises what `closed` raises."""
    await asyncio.wait_for(link.closed(), PATIENCE_S)
