"""The contract of base.py over both transports: publishing and fan-out."""

from __future__ import annotations

import asyncio

import pytest
from link_harness import Inbox, NewQueue

from mqinfer.errors import Unroutable
from mqinfer.queues import new_id
from mqinfer.transports.base import QueueState, Transport


async def test_messages_arrive_in_the_order_of_publishing(link: Transport, new_queue: NewQueue, inbox: Inbox) -> None:
    queue = new_queue()
    await link.declare(queue)
    bodies = [b"%d" % number for number in range(20)]
    for body in bodies:
        await link.publish(queue.name, body)
    await link.consume(queue.name, prefetch=3, sink=inbox)
    assert await inbox.bodies(20) == bodies


@pytest.mark.parametrize("size_bytes", [0, 1, 4 << 20])
async def test_a_body_of_any_size_arrives_whole(
    link: Transport, new_queue: NewQueue, inbox: Inbox, size_bytes: int
) -> None:
    queue = new_queue()
    body = bytes(range(256)) * (size_bytes // 256) + b"x" * (size_bytes % 256)
    await link.declare(queue)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    await link.publish(queue.name, body)
    (got,) = await inbox.bodies(1)
    assert type(got) is bytes
    assert got == body


async def test_headers_arrive_with_the_body(link: Transport, new_queue: NewQueue, inbox: Inbox) -> None:
    queue = new_queue()
    await link.declare(queue)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    await link.publish(queue.name, b"body", persistent=True, headers={"reason": "a word, ümlaut"})
    delivery = await inbox.take()
    assert delivery.headers == {"reason": "a word, ümlaut"}
    assert delivery.queue == queue.name
    assert not delivery.redelivered


async def test_when_publish_returns_the_broker_has_the_message(
    link: Transport, other: Transport, new_queue: NewQueue
) -> None:
    queue = new_queue()
    await link.declare(queue)
    for count in range(1, 10):
        await link.publish(queue.name, b"body")
        assert await other.inspect(queue.name) == QueueState(ready=count, consumers=0)


async def test_publishing_to_a_queue_that_does_not_exist_is_unroutable_and_harmless(
    link: Transport, new_queue: NewQueue
) -> None:
    queue, missing = new_queue(), new_queue()
    await link.declare(queue)
    with pytest.raises(Unroutable, match=missing.name):
        await link.publish(missing.name, b"body")
    await link.publish(queue.name, b"body")


async def test_of_200_concurrent_publishes_each_learns_its_own_fate(
    link: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue, missing = new_queue(), new_queue()
    await link.declare(queue)
    await link.consume(queue.name, prefetch=0, sink=inbox)
    bodies = [b"%d" % number for number in range(200)]
    targets = [queue.name if number % 4 else missing.name for number in range(200)]
    fates = await asyncio.gather(*map(link.publish, targets, bodies), return_exceptions=True)
    assert [type(fate) for fate in fates] == [
        Unroutable if target == missing.name else type(None) for target in targets
    ]
    assert sorted(await inbox.bodies(150)) == sorted(
        body for body, target in zip(bodies, targets, strict=True) if target == queue.name
    )


async def test_a_publish_that_its_caller_cancels_is_cancelled_and_the_link_lives(
    link: Transport, new_queue: NewQueue
) -> None:
    queue = new_queue()
    await link.declare(queue)
    publishing = asyncio.ensure_future(link.publish(queue.name, b"body"))
    await asyncio.sleep(0)
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing
    await link.publish(queue.name, b"body")


async def test_a_broadcast_reaches_every_bound_queue_once(
    link: Transport, other: Transport, new_queue: NewQueue
) -> None:
    exchange = f"mqinfer.{new_id('test')}.control"
    mine, yours, unbound = Inbox(), Inbox(), Inbox()
    for owner, inbox, fanout in ((link, mine, exchange), (other, yours, exchange), (link, unbound, None)):
        queue = new_queue(durable=False, exclusive=True, fanout=fanout)
        await owner.declare(queue)
        await owner.consume(queue.name, prefetch=0, sink=inbox)
    await link.broadcast(exchange, b"first")
    await other.broadcast(exchange, b"second")
    assert await mine.bodies(2) == await yours.bodies(2) == [b"first", b"second"]
    assert len(mine) + len(yours) + len(unbound) == 0


async def test_each_queue_has_its_own_copy_of_a_broadcast(link: Transport, new_queue: NewQueue) -> None:
    exchange = f"mqinfer.{new_id('test')}.control"
    queues = [new_queue(durable=False, exclusive=True, fanout=exchange) for _ in range(2)]
    inboxes = [Inbox(), Inbox()]
    for queue in queues:
        await link.declare(queue)
    await link.broadcast(exchange, b"body")
    await link.consume(queues[0].name, prefetch=1, sink=inboxes[0])
    await (await inboxes[0].take()).requeue()
    assert (await inboxes[0].take()).redelivered
    await link.consume(queues[1].name, prefetch=1, sink=inboxes[1])
    assert not (await inboxes[1].take()).redelivered


async def test_a_broadcast_that_nobody_listens_to_is_no_error(
    link: Transport, other: Transport, new_queue: NewQueue
) -> None:
    exchange = f"mqinfer.{new_id('test')}.control"
    await link.broadcast(exchange, b"nobody yet")
    await other.declare(new_queue(durable=False, exclusive=True, fanout=exchange))
    await other.close()
    await link.broadcast(exchange, b"nobody any more")
