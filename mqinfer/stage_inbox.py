"""What has arrived at a worker and waits for its next forward, and when it listens for more. Nothing is read here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mqinfer.link import now_s, publish_declared
from mqinfer.messages import Step
from mqinfer.observe import ACTOR_READY, emit
from mqinfer.queues import QueueSpec
from mqinfer.transports.base import Delivery, Subscription, Transport

#: Steps of microbatches that the worker serves already, handed to it ahead of the forward they will join.
OWN_PREFETCH = 64
#: How often a worker that does not listen looks whether it may again.
PAUSE_S = 0.2


class Arrived(NamedTuple):
    """What came, not read yet."""

    delivery: Delivery
    #: On the event loop's clock.
    at_s: float


class Taken(NamedTuple):
    """A step in our hands."""

    step: Step
    delivery: Delivery
    arrived_s: float


def forwards(taken: Sequence[Taken], worth_tokens: float) -> list[list[Taken]]:
    """What runs in one forward each: so many positions and no step more; suspects by themselves, after all others."""
    together: list[list[Taken]] = []
    room = 0.0
    for item in taken:
        if item.step.alone:
            continue
        if room <= 0:
            together.append([])
            room = worth_tokens
        together[-1].append(item)
        room -= sum(row.count for row in item.step.rows)
    return together + [[item] for item in taken if item.step.alone]


class StageInbox:
    """A worker's own queue, which it always listens to, and its stage's shared queue, which it leaves when it must."""

    def __init__(self, transport: Transport, own: QueueSpec, shared: QueueSpec) -> None:
        self._transport = transport
        self._own = own
        self._shared = shared
        self._subscription: Subscription | None = None
        self._returning: asyncio.Task[None] | None = None
        self._closed = False
        self._tasks: asyncio.TaskGroup
        #: Later trips of microbatches that are cached here.
        self.own: deque[Arrived] = deque()
        #: First trips.
        self.shared: deque[Arrived] = deque()
        #: Set when something came.
        self.arrived = asyncio.Event()

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Declare the own queue and listen to both: from here on the worker serves. Raises: TransportError."""
        self._tasks = tasks
        await self._transport.declare(self._own)
        await self._transport.consume(
            self._own.name, prefetch=OWN_PREFETCH, sink=lambda delivery: self._store(self.own, delivery)
        )
        await self._listen()
        emit(ACTOR_READY, actor=self._own.name)

    async def stop_until(self, ready: Callable[[], bool]) -> None:
        """Leave the shared queue to others until `ready` says yes; a later call replaces an earlier one."""
        await self._leave()
        if not self._closed:
            self._returning = self._tasks.create_task(self._return(ready))

    async def close(self) -> None:
        """Leave the shared queue to others for good. What came already stays here."""
        self._closed = True
        await self._leave()

    async def _leave(self) -> None:
        if self._returning is not None:
            self._returning.cancel()
            await asyncio.wait({self._returning})
            self._returning = None
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.cancel()

    async def put_back(self, delivery: Delivery, *, ttl_s: float) -> None:
        """Published anew, not requeued: `redelivered` must mean that a worker died with it."""
        await publish_declared(self._transport, self._shared, delivery.body, ttl_s=ttl_s or None)
        await delivery.ack()

    async def _return(self, ready: Callable[[], bool]) -> None:
        while not ready():  # noqa: ASYNC110 - room is made in a thread that tells nobody
            await asyncio.sleep(PAUSE_S)
        await self._listen()

    async def _listen(self) -> None:
        """New microbatches come one at a time, so that who is free takes them."""
        self._subscription = await self._transport.consume(
            self._shared.name, prefetch=1, sink=lambda delivery: self._store(self.shared, delivery)
        )

    def _store(self, inbox: deque[Arrived], delivery: Delivery) -> None:
        inbox.append(Arrived(delivery, now_s()))
        self.arrived.set()
