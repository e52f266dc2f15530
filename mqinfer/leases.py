"""Leases on requests: who holds an unsettled delivery of a request owns it until the result is confirmed.

A lease is renewed by publishing the request with the tokens it has so far to the coordinator's own lease
queue, taking that delivery, and only then settling the old one: at no instant is the request unowned. When the
coordinator dies, everything in its lease queue has outlived its time to live and goes to `requests` at once.
Nothing about rows or microbatches belongs here.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from mqinfer.messages import Request
from mqinfer.observe import CHECKPOINT_KEPT, CHECKPOINT_LATE, emit
from mqinfer.queues import PRIORITY_BEGUN, QueueSpec
from mqinfer.transports.base import Delivery, Subscription, Transport
from mqinfer.wire import encode

#: A checkpoint that was published and confirmed must be delivered to us within this.
RENEWAL_TIMEOUT_S = 20.0


class Lease:
    """The right and duty to answer one request."""

    def __init__(self, delivery: Delivery, round_: int, now_s: float) -> None:
        self.delivery = delivery
        #: Which round of the intake its delivery counts against; -1: it came by the lease queue.
        self.round = round_
        self.renewed_at_s = now_s
        self.lock = asyncio.Lock()

    async def settle(self) -> None:
        """The result is confirmed: the request goes."""
        async with self.lock:
            await self.delivery.ack()


class LeaseQueue:
    """One coordinator's own queue of checkpoints."""

    def __init__(self, transport: Transport, spec: QueueSpec) -> None:
        self._transport = transport
        self._spec = spec
        self._numbers = itertools.count()
        self._expected: dict[str, asyncio.Future[Delivery]] = {}
        self._late: set[asyncio.Task[None]] = set()
        self._subscription: Subscription

    async def open(self) -> None:
        """Declare the queue and listen to it. Raises: TransportError."""
        await self._transport.declare(self._spec)
        self._subscription = await self._transport.consume(self._spec.name, prefetch=0, sink=self._arrived)

    async def renew(self, lease: Lease, checkpoint: Callable[[], Request | None], now_s: float) -> Request | None:
        """Keep what `checkpoint` gives as the lease's new state; None if it did not come in time (the old one holds).

        `checkpoint` is asked once nobody else can settle the lease; it gives None where its row has ended meanwhile.
        """
        number = str(next(self._numbers))
        async with lease.lock:
            request = checkpoint()
            if request is None:
                return None
            arrival = self._expected[number] = asyncio.get_running_loop().create_future()
            try:
                await self._transport.publish(
                    self._spec.name,
                    encode(request),
                    persistent=True,
                    priority=PRIORITY_BEGUN,
                    headers={"renewal": number},
                )
                delivery = await asyncio.wait_for(arrival, RENEWAL_TIMEOUT_S)
            except TimeoutError:
                emit(CHECKPOINT_LATE, request=request.id)
                return None
            finally:
                del self._expected[number]
            old, lease.delivery = lease.delivery, delivery
            lease.round = -1
            lease.renewed_at_s = now_s
            await old.ack()
        emit(CHECKPOINT_KEPT, request=request.id, output_tokens=len(request.output))
        return request

    async def close(self) -> None:
        """Remove the queue where nothing is left in it; a queue that holds something expires by itself."""
        await self._subscription.cancel()
        state = await self._transport.inspect(self._spec.name)
        if state is not None and state.ready == 0:
            await self._transport.delete(self._spec.name)

    def _arrived(self, delivery: Delivery) -> None:
        expected = self._expected.get(delivery.headers.get("renewal", ""))
        if expected is not None and not expected.done():
            expected.set_result(delivery)
            return
        # Too late: the older delivery still holds the lease, or the result is out. Either way this one may go.
        task = asyncio.ensure_future(delivery.ack())
        self._late.add(task)
        task.add_done_callback(self._late.discard)


def slack(limit: int) -> int:
    """How many requests come at a time where `limit` may be held: each time costs a new subscription."""
    return max(limit // 32, min(limit // 8, 4), 1)


class Intake:
    """Takes requests until about `limit` (at most `slack` more) are held at once, renewed leases included.

    A subscription's prefetch bounds only its own deliveries, and a renewed lease no longer counts as one of
    them. So the intake works in rounds: `tune` opens a new one, with a prefetch of just what may still come,
    whenever the present one is too generous or too tight.
    """

    def __init__(
        self,
        transport: Transport,
        queue: str,
        limit: int,
        sink: Callable[[Delivery, int], None],
        held: Callable[[int], tuple[int, int]],
    ) -> None:
        """`held`: given a round, how many requests are held in all, and by deliveries of that round."""
        self._transport = transport
        self._queue = queue
        self._limit = limit
        self._sink = sink
        self._held = held
        self._subscription: Subscription | None = None
        self._prefetch = 0
        self._turning = asyncio.Lock()
        self.round = 0

    async def stop(self) -> None:
        """Nothing comes any more."""
        self._limit = 0
        await self.pause()

    async def pause(self) -> None:
        """Nothing comes until `tune`."""
        async with self._turning:
            await self._cancel()

    async def _cancel(self) -> None:
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            self._prefetch = 0
            await subscription.cancel()

    async def tune(self) -> None:
        """Let come what may."""
        async with self._turning:
            await self._turn()

    async def _turn(self) -> None:
        held, held_of_round = self._held(self.round)
        wanted = max(self._limit - (held - held_of_round), 0)
        if wanted == self._prefetch or (self._prefetch and abs(wanted - self._prefetch) < slack(self._limit)):
            return
        await self._cancel()
        held, _ = self._held(self.round)  # what was on its way has come meanwhile
        self._prefetch = max(self._limit - held, 0)
        if self._prefetch:
            self.round += 1
            round_ = self.round
            self._subscription = await self._transport.consume(
                self._queue, prefetch=self._prefetch, sink=lambda delivery: self._sink(delivery, round_)
            )
