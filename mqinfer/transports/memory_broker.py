"""The queues of the memory transport: who gets which message when. As strict as RabbitMQ, but it keeps nothing.

It lives in one event loop, is not thread-safe and never waits. Links, settling and the contract's errors of a lost
link are memory.py's; nothing may live here that RabbitMQ does not do too.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count

from mqinfer.errors import Refused
from mqinfer.queues import QueueSpec


@dataclass(slots=True, eq=False, kw_only=True)
class Message:
    """A body and what the broker notes of it."""

    body: bytes
    headers: Mapping[str, str]
    #: Outlives a restart of the broker.
    persistent: bool = False
    priority: int = 0
    ttl_s: float | None = None
    #: Clock of the event loop; set when it enters a queue, and not again when it comes back.
    expires_at: float | None = None
    redelivered: bool = False
    #: Sorts the queue: higher priority first, then by arrival. What comes back has its old place.
    place: tuple[int, int] = (0, 0)


@dataclass(slots=True, eq=False, kw_only=True)
class Consumer:
    """Takes messages of a queue while fewer than `prefetch` are unsettled; 0 means no limit."""

    prefetch: int
    on_message: Callable[[Message], None]
    #: The queue was deleted; told why.
    on_evicted: Callable[[str], None]
    unsettled: int = 0

    @property
    def has_room(self) -> bool:
        """Whether it may be handed another message."""
        return self.prefetch == 0 or self.unsettled < self.prefetch


@dataclass(slots=True, eq=False)
class Queue:
    """Ready messages, and consumers that take turns."""

    broker: Broker
    spec: QueueSpec
    #: The link that an exclusive queue belongs to.
    owner: object | None
    consumers: deque[Consumer] = field(default_factory=deque)
    ready: list[tuple[tuple[int, int], Message]] = field(default_factory=list)
    arrivals: count[int] = field(default_factory=count)
    #: Fires when the message at the head expires.
    head_timer: asyncio.TimerHandle | None = None
    #: Fires when nobody has used the queue for `expires_s`.
    unused_timer: asyncio.TimerHandle | None = None
    #: It was removed: what comes back to it is lost.
    gone: bool = False

    def enter(self, message: Message) -> None:
        """Append a message, whose time to live begins now."""
        ttls_s = [ttl_s for ttl_s in (message.ttl_s, self.spec.message_ttl_s) if ttl_s is not None]
        message.expires_at = self.broker.loop.time() + min(ttls_s) if ttls_s else None
        message.place = (-min(message.priority, self.spec.max_priority), next(self.arrivals))
        self._put(message)

    def come_back(self, message: Message) -> None:
        """Put a message that was handed out back to its place; it may have outlived its time meanwhile."""
        message.redelivered = True
        if not self.gone:
            self._put(message)

    def wake(self) -> None:
        """Hand out what can be handed out, after the caller has returned: a sink never runs inside a `publish`."""
        self.broker.loop.call_soon(self._hand_out)

    def touch(self) -> None:
        """Somebody uses the queue: the time after which it goes begins anew."""
        if self.unused_timer is not None:
            self.unused_timer.cancel()
        if self.spec.expires_s is not None and not self.consumers:
            self.unused_timer = self.broker.loop.call_later(self.spec.expires_s, self.broker.remove, self)

    def clear(self) -> int:
        """Remove what is ready; how many there were."""
        removed = len(self.ready)
        self.ready.clear()
        return removed

    def forget_transient(self) -> None:
        """Only what is persistent stays."""
        self.ready = [(place, message) for place, message in self.ready if message.persistent]
        heapq.heapify(self.ready)
        self.wake()

    def end(self) -> None:
        """The queue is removed: no timer fires any more and its consumers learn of it."""
        self.gone = True
        for timer in (self.head_timer, self.unused_timer):
            if timer is not None:
                timer.cancel()
        for consumer in list(self.consumers):
            consumer.on_evicted(f"the queue {self.spec.name} was deleted under its consumer")

    def _put(self, message: Message) -> None:
        heapq.heappush(self.ready, (message.place, message))
        self.wake()

    def _hand_out(self) -> None:
        self._drop_expired()
        while self.ready and (consumer := self._next_free()):
            consumer.unsettled += 1
            consumer.on_message(heapq.heappop(self.ready)[1])
        self._watch_head()

    def _next_free(self) -> Consumer | None:
        for _ in range(len(self.consumers)):
            self.consumers.rotate(-1)
            if self.consumers[-1].has_room:
                return self.consumers[-1]
        return None

    def _drop_expired(self) -> None:
        # Only the head is looked at, as in RabbitMQ: what stands behind a message that stays must wait.
        while (expires_at := self._head_expires_at()) is not None and expires_at <= self.broker.loop.time():
            message = heapq.heappop(self.ready)[1]
            if self.spec.dead_letter_to is not None:
                self.broker.route(self.spec.dead_letter_to, replace(message, ttl_s=None, redelivered=False))

    def _head_expires_at(self) -> float | None:
        return self.ready[0][1].expires_at if self.ready else None

    def _watch_head(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
        if (expires_at := self._head_expires_at()) is not None:
            self.head_timer = self.broker.loop.call_at(expires_at, self._hand_out)


class Broker:
    """Queues and bindings by name."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._queues: dict[str, Queue] = {}
        #: By exchange; the queues in the order of binding.
        self._exchanges: dict[str, dict[str, None]] = {}

    def declare(self, spec: QueueSpec, owner: object) -> None:
        """Make the queue for this link. Raises: Refused if it differs or is another link's."""
        queue = self.find(spec.name, owner)
        if queue is None:
            queue = self._queues[spec.name] = Queue(self, spec, owner if spec.exclusive else None)
        # A binding is no property of the queue: the same queue may be declared with another one.
        if replace(queue.spec, fanout=None) != replace(spec, fanout=None):
            raise Refused(f"the queue {spec.name} is there with other properties")
        if spec.fanout is not None:
            self._exchanges.setdefault(spec.fanout, {})[spec.name] = None
        queue.touch()

    def queues(self) -> list[Queue]:
        """All queues there are, the oldest first."""
        return list(self._queues.values())

    def find(self, name: str, asker: object) -> Queue | None:
        """The queue, for any use but publishing. Raises: Refused where another link owns it."""
        queue = self._queues.get(name)
        if queue is not None and queue.owner not in (None, asker):
            raise Refused(f"the queue {name} belongs to another link")
        return queue

    def route(self, name: str, message: Message) -> bool:
        """Put the message into the queue; False where it does not exist."""
        queue = self._queues.get(name)
        if queue is not None:
            queue.enter(message)
        return queue is not None

    def fan_out(self, exchange: str, message: Message) -> None:
        """Put a copy into every queue bound to the exchange."""
        for name in list(self._exchanges.get(exchange, ())):
            self.route(name, replace(message))

    def remove(self, queue: Queue) -> int:
        """Remove the queue; how many ready messages went with it."""
        self._queues.pop(queue.spec.name, None)
        for names in self._exchanges.values():
            names.pop(queue.spec.name, None)
        removed = queue.clear()
        queue.end()
        return removed

    def restart(self) -> None:
        """Keep what outlives a restart: persistent messages in durable queues. Every link has ended before."""
        for queue in list(self._queues.values()):
            if queue.spec.durable:
                queue.forget_transient()
            else:
                self.remove(queue)

    def remove_owned(self, owner: object) -> None:
        """Remove the exclusive queues of a link that has ended."""
        for queue in [queue for queue in self._queues.values() if queue.owner is owner]:
            self.remove(queue)
