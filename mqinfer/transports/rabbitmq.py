"""The RabbitMQ transport: what base.py promises, in AMQP's words, over the two connections of a rabbitmq_link.Link.

No name of a queue and no policy may live here, and no reconnecting.

Publishing goes over one aio-pika channel. Every other channel is short-lived and opened beneath it, with aiormq: each
aio-pika channel leaves two callbacks on its connection for good (aio-pika 10.2.1: after 50 channels, 100 callbacks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractChannel, AbstractExchange
from aiormq.abc import AbstractChannel as RawChannel
from aiormq.abc import DeliveredMessage

from mqinfer.errors import Disconnected, Forbidden, Unroutable
from mqinfer.queues import QueueSpec, exchange_of
from mqinfer.transports.base import Blockage, QueueState, Sink
from mqinfer.transports.rabbitmq_connect import connect, parse
from mqinfer.transports.rabbitmq_link import Link

#: Of each consumer, for RabbitMQ 3: it is told when its queue is deleted, or when a mirrored one moves. Otherwise,
#: where the queue is declared again before the consumer's channel has seen that it went, the consumer is made one of
#: the new queue, counts there and, in 3.10, is sent nothing (rabbit_channel.erl, `queue_down_consumer_action`).
#: RabbitMQ 4 tells in any case. Classic queues only, as ours are: for others RabbitMQ 3 refuses it.
CONSUMER_ARGUMENTS: dict[str, Any] = {"x-cancel-on-ha-failover": True}


async def open_rabbitmq(url: str, *, name: str, heartbeat_s: float, timeout_s: float) -> RabbitmqTransport:
    """See transports.open_transport."""
    address = parse(url)
    publishing = await connect(address, name=f"{name} publish", heartbeat_s=heartbeat_s, timeout_s=timeout_s)
    try:
        consuming = await connect(address, name=f"{name} consume", heartbeat_s=heartbeat_s, timeout_s=timeout_s)
    except BaseException:
        await publishing.close()
        raise
    transport = RabbitmqTransport(Link(publishing, consuming, name, timeout_s))
    try:
        await transport.start()
    except BaseException:
        await transport.close()
        raise
    return transport


class RabbitmqDelivery:
    """One message, ours until settled."""

    __slots__ = ("_message", "_settled", "_subscription")

    def __init__(self, subscription: RabbitmqSubscription, message: DeliveredMessage) -> None:
        self._subscription = subscription
        self._message = message
        self._settled = False

    @property
    def body(self) -> bytes:
        """The bytes that were published."""
        return self._message.body

    @property
    def queue(self) -> str:
        """The queue that it came from."""
        return self._subscription.queue

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that were published, without those that the broker added."""
        headers = self._message.header.properties.headers or {}
        ours = {key: value for key, value in headers.items() if isinstance(value, str) and not key.startswith("x-")}
        return MappingProxyType(ours)

    @property
    def redelivered(self) -> bool:
        """Whether somebody had it before."""
        return bool(self._message.redelivered)

    async def ack(self) -> None:
        """See base.Delivery. Raises: Disconnected; RuntimeError where it is settled already."""
        await self._settle(requeue=False)

    async def requeue(self) -> None:
        """See base.Delivery. Raises: Disconnected; RuntimeError where it is settled already."""
        await self._settle(requeue=True)

    async def _settle(self, *, requeue: bool) -> None:
        self._subscription.link.check()
        if self._settled:
            # The broker would close the channel for it, and the link would end.
            raise RuntimeError("a delivery is settled once")
        self._settled = True
        await self._subscription.settle(self._message.delivery_tag or 0, requeue=requeue)


class RabbitmqSubscription:
    """A running consumer with a channel of its own, so that it has its own prefetch and its own end."""

    def __init__(self, link: Link, channel: RawChannel, queue: str, sink: Sink) -> None:
        self.link = link
        self.queue = queue
        self._channel = channel
        self._sink = sink
        self._tag = ""
        self._unsettled = 0
        self._cancelled = False
        self._unwatch: Callable[[], object] = lambda: None

    async def start(self, prefetch: int) -> None:
        """To be called inside the link's border, once."""
        await self._channel.basic_qos(prefetch_count=prefetch)
        self._channel.on_consumer_cancel_callbacks.add(self._on_broker_cancel)
        reply = await self._channel.basic_consume(self.queue, self._on_message, arguments=CONSUMER_ARGUMENTS)
        self._tag = reply.consumer_tag or ""
        self._unwatch = self.link.watch(self._channel, f"the channel that consumed {self.queue} was closed")

    async def cancel(self) -> None:
        """See base.Subscription; twice is harmless. Raises: Disconnected."""
        async with self.link.border(self.queue):
            if not self._cancelled:
                await self._channel.basic_cancel(self._tag)
                self._cancelled = True
                await self._close_if_drained()

    async def settle(self, tag: int, *, requeue: bool) -> None:
        """Tell the broker what becomes of the delivery of that tag. Raises: Disconnected."""
        async with self.link.border(self.queue):
            if requeue:
                await self._channel.basic_nack(tag, requeue=True)
            else:
                await self._channel.basic_ack(tag)
            self._unsettled -= 1
            await self._close_if_drained()

    async def _close_if_drained(self) -> None:
        # Not earlier: with the channel would go back what is still ours to settle.
        if self._cancelled and self._unsettled == 0:
            self._unwatch()
            await self._channel.close()

    async def _on_message(self, message: DeliveredMessage) -> None:
        """Runs as a task of the channel, which dies with it: hence it hands over and does nothing else."""
        if self.link.has_ended:
            return
        self._unsettled += 1
        try:
            self._sink(RabbitmqDelivery(self, message))
        except Exception as error:  # a fault of ours, but the message must come back
            self.link.end(Disconnected("a sink raised"), error)

    def _on_broker_cancel(self, _frame: object) -> None:
        self.link.end(Disconnected(f"the broker cancelled the consumer of {self.queue}"))


class RabbitmqTransport:
    """A link to RabbitMQ; base.Transport says what its methods promise."""

    def __init__(self, link: Link) -> None:
        self._link = link
        # Kept here because the connection holds it only weakly.
        self._channel: AbstractChannel = link.publishing.channel(publisher_confirms=True, on_return_raises=True)
        self._exchanges: dict[str, AbstractExchange] = {}

    async def start(self) -> None:
        """Open the publishing channel; once. Raises: Disconnected."""
        async with self._link.border():
            await self._channel.initialize()
            self._link.watch(await self._channel.get_underlay_channel(), "the publishing channel was closed")

    async def declare(self, spec: QueueSpec) -> None:
        """See base.Transport. What another user has made for us to use, we need not be allowed to make."""
        try:
            await self._make_queue(spec)
        except Forbidden as error:
            await self._expect_queue(spec.name, error)
        else:
            await self._bind(spec)

    async def declare_exchange(self, name: str, *, fanout: bool = False) -> None:
        """See base.Transport."""
        if await self._exchange(name) is None:
            async with self._link.throw_away_channel(name) as channel:
                await channel.exchange_declare(name, exchange_type="fanout" if fanout else "direct", durable=True)

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
        message = Message(
            body,
            headers=dict(headers or {}),
            delivery_mode=DeliveryMode.PERSISTENT if persistent else DeliveryMode.NOT_PERSISTENT,
            priority=priority,
            expiration=ttl_s,
        )
        exchange = await self._exchange(exchange_of(queue))
        if exchange is None:
            raise Unroutable(f"the queue {queue} does not exist")
        async with self._link.border(queue, publishing=True):
            await exchange.publish(message, queue, mandatory=True)

    async def broadcast(self, exchange: str, body: bytes) -> None:
        """See base.Transport."""
        message = Message(body, delivery_mode=DeliveryMode.NOT_PERSISTENT)
        fanout = await self._exchange(exchange)
        if fanout is not None:
            async with self._link.border(publishing=True):
                await fanout.publish(message, "", mandatory=False)

    async def consume(self, queue: str, *, prefetch: int, sink: Sink) -> RabbitmqSubscription:
        """See base.Transport. Raises: Refused where another link owns the queue."""
        async with self._link.border(queue):
            subscription = RabbitmqSubscription(self._link, await self._link.open_channel(), queue, sink)
            await subscription.start(prefetch)
        return subscription

    async def inspect(self, queue: str) -> QueueState | None:
        """See base.Transport. Raises: Refused where another link owns the queue."""
        try:
            async with self._link.throw_away_channel(queue) as channel:
                state = await channel.queue_declare(queue, passive=True)
        except Unroutable:
            return None
        return QueueState(state.message_count or 0, state.consumer_count or 0)

    async def purge(self, queue: str) -> int:
        """See base.Transport."""
        async with self._link.throw_away_channel(queue) as channel:
            return (await channel.queue_purge(queue)).message_count or 0

    async def delete(self, queue: str) -> int:
        """See base.Transport."""
        async with self._link.throw_away_channel(queue) as channel:
            return (await channel.queue_delete(queue)).message_count or 0

    def blockage(self) -> Blockage:
        """See base.Transport."""
        return self._link.gate.blockage()

    async def closed(self) -> None:
        """See base.Transport."""
        await self._link.closed()

    async def close(self) -> None:
        """See base.Transport."""
        await self._link.close()

    async def _make_queue(self, spec: QueueSpec) -> None:
        # On the consuming connection, for an exclusive queue may be consumed only where it was declared.
        async with self._link.throw_away_channel(spec.name) as channel:
            await channel.queue_declare(
                spec.name, durable=spec.durable, exclusive=spec.exclusive, arguments=_arguments(spec)
            )

    async def _expect_queue(self, name: str, refusal: Forbidden) -> None:
        """It is there already, or we may not even look, and whoever uses it will see. Raises: Forbidden."""
        try:
            is_there = await self.inspect(name) is not None
        except Forbidden:
            return
        if not is_there:
            raise refusal

    async def _bind(self, spec: QueueSpec) -> None:
        for exchange, key in ((exchange_of(spec.name), spec.name), (spec.fanout, "")):
            if exchange:
                await self.declare_exchange(exchange, fanout=exchange == spec.fanout)
                async with self._link.throw_away_channel(spec.name) as channel:
                    await channel.queue_bind(spec.name, exchange, key)

    async def _exchange(self, name: str) -> AbstractExchange | None:
        """The exchange, if it is there: publishing to one that is not would cost us the channel."""
        if not name:
            return self._channel.default_exchange
        if name not in self._exchanges and await self._is_there(name):
            self._exchanges[name] = await self._channel.get_exchange(name, ensure=False)
        return self._exchanges.get(name)

    async def _is_there(self, exchange: str) -> bool:
        try:
            async with self._link.throw_away_channel(exchange) as channel:
                await channel.exchange_declare(exchange, passive=True)
        except Unroutable:
            return False
        except Forbidden:
            pass  # not even a look, as RabbitMQ 4.2.6 and 4.3.0 have it: whoever uses it will see
        return True


def _arguments(spec: QueueSpec) -> dict[str, Any]:
    arguments = {
        "x-max-priority": spec.max_priority or None,
        "x-message-ttl": _ms(spec.message_ttl_s),
        "x-expires": _ms(spec.expires_s),
        "x-dead-letter-exchange": None if spec.dead_letter_to is None else exchange_of(spec.dead_letter_to),
        "x-dead-letter-routing-key": spec.dead_letter_to,
    }
    return {key: value for key, value in arguments.items() if value is not None}


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
