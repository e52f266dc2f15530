"""The producer: prompts in, results out. What a batch job, the command line and a gateway hold of the fleet. No torch.

A job's results wait in a durable queue of its own; whoever knows the job's name collects them, from any machine.
Files and their formats do not belong here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple

from mqinfer.errors import TransportError, WireError
from mqinfer.link import bury, publish_declared
from mqinfer.messages import JobTotal, Request, Result
from mqinfer.queues import Topology, results
from mqinfer.transports.base import Delivery, Subscription, Transport
from mqinfer.verdicts import DEAD_LETTERS
from mqinfer.wire import decode, encode

#: Publishes that wait for their confirm at the same time.
PUBLISHING = 64


class Arrival(NamedTuple):
    """A result that has come; it waits in the broker until `delivery` is acked."""

    message: Result | JobTotal
    delivery: Delivery


class Producer:
    """One job over one link."""

    def __init__(self, transport: Transport, topology: Topology, job: str) -> None:
        self._transport = transport
        self._topology = topology
        self._results = results(job)
        self.job = job
        self._inbox: asyncio.Queue[Delivery] = asyncio.Queue()
        self._subscription: Subscription | None = None

    async def open(self) -> None:
        """Make the job's queues where they are not there. Raises: TransportError."""
        for spec in (self._topology.dead, self._topology.requests, self._results):
            await self._transport.declare(spec)

    async def submit(self, requests: Iterable[Request]) -> None:
        """Returns when the broker has all of them on disk. Raises: TransportError; some may be there then."""
        todo = iter(requests)

        async def publish() -> None:
            for request in todo:
                await publish_declared(self._transport, self._topology.requests, encode(request), persistent=True)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(PUBLISHING):
                    tasks.create_task(publish())
        except* TransportError as group:
            raise TransportError(f"could not enqueue: {group.exceptions[0]}") from group

    async def put(self, message: Result | JobTotal) -> None:
        """Straight into the job's results: what needs no fleet. Raises: TransportError."""
        await publish_declared(self._transport, self._results, encode(message), persistent=True)

    async def listen(self, *, prefetch: int) -> None:
        """Let results come. Raises: Unroutable where the job does not exist."""
        self._subscription = await self._transport.consume(
            self._results.name, prefetch=prefetch, sink=self._inbox.put_nowait
        )

    async def arrivals(self) -> AsyncIterator[list[Arrival]]:
        """Lists of what has come since the last, never empty; what can't be read goes to the dead letters."""
        while True:
            deliveries = [await self._inbox.get()]
            while not self._inbox.empty():
                deliveries.append(self._inbox.get_nowait())
            arrivals = [arrival for delivery in deliveries if (arrival := await self._read(delivery))]
            if arrivals:
                yield arrivals

    async def _read(self, delivery: Delivery) -> Arrival | None:
        try:
            message = decode(delivery.body)
            if not isinstance(message, Result | JobTotal):
                raise WireError(f"a {type(message).__name__} among results")
        except DEAD_LETTERS as error:
            await bury(self._transport, self._topology.dead, delivery, str(error))
            return None
        return Arrival(message, delivery)

    async def waiting(self) -> int | None:
        """How many results wait to be collected; None where the job does not exist."""
        state = await self._transport.inspect(self._results.name)
        return None if state is None else state.ready

    async def forget(self) -> None:
        """The job is over: its results queue goes."""
        if self._subscription is not None:
            await self._subscription.cancel()
        await self._transport.delete(self._results.name)
