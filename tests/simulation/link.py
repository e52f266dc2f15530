"""An actor's link to the simulated broker: base.Transport over two connections that can be cut, stalled and reset.

What is sent over one connection arrives in order, unless chance says otherwise. The broker's side of a link is the
memory transport's. Weather and faults of all links together are network.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from mqinfer.errors import Disconnected, MqinferError, Unroutable
from mqinfer.queues import QueueSpec
from mqinfer.transports.base import Blockage, QueueState, Sink
from mqinfer.transports.memory import MemoryDelivery, MemorySubscription, MemoryTransport
from mqinfer.transports.memory_broker import Message
from simulation.virtual import Process, State

if TYPE_CHECKING:
    from simulation.network import Network

T = TypeVar("T")
PUBLISH, CONSUME = 0, 1


class SimDelivery:
    """A delivery on the client's side."""

    def __init__(self, link: SimTransport, server: MemoryDelivery) -> None:
        self._link = link
        self._server = server
        self._settled = False
        self.body = server.body
        self.queue = server.queue
        self.headers = server.headers
        self.redelivered = server.redelivered

    async def ack(self) -> None:
        """See base.Delivery."""
        self._settle(self._server.ack)

    async def requeue(self) -> None:
        """See base.Delivery."""
        self._settle(self._server.requeue)

    def _settle(self, settle: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._link.check()
        if self._settled:
            self._link.network.complain("a delivery was settled twice")
            raise RuntimeError("a delivery is settled once")
        self._settled = True
        self._link.to_broker(CONSUME, lambda: _now(settle()))


class SimSubscription:
    """A running consumer on the client's side."""

    def __init__(self, link: SimTransport, server: MemorySubscription) -> None:
        self._link = link
        self._server = server

    async def cancel(self) -> None:
        """See base.Subscription."""
        await self._link.call(self._leave)

    async def _leave(self) -> None:
        self._server.leave()


class Server(MemoryTransport):
    """The broker's side of a link; tells its client where the broker itself ends it."""

    def __init__(self, link: SimTransport) -> None:
        super().__init__(link.network.broker)
        self._link = link

    def end(self, loss: Disconnected | None, cause: Exception | None = None) -> None:
        """See MemoryTransport."""
        super().end(loss, cause)
        if self._link in self._link.network.links:  # a queue was deleted under its consumer
            self._link.reset()


class SimTransport:
    """One actor's link; base.Transport says what its methods promise."""

    def __init__(self, network: Network, process: Process) -> None:
        self.network = network
        self.process = process
        self.server = Server(self)
        self._arrives_s = {(side, connection): 0.0 for side in ("there", "back") for connection in (PUBLISH, CONSUME)}
        self.is_cut = False
        self._closed = asyncio.Event()
        self._loss: Disconnected | None = None
        self._pending: dict[asyncio.Future[Any], None] = {}
        self._held_since_s: dict[MemoryDelivery, float] = {}
        self._blocked_before_s = network.told_blocked_s()
        process.on_death.append(self._process_died)

    # -- what actors call ------------------------------------------------------------------------

    async def declare(self, spec: QueueSpec) -> None:
        """See base.Transport."""
        if spec.durable and spec.name not in self.network.declared_s:
            self.network.declared_s[spec.name] = self.network.loop.time()
        await self.call(lambda: self.server.declare(spec))

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
        message = Message(body=body, headers=dict(headers or {}), persistent=persistent, priority=priority, ttl_s=ttl_s)
        confirm = self._promise()
        network = self.network

        def route() -> None:
            routed = network.enter(queue, message)
            if routed and network.random.random() < network.weather.duplicated:
                network.enter_again(queue, message)
            error = None if routed else Unroutable(f"the queue {queue} does not exist")
            self._answer(confirm, PUBLISH, None, error)

        def arrive() -> None:
            if network.random.random() < network.weather.reordered:
                network.at_broker(network.loop.time() + network.random.uniform(0, 2), self._unless_gone(route))
            else:
                route()

        self.to_broker(PUBLISH, arrive)
        await confirm

    async def broadcast(self, exchange: str, body: bytes) -> None:
        """See base.Transport."""
        await self.call(lambda: self.server.broadcast(exchange, body), PUBLISH)

    async def consume(self, queue: str, *, prefetch: int, sink: Sink) -> SimSubscription:
        """See base.Transport."""

        def deliver(delivery: MemoryDelivery) -> None:
            self._held_since_s[delivery] = self.network.loop.time()
            self._to_client(CONSUME, lambda: sink(SimDelivery(self, delivery)))

        return SimSubscription(
            self,
            await self.call(lambda: self.server.consume(queue, prefetch=prefetch, sink=deliver)),  # type: ignore[arg-type]
        )

    async def inspect(self, queue: str) -> QueueState | None:
        """See base.Transport."""
        return await self.call(lambda: self.server.inspect(queue))

    async def purge(self, queue: str) -> int:
        """See base.Transport."""
        return await self.call(lambda: self.server.purge(queue))

    async def delete(self, queue: str) -> int:
        """See base.Transport."""
        return await self.call(lambda: self.server.delete(queue))

    def blockage(self) -> Blockage:
        """See base.Transport."""
        network = self.network
        reason = "" if network.told_at_s is None else "memory"
        return Blockage(reason, network.told_blocked_s() - self._blocked_before_s)

    async def closed(self) -> None:
        """See base.Transport."""
        await self._closed.wait()
        if self._loss is not None:
            raise Disconnected(str(self._loss))

    async def close(self) -> None:
        """See base.Transport."""
        self.end(None)

    def check(self) -> None:
        """Raises: Disconnected once the link has ended."""
        if self._closed.is_set():
            raise Disconnected("the link to the broker has ended")

    # -- what happens to it ----------------------------------------------------------------------

    def end(self, loss: Disconnected | None) -> None:
        """It ends for the client, who tells the broker; what it sent before may still arrive."""
        if self._closed.is_set():
            return
        self._loss = loss
        self._closed.set()
        for promise in self._pending:
            if not promise.done():
                promise.set_exception(Disconnected("the link was lost"))
        self._pending.clear()
        self._leave_broker(self._arrives_s["there", CONSUME] if loss is None else 0.0)

    def reset(self) -> None:
        """Both sides learn at once that the connection is gone; what was on its way is lost."""
        self.is_cut = True
        self.server_ends()
        self._tell_client(self.network.delay_s())

    def stall(self) -> None:
        """Half-open: nothing gets through any more; both sides learn of it by their heartbeats."""
        self.is_cut = True
        now_s, heartbeat_s = self.network.loop.time(), self.network.weather.heartbeat_s
        self.network.at_broker(now_s + self.network.random.uniform(1, 2) * heartbeat_s, self.server_ends)
        self._tell_client(self.network.random.uniform(heartbeat_s, 3 * (heartbeat_s + 1)))

    def silence(self) -> None:
        """Its process was paused: the broker waits for heartbeats as long as it does."""

        def look() -> None:
            if self.process.state is State.PAUSED:
                self.server_ends()
                self._tell_client(self.network.delay_s())

        heartbeat_s = self.network.weather.heartbeat_s
        self.network.at_broker(self.network.loop.time() + self.network.random.uniform(1, 2) * heartbeat_s, look)

    def lose_patience(self) -> None:
        """A publish was not confirmed in time."""
        if self._pending and self.network.alarmed:
            self.end(Disconnected("the broker did not answer in time"))

    def server_ends(self) -> None:
        """The broker forgets the link: unsettled deliveries come back, exclusive queues go."""
        if self in self.network.links:
            self.network.links.remove(self)
            self.network.lost(self)
            self._held_since_s.clear()
            self.server.end(Disconnected())

    @property
    def closed_in_order(self) -> bool:
        """Whether its actor closed it."""
        return self._closed.is_set() and self._loss is None

    def held_longer_than(self, limit_s: float) -> list[str]:
        """Queues of the deliveries that have not been settled for so long."""
        self._held_since_s = {d: s for d, s in self._held_since_s.items() if d in self.server.unsettled}
        return [d.queue for d, s in self._held_since_s.items() if s < self.network.loop.time() - limit_s]

    # -- the way there and back ------------------------------------------------------------------

    def to_broker(self, connection: int, do: Callable[[], None]) -> None:
        """After the message's way the broker does it, unless the link is gone by then."""
        self.network.at_broker(self._arrival_s("there", connection), self._read(connection, self._unless_gone(do)))

    async def call(self, ask: Callable[[], Coroutine[Any, Any, T]], connection: int = CONSUME) -> T:
        """Ask the broker; what it answers. Raises: what it raises; Disconnected."""
        self.check()
        promise: asyncio.Future[T] = self._promise()

        def answer() -> None:
            try:
                self._answer(promise, connection, _now(ask()), None)
            except MqinferError as error:
                self._answer(promise, connection, None, error)

        self.to_broker(connection, answer)
        return await promise

    def _read(self, connection: int, do: Callable[[], None]) -> Callable[[], None]:
        def read() -> None:
            if connection == PUBLISH and self.network.alarmed:
                self.network.held.append(do)
            else:
                do()

        return read

    def _unless_gone(self, do: Callable[[], None]) -> Callable[[], None]:
        return lambda: do() if self in self.network.links and not self.is_cut else None

    def _promise(self) -> asyncio.Future[Any]:
        promise = self.network.loop.create_future()
        self._pending[promise] = None
        return promise

    def _answer(self, promise: asyncio.Future[Any], connection: int, result: Any, error: Exception | None) -> None:
        def settle() -> None:
            self._pending.pop(promise, None)
            if not promise.done():
                _ = promise.set_result(result) if error is None else promise.set_exception(error)

        self._to_client(connection, settle)

    def _to_client(self, connection: int, do: Callable[[], None]) -> None:
        def arrive() -> None:
            if not (self.is_cut or self._closed.is_set()):
                do()

        self.network.loop.call_at(self._arrival_s("back", connection), arrive, context=self.process.context)

    def _arrival_s(self, side: str, connection: int) -> float:
        arrives_s = max(self._arrives_s[side, connection], self.network.loop.time() + self.network.delay_s())
        self._arrives_s[side, connection] = arrives_s
        return arrives_s

    def _tell_client(self, delay_s: float) -> None:
        self.network.loop.call_later(
            delay_s, lambda: self.end(Disconnected("the connection was lost")), context=self.process.context
        )

    def _leave_broker(self, when_s: float) -> None:
        self.network.at_broker(max(when_s, self.network.loop.time()), self.server_ends)

    def _process_died(self) -> None:
        """The operating system closes its connections; what was sent before may or may not arrive."""
        arrives = self.network.random.random() < 0.5
        self._leave_broker(max(self._arrives_s["there", c] for c in (PUBLISH, CONSUME)) if arrives else 0.0)


def _now(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine of the memory transport returns; at most it gives others their turn once."""
    try:
        while True:
            coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
