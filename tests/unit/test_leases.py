"""Leases over a memory broker: at no instant is a request unowned, and never are more held than may be."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from mqinfer import leases
from mqinfer.leases import Intake, Lease, LeaseQueue
from mqinfer.messages import Request
from mqinfer.queues import QueueSpec, Topology, new_id
from mqinfer.transports.base import Delivery, Sink, Subscription
from mqinfer.transports.memory import MemoryTransport, open_memory
from mqinfer.wire import decode, encode

PATIENCE_S = 10.0
TOPOLOGY = Topology("t")
REQUESTS = TOPOLOGY.requests
KEPT = TOPOLOGY.leases("c-1")


def make_request(output: tuple[int, ...] = ()) -> Request:
    return Request(id="r", job="j", plan="p", prompt=(1, 2), output=output, max_tokens=9)


class Gate:
    """A transport's deliveries wait here while it is shut."""

    def __init__(self, transport: MemoryTransport) -> None:
        self._transport = transport
        self._waiting: list[tuple[Sink, Delivery]] = []
        self.arrived = asyncio.Event()
        self.shut = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    async def consume(self, queue: str, *, prefetch: int, sink: Sink) -> Subscription:
        return await self._transport.consume(queue, prefetch=prefetch, sink=lambda delivery: self._pass(sink, delivery))

    def open(self) -> None:
        self.shut = False
        for sink, delivery in self._waiting:
            sink(delivery)
        self._waiting.clear()

    def _pass(self, sink: Sink, delivery: Delivery) -> None:
        if self.shut:
            self._waiting.append((sink, delivery))
            self.arrived.set()
        else:
            sink(delivery)


class Bench:
    """A coordinator's link with a lease on a request, and another link to look with."""

    def __init__(self, spec: QueueSpec = KEPT) -> None:
        self.broker = new_id("test")
        self.transport = open_memory(self.broker)
        self.gate = Gate(self.transport)
        self.other = open_memory(self.broker)
        self.spec = spec
        self.queue = LeaseQueue(self.gate, spec)

    async def lease(self) -> Lease:
        await self.transport.declare(REQUESTS)
        await self.queue.open()
        await self.transport.publish(REQUESTS.name, encode(make_request()), persistent=True)
        return Lease(await take(self.transport, REQUESTS.name), 1, 0.0)

    async def ready(self, spec: QueueSpec) -> int:
        state = await self.other.inspect(spec.name)
        return -1 if state is None else state.ready

    async def unsettled(self) -> int:
        return len(self.transport.unsettled)


async def take(transport: MemoryTransport, queue: str) -> Delivery:
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    await transport.consume(queue, prefetch=1, sink=arrived.put_nowait)
    return await asyncio.wait_for(arrived.get(), PATIENCE_S)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.transport.close()
    await bench.other.close()


async def test_a_settled_request_is_gone(bench: Bench) -> None:
    lease = await bench.lease()
    await lease.settle()
    assert (await bench.ready(REQUESTS), await bench.unsettled()) == (0, 0)


async def test_a_request_given_back_is_there_for_others(bench: Bench) -> None:
    lease = await bench.lease()
    await bench.transport.close()
    assert decode((await take(bench.other, REQUESTS.name)).body) == make_request()
    assert lease.round == 1


async def test_a_renewed_lease_holds_the_checkpoint_and_no_longer_the_old_delivery(bench: Bench) -> None:
    lease = await bench.lease()
    old = lease.delivery
    assert await bench.queue.renew(lease, partial(make_request, (7, 8)), 5.0)
    assert lease.delivery is not old
    assert decode(lease.delivery.body) == make_request((7, 8))
    assert (lease.round, lease.renewed_at_s) == (-1, 5.0)
    assert await bench.unsettled() == 1
    await lease.settle()
    assert await bench.unsettled() == 0


async def test_a_lease_is_renewed_again_and_again(bench: Bench) -> None:
    lease = await bench.lease()
    for count in range(1, 6):
        assert await bench.queue.renew(lease, partial(make_request, (7,) * count), count)
    assert decode(lease.delivery.body) == make_request((7,) * 5)
    assert (await bench.unsettled(), await bench.ready(KEPT)) == (1, 0)


async def test_leases_renewed_together_do_not_get_each_other_s_checkpoints(bench: Bench) -> None:
    await bench.lease()
    held = []
    for number in range(10):
        await bench.transport.publish(REQUESTS.name, encode(make_request((number,))))
        held.append(Lease(await take(bench.other, REQUESTS.name), 1, 0.0))
    bench.gate.shut = True
    renewing = [
        asyncio.ensure_future(bench.queue.renew(lease, partial(make_request, (number, number)), 1.0))
        for number, lease in enumerate(held)
    ]
    await asyncio.wait_for(bench.gate.arrived.wait(), PATIENCE_S)
    bench.gate.open()
    assert all(await asyncio.gather(*renewing))
    for number, lease in enumerate(held):
        assert decode(lease.delivery.body) == make_request((number, number))


async def test_a_checkpoint_that_comes_late_goes_and_the_old_delivery_holds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEWAL_TIMEOUT_S", 0.01)
    lease = await bench.lease()
    old = lease.delivery
    bench.gate.shut = True
    assert not await bench.queue.renew(lease, partial(make_request, (7,)), 5.0)
    assert (lease.delivery, lease.round, lease.renewed_at_s) == (old, 1, 0.0)
    bench.gate.open()
    await until(lambda: len(bench.transport.unsettled) == 1)
    assert await bench.ready(KEPT) == 0
    await lease.settle()
    assert await bench.unsettled() == 0


async def test_a_result_during_a_renewal_leaves_no_copy_behind(bench: Bench) -> None:
    lease = await bench.lease()
    bench.gate.shut = True
    renewing = asyncio.ensure_future(bench.queue.renew(lease, partial(make_request, (7,)), 5.0))
    await asyncio.wait_for(bench.gate.arrived.wait(), PATIENCE_S)
    settling = asyncio.ensure_future(lease.settle())
    await asyncio.sleep(0)
    bench.gate.open()
    assert await asyncio.wait_for(renewing, PATIENCE_S)
    await asyncio.wait_for(settling, PATIENCE_S)
    assert (await bench.unsettled(), await bench.ready(KEPT), await bench.ready(REQUESTS)) == (0, 0, 0)


async def test_the_checkpoints_of_a_dead_coordinator_become_requests() -> None:
    bench = Bench(replace(KEPT, message_ttl_s=0.01))
    lease = await bench.lease()
    assert await bench.queue.renew(lease, partial(make_request, (7, 8)), 5.0)
    await bench.transport.lose()
    assert decode((await take(bench.other, REQUESTS.name)).body) == make_request((7, 8))
    assert await bench.ready(REQUESTS) == 0
    await bench.other.close()


async def test_an_empty_lease_queue_is_removed_when_it_is_closed(bench: Bench) -> None:
    lease = await bench.lease()
    await bench.queue.renew(lease, partial(make_request, (7,)), 5.0)
    await lease.settle()
    await bench.queue.close()
    assert await bench.ready(KEPT) == -1


async def test_a_lease_queue_that_holds_something_stays_when_it_is_closed(bench: Bench) -> None:
    lease = await bench.lease()
    await bench.queue.renew(lease, partial(make_request, (7,)), 5.0)
    await bench.queue._subscription.cancel()
    await lease.delivery.requeue()
    await bench.queue.close()
    assert await bench.ready(KEPT) == 1


class Renewed:
    """The delivery of a renewed lease: not one of the intake's."""

    async def ack(self) -> None:
        """Nothing to do."""


class Taker:
    """Takes requests as a coordinator does, and counts."""

    def __init__(self, transport: MemoryTransport, limit: int) -> None:
        self.limit = limit
        self.held: list[Lease] = []
        self.most = 0
        self.intake = Intake(transport, REQUESTS.name, limit, self._arrived, self._count)

    def _arrived(self, delivery: Delivery, round_: int) -> None:
        self.held.append(Lease(delivery, round_, 0.0))
        self.most = max(self.most, len(self.held))

    def _count(self, round_: int) -> tuple[int, int]:
        return len(self.held), sum(lease.round == round_ for lease in self.held)

    async def tune(self) -> None:
        await self.intake.tune()

    async def settle(self, count: int) -> None:
        for _ in range(min(count, len(self.held))):
            await self.held.pop(0).settle()
            await self.tune()

    async def renew(self, count: int) -> None:
        """What a renewal means to the intake: the delivery is settled, the lease is still held."""
        await self.intake.pause()
        for lease in self.held[:count]:
            if lease.round != -1:
                await lease.settle()
                lease.round, lease.delivery = -1, Renewed()  # type: ignore[assignment]
        await self.tune()


async def taker(limit: int, requests: int) -> Taker:
    transport = open_memory(new_id("test"))
    await transport.declare(REQUESTS)
    for number in range(requests):
        await transport.publish(REQUESTS.name, encode(make_request((number,))))
    return Taker(transport, limit)


async def test_no_more_requests_come_than_the_limit() -> None:
    taking = await taker(8, 30)
    await taking.tune()
    await until(lambda: len(taking.held) == 8)
    await taking.tune()
    assert (taking.most, taking.intake.round) == (8, 1)


async def test_what_is_settled_makes_room_without_a_new_round() -> None:
    taking = await taker(8, 30)
    await taking.tune()
    await until(lambda: len(taking.held) == 8)
    await taking.settle(5)
    await until(lambda: len(taking.held) == 8)
    assert (taking.most, taking.intake.round) == (8, 1)


async def test_nothing_comes_while_the_intake_is_paused_or_stopped() -> None:
    taking = await taker(8, 30)
    await taking.tune()
    await until(lambda: len(taking.held) == 8)
    await taking.intake.pause()
    await taking.held.pop().settle()
    await asyncio.sleep(0)
    assert len(taking.held) == 7
    await taking.intake.stop()
    await taking.tune()
    await asyncio.sleep(0)
    assert len(taking.held) == 7


async def test_where_all_is_renewed_nothing_more_comes() -> None:
    taking = await taker(4, 30)
    await taking.tune()
    await until(lambda: len(taking.held) == 4)
    await taking.renew(4)
    await asyncio.sleep(0)
    assert len(taking.held) == 4
    await taking.settle(1)
    await until(lambda: len(taking.held) == 4)
    assert taking.most == 4


async def test_a_round_that_fits_is_not_turned_again() -> None:
    taking = await taker(8, 30)
    await taking.tune()
    await until(lambda: len(taking.held) == 8)
    await taking.renew(4)
    await taking.settle(1)
    await until(lambda: len(taking.held) == 8)
    await taking.tune()
    await taking.held.pop().settle()
    await taking.tune()
    await until(lambda: len(taking.held) == 8)
    assert (taking.most, taking.intake.round) == (8, 2)


@pytest.mark.parametrize("limit", [1, 2, 7, 32])
async def test_renewed_or_not_never_more_are_held_than_the_limit_and_all_are_answered(limit: int) -> None:
    chance = random.Random(limit)
    taking = await taker(limit, 300)
    await taking.tune()
    answered = 0
    async with asyncio.timeout(PATIENCE_S):
        while answered < 300:
            await asyncio.sleep(0)
            if chance.random() < 0.3:
                await taking.renew(chance.randint(0, limit))
            before = len(taking.held)
            count = min(chance.randint(0, limit), before)
            await taking.settle(count)
            answered += count
            assert taking.most <= limit


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)
