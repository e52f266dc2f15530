"""Links to a broker inside the process: for trying things out, for one machine and for tests.

All links of one name in one event loop share a broker, which ends with the loop. What the broker does with messages
is memory_broker.py's. Nothing may live here that the contract in base.py does not have, but for `lose`, `restart` and
`drop`, with which tests take a link or a broker away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from weakref import WeakSet

from mqinfer.errors import Disconnected, Unroutable
from mqinfer.queues import QueueSpec
from mqinfer.transports.base import Blockage, QueueState, Sink
from mqinfer.transports.memory_broker import Broker, Consumer, Message, Queue

_brokers: dict[str, Broker] = {}
_links: WeakSet[MemoryTransport] = WeakSet()


def open_memory(name: str) -> MemoryTransport:
    """A link to this event loop's broker of that name, which is made if it is not there."""
    loop = asyncio.get_running_loop()
    if name not in _brokers or _brokers[name].loop is not loop:
        _brokers[name] = Broker(loop)
    link = MemoryTransport(_brokers[name])
    _links.add(link)
    return link


def restart(name: str) -> None:
    """Do to the broker what a restart does: its links are lost, and only persistent messages stay."""
    broker = _brokers[name]
    _lose_links(broker, "the broker was restarted")
    broker.restart()


def drop(name: str) -> None:
    """Forget the broker and all that it holds; its links are lost. Nothing happens where there is none."""
    broker = _brokers.pop(name, None)
    _lose_links(broker, "the broker was dropped")


def _lose_links(broker: Broker | None, why: str) -> None:
    for link in [link for link in _links if link.broker is broker]:
        link.end(Disconnected(why))


class MemoryDelivery:
    """One message of a memory queue, ours until settled."""

    __slots__ = ("_message", "_subscription", "redelivered")

    def __init__(self, subscription: MemorySubscription, message: Message) -> None:
        self._subscription = subscription
        self._message = message
        self.redelivered = message.redelivered

    @property
    def body(self) -> bytes:
        """The bytes that were published."""
        return self._message.body

    @property
    def queue(self) -> str:
        """The queue that it came from."""
        return self._subscription.queue.spec.name

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that were published."""
        return self._message.headers

    async def ack(self) -> None:
        """See base.Delivery. Raises: Disconnected; RuntimeError where it is settled already."""
        self._subscription.settle(self)

    async def requeue(self) -> None:
        """See base.Delivery. Raises: Disconnected; RuntimeError where it is settled already."""
        self._subscription.settle(self)
        self.come_back()

    def come_back(self) -> None:
        """Put the message back to its place; where the queue is gone, so is the message."""
        self._subscription.queue.come_back(self._message)


class MemorySubscription:
    """A running consumer of a memory queue."""

    def __init__(self, link: MemoryTransport, queue: Queue, prefetch: int, sink: Sink) -> None:
        self.queue = queue
        self._link = link
        self._sink = sink
        self._consumer = Consumer(prefetch=prefetch, on_message=self._take, on_evicted=self._evicted)
        link.subscriptions[self] = None
        queue.consumers.append(self._consumer)
        queue.touch()
        queue.wake()

    async def cancel(self) -> None:
        """See base.Subscription. Raises: Disconnected."""
        self._link.check()
        self.leave()

    def leave(self) -> None:
        """Take no more turns; twice is harmless."""
        if self in self._link.subscriptions:
            del self._link.subscriptions[self]
            self.queue.consumers.remove(self._consumer)
            self.queue.touch()

    def settle(self, delivery: MemoryDelivery) -> None:
        """The delivery makes room for another. Raises: Disconnected; RuntimeError where it is settled already."""
        self._link.check()
        if delivery not in self._link.unsettled:
            raise RuntimeError("a delivery is settled once")
        del self._link.unsettled[delivery]
        self._consumer.unsettled -= 1
        self.queue.wake()

    def _take(self, message: Message) -> None:
        delivery = MemoryDelivery(self, message)
        self._link.unsettled[delivery] = None
        try:
            self._sink(delivery)
        except Exception as error:  # a fault of ours, but the message must come back
            self._link.end(Disconnected("a sink raised"), error)

    def _evicted(self, why: str) -> None:
        self._link.end(Disconnected(why))


class MemoryTransport:
    """A link to a broker of this process; base.Transport says what its methods promise."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        #: What the sinks got and nobody settled, in the order of delivery.
        self.unsettled: dict[MemoryDelivery, None] = {}
        self.subscriptions: dict[MemorySubscription, None] = {}
        self._ended = asyncio.Event()
        self._loss: Disconnected | None = None

    async def declare(self, spec: QueueSpec) -> None:
        """See base.Transport."""
        self.check()
        self.broker.declare(spec, self)

    async def declare_exchange(self, name: str, *, fanout: bool = False) -> None:  # noqa: ARG002
        """See base.Transport; every message finds its way here without."""
        self.check()

    async def publish(
        self,
        queue: str,
        body: bytes,
        *,
        persistent: bool = False,
        priority: int = 0,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See base.Transport."""
        self.check()
        kept = MappingProxyType(dict(headers or {}))
        message = Message(body=bytes(body), headers=kept, persistent=persistent, priority=priority, ttl_s=ttl_s)
        if not self.broker.route(queue, message):
            raise Unroutable(f"the queue {queue} does not exist")
        await asyncio.sleep(0)  # others get their turn, as they do while a real broker confirms

    async def broadcast(self, exchange: str, body: bytes) -> None:
        """See base.Transport."""
        self.check()
        self.broker.fan_out(exchange, Message(body=bytes(body), headers=MappingProxyType({})))
        await asyncio.sleep(0)

    async def consume(self, queue: str, *, prefetch: int, sink: Sink) -> MemorySubscription:
        """See base.Transport."""
        return MemorySubscription(self, self._existing(queue), prefetch, sink)

    async def inspect(self, queue: str) -> QueueState | None:
        """See base.Transport. Raises: Refused where another link owns it."""
        self.check()
        found = self.broker.find(queue, self)
        if found is None:
            return None
        found.touch()
        return QueueState(len(found.ready), len(found.consumers))

    async def purge(self, queue: str) -> int:
        """See base.Transport."""
        return self._existing(queue).clear()

    async def delete(self, queue: str) -> int:
        """See base.Transport."""
        self.check()
        found = self.broker.find(queue, self)
        return self.broker.remove(found) if found else 0

    def blockage(self) -> Blockage:
        """See base.Transport; there is no alarm here."""
        return Blockage()

    async def closed(self) -> None:
        """See base.Transport."""
        await self._ended.wait()
        if self._loss is not None:
            raise Disconnected(str(self._loss)) from self._loss.__cause__

    async def close(self) -> None:
        """See base.Transport."""
        self.end(None)

    async def lose(self) -> None:
        """Lose the link, as if the network had failed (tests)."""
        self.end(Disconnected())

    def check(self) -> None:
        """Raises: Disconnected once the link has ended."""
        if self._ended.is_set():
            raise Disconnected("the link to the broker has ended")

    def end(self, loss: Disconnected | None, cause: Exception | None = None) -> None:
        """End the link, once: what is unsettled goes back and what is exclusive goes away."""
        if self._ended.is_set():
            return
        if loss is not None:
            loss.__cause__ = cause
        self._loss = loss
        self._ended.set()
        for subscription in list(self.subscriptions):
            subscription.leave()
        for delivery in self.unsettled:
            delivery.come_back()
        self.broker.remove_owned(self)

    def _existing(self, name: str) -> Queue:
        self.check()
        queue = self.broker.find(name, self)
        if queue is None:
            raise Unroutable(f"the queue {name} does not exist")
        return queue
