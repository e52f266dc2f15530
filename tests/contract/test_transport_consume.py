"""The contract of base.py over both transports: prefetch, settling, redelivery and the end of a subscription."""

from __future__ import annotations

import asyncio

import pytest
from link_harness import Inbox, Links, NewQueue, ended, until_ready

from mqinfer.errors import Disconnected, Unroutable
from mqinfer.queues import QueueSpec
from mqinfer.transports.base import Delivery, QueueState, Transport


async def filled(link: Transport, queue: QueueSpec, count: int) -> list[bytes]:
    """Declare the queue and put that many messages into it."""
    await link.declare(queue)
    bodies = [b"%d" % number for number in range(count)]
    for body in bodies:
        await link.publish(queue.name, body)
    return bodies


async def test_no_more_than_prefetch_are_unsettled(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    await filled(other, queue, 6)
    await link.consume(queue.name, prefetch=2, sink=inbox)
    first = await inbox.take()
    second = await inbox.take()
    assert (await other.inspect(queue.name), len(inbox)) == (QueueState(ready=4, consumers=1), 0)
    await second.ack()
    third = await inbox.take()
    assert (await other.inspect(queue.name), len(inbox)) == (QueueState(ready=3, consumers=1), 0)
    await first.ack()
    await third.ack()
    assert await inbox.bodies(3) == [b"3", b"4", b"5"]


async def test_a_prefetch_of_0_means_no_limit(link: Transport, new_queue: NewQueue, inbox: Inbox) -> None:
    queue = new_queue()
    await filled(link, queue, 50)
    await link.consume(queue.name, prefetch=0, sink=inbox)
    held = [await inbox.take() for _ in range(50)]
    assert len({delivery.body for delivery in held}) == 50


async def test_every_subscription_of_a_link_has_its_own_prefetch(link: Transport, new_queue: NewQueue) -> None:
    wide, narrow = Inbox(), Inbox()
    for inbox, prefetch in ((wide, 3), (narrow, 1)):
        queue = new_queue()
        await filled(link, queue, 5)
        await link.consume(queue.name, prefetch=prefetch, sink=inbox)
        held = [await inbox.take() for _ in range(prefetch)]
        await until_ready(link, queue.name, 5 - len(held))
    assert len(wide) + len(narrow) == 0


async def test_consumers_of_a_queue_share_its_messages(link: Transport, other: Transport, new_queue: NewQueue) -> None:
    queue = new_queue()
    mine, yours = Inbox(), Inbox()
    bodies = await filled(link, queue, 6)
    await link.consume(queue.name, prefetch=3, sink=mine)
    await other.consume(queue.name, prefetch=3, sink=yours)
    held = [*[await mine.take() for _ in range(3)], *[await yours.take() for _ in range(3)]]
    assert sorted(delivery.body for delivery in held) == bodies


async def test_what_is_requeued_comes_again_in_its_old_place(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    await filled(link, queue, 4)
    subscription = await link.consume(queue.name, prefetch=2, sink=inbox)
    first, second = await inbox.take(), await inbox.take()
    await subscription.cancel()
    await second.requeue()
    await first.requeue()
    await until_ready(other, queue.name, 4)

    await other.consume(queue.name, prefetch=0, sink=inbox)
    again = [await inbox.take() for _ in range(4)]
    assert [(delivery.body, delivery.redelivered) for delivery in again] == [
        (b"0", True),
        (b"1", True),
        (b"2", False),
        (b"3", False),
    ]


@pytest.mark.parametrize("lost", [False, True])
async def test_what_is_unsettled_when_a_link_ends_is_delivered_again(
    links: Links, link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox, lost: bool
) -> None:
    queue = new_queue()
    await filled(link, queue, 5)
    await other.consume(queue.name, prefetch=3, sink=inbox)
    held = [await inbox.take() for _ in range(3)]
    await held[1].ack()
    held.append(await inbox.take())
    await (links.lose(other) if lost else other.close())
    await until_ready(link, queue.name, 4)

    await link.consume(queue.name, prefetch=0, sink=inbox)
    again = [await inbox.take() for _ in range(4)]
    assert [(delivery.body, delivery.redelivered) for delivery in again] == [
        (b"0", True),
        (b"2", True),
        (b"3", True),
        (b"4", False),
    ]


async def test_what_was_acked_before_a_link_ends_is_gone(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    await filled(link, queue, 50)
    await other.consume(queue.name, prefetch=0, sink=inbox)
    held = [await inbox.take() for _ in range(50)]
    await asyncio.gather(*[delivery.ack() for delivery in held])
    await other.close()
    assert await link.delete(queue.name) == 0


async def test_a_delivery_is_settled_once(link: Transport, new_queue: NewQueue, inbox: Inbox) -> None:
    queue = new_queue()
    await filled(link, queue, 2)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    delivery = await inbox.take()
    await delivery.ack()
    for settle in (delivery.ack, delivery.requeue):
        with pytest.raises(RuntimeError, match="settled once"):
            await settle()
    assert await inbox.bodies(1) == [b"1"]


async def test_after_cancel_no_delivery_comes_and_those_that_came_are_still_ours(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    await filled(other, queue, 5)
    subscription = await link.consume(queue.name, prefetch=2, sink=inbox)
    first, second = await inbox.take(), await inbox.take()
    await subscription.cancel()
    await first.ack()
    await until_ready(other, queue.name, 3)
    assert await other.inspect(queue.name) == QueueState(ready=3, consumers=0)
    await second.requeue()
    await until_ready(other, queue.name, 4)
    assert len(inbox) == 0


async def test_cancelling_while_messages_stream_in_loses_none(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    bodies = await filled(other, queue, 300)
    subscription = await link.consume(queue.name, prefetch=0, sink=inbox)
    await subscription.cancel()
    came = len(inbox)
    acked = await inbox.bodies(came)
    state = await other.inspect(queue.name)
    assert state is not None
    await other.consume(queue.name, prefetch=0, sink=inbox)
    assert acked + await inbox.bodies(state.ready) == bodies


async def test_cancelling_twice_is_harmless_and_the_queue_can_be_consumed_again(
    link: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    await filled(link, queue, 1)
    for _ in range(3):
        subscription = await link.consume(queue.name, prefetch=1, sink=inbox)
        await (await inbox.take()).requeue()
        await subscription.cancel()
        await subscription.cancel()
        for delivery in [await inbox.take() for _ in range(len(inbox))]:
            await delivery.requeue()
    await until_ready(link, queue.name, 1)
    await link.purge(queue.name)
    subscription = await link.consume(queue.name, prefetch=1, sink=inbox)
    await subscription.cancel()
    await subscription.cancel()
    await link.publish(queue.name, b"body")


async def test_consuming_a_queue_that_does_not_exist_is_unroutable_and_harmless(
    link: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue, missing = new_queue(), new_queue()
    with pytest.raises(Unroutable, match=missing.name):
        await link.consume(missing.name, prefetch=1, sink=inbox)
    await filled(link, queue, 1)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    assert await inbox.bodies(1) == [b"0"]


@pytest.mark.parametrize("by_itself", [False, True])
async def test_deleting_a_queue_under_its_consumer_ends_the_consumers_link(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox, by_itself: bool
) -> None:
    queue = new_queue()
    await filled(other, queue, 0)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    await (link if by_itself else other).delete(queue.name)
    with pytest.raises(Disconnected, match=queue.name):
        await ended(link)


async def test_a_sink_never_runs_inside_a_call_of_its_actor(link: Transport, new_queue: NewQueue, inbox: Inbox) -> None:
    tasks: list[asyncio.Task[object] | None] = []

    def sink(delivery: Delivery) -> None:
        tasks.append(asyncio.current_task())
        inbox(delivery)

    queue = new_queue()
    await filled(link, queue, 3)
    await link.consume(queue.name, prefetch=1, sink=sink)
    await (await inbox.take()).requeue()
    await link.publish(queue.name, b"3")
    assert len(await inbox.bodies(4)) == 4
    assert asyncio.current_task() not in tasks


async def test_a_sink_that_raises_ends_the_link_and_loses_no_message(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    def broken(_delivery: Delivery) -> None:
        raise ValueError("a fault of the actor")

    queue = new_queue()
    await filled(other, queue, 2)
    await link.consume(queue.name, prefetch=1, sink=broken)
    with pytest.raises(Disconnected, match="sink") as caught:
        await ended(link)
    assert isinstance(caught.value.__cause__, ValueError)
    await until_ready(other, queue.name, 2)
    await other.consume(queue.name, prefetch=0, sink=inbox)
    assert await inbox.bodies(2) == [b"0", b"1"]
