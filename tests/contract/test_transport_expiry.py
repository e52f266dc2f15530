"""The contract of base.py over both transports: time to live, dead letters, priorities, queues that expire.

Time is told by a queue, not by sleeping: a message published after another one, with the same time to live, expires
after it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from link_harness import Inbox, Links, NewQueue, until, until_ready

from mqinfer.errors import Unroutable
from mqinfer.transports.base import Delivery, Transport

TTL_S = 0.25

PutBack = Callable[[Links, Transport, Delivery], Awaitable[None]]


async def by_requeue(_links: Links, _holder: Transport, delivery: Delivery) -> None:
    await delivery.requeue()


async def by_close(_links: Links, holder: Transport, _delivery: Delivery) -> None:
    await holder.close()


async def by_loss(links: Links, holder: Transport, _delivery: Delivery) -> None:
    await links.lose(holder)


async def test_what_expires_goes_to_the_dead_letter_queue(link: Transport, new_queue: NewQueue, inbox: Inbox) -> None:
    dead = new_queue()
    queue = new_queue(message_ttl_s=TTL_S, dead_letter_to=dead.name)
    await link.declare(dead)
    await link.declare(queue)
    await link.consume(dead.name, prefetch=1, sink=inbox)
    await link.publish(queue.name, b"body", headers={"reason": "kept"})
    delivery = await inbox.take()
    assert (delivery.body, delivery.queue, delivery.redelivered) == (b"body", dead.name, False)
    assert delivery.headers == {"reason": "kept"}


async def test_a_message_may_have_a_shorter_time_to_live_than_its_queue(
    link: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    dead = new_queue()
    queue = new_queue(message_ttl_s=3600.0, dead_letter_to=dead.name)
    await link.declare(dead)
    await link.declare(queue)
    await link.consume(dead.name, prefetch=1, sink=inbox)
    await link.publish(queue.name, b"body", ttl_s=TTL_S)
    assert await inbox.bodies(1) == [b"body"]


async def test_what_expires_with_no_dead_letter_queue_is_gone(link: Transport, new_queue: NewQueue) -> None:
    nowhere = new_queue()
    for queue in (new_queue(message_ttl_s=TTL_S), new_queue(message_ttl_s=TTL_S, dead_letter_to=nowhere.name)):
        await link.declare(queue)
        await link.publish(queue.name, b"body")
        await until_ready(link, queue.name, 0)


async def test_a_dead_letter_does_not_expire_again(link: Transport, new_queue: NewQueue, inbox: Inbox) -> None:
    dead = new_queue()
    queue = new_queue(dead_letter_to=dead.name)
    await link.declare(dead)
    await link.declare(queue)
    await link.publish(queue.name, b"first", ttl_s=TTL_S)
    await until_ready(link, dead.name, 1)
    await link.publish(queue.name, b"second", ttl_s=TTL_S)
    await until_ready(link, dead.name, 2)
    await link.consume(dead.name, prefetch=0, sink=inbox)
    assert await inbox.bodies(2) == [b"first", b"second"]


@pytest.mark.parametrize("put_back", [by_requeue, by_close, by_loss])
async def test_what_outlived_its_time_while_held_is_dead_lettered_as_soon_as_it_goes_back(
    links: Links, link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox, put_back: PutBack
) -> None:
    dead, clock_dead = new_queue(max_priority=1), new_queue()
    leases = new_queue(message_ttl_s=TTL_S, expires_s=3600.0, dead_letter_to=dead.name)
    clock = new_queue(message_ttl_s=TTL_S, dead_letter_to=clock_dead.name)
    for queue in (dead, clock_dead, leases, clock):
        await link.declare(queue)
    await other.consume(leases.name, prefetch=0, sink=inbox)
    await link.publish(leases.name, b"held", priority=1)
    held = await inbox.take()
    await link.publish(clock.name, b"tick")
    await until_ready(link, clock_dead.name, 1)

    await link.publish(dead.name, b"new")
    await put_back(links, other, held)
    await until_ready(link, dead.name, 2)
    requests = Inbox()
    await link.consume(dead.name, prefetch=0, sink=requests)
    assert await requests.bodies(2) == [b"held", b"new"]
    assert len(inbox) == 0


async def test_what_is_held_does_not_expire(link: Transport, new_queue: NewQueue, inbox: Inbox) -> None:
    dead = new_queue()
    queue = new_queue(message_ttl_s=TTL_S, dead_letter_to=dead.name)
    await link.declare(dead)
    await link.declare(queue)
    subscription = await link.consume(queue.name, prefetch=1, sink=inbox)
    await link.publish(queue.name, b"held")
    held = await inbox.take()
    await subscription.cancel()
    await link.publish(queue.name, b"tick")
    await until_ready(link, dead.name, 1)
    await held.ack()
    await link.consume(dead.name, prefetch=0, sink=inbox)
    assert await inbox.bodies(1) == [b"tick"]


async def test_what_is_held_of_a_queue_that_was_deleted_is_gone(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    dead = new_queue()
    queue = new_queue(message_ttl_s=TTL_S, dead_letter_to=dead.name)
    for spec in (dead, queue):
        await other.declare(spec)
    subscription = await link.consume(queue.name, prefetch=1, sink=inbox)
    await other.publish(queue.name, b"held")
    held = await inbox.take()
    await subscription.cancel()
    await other.delete(queue.name)
    await held.requeue()
    await other.declare(queue)
    await other.publish(queue.name, b"tick")
    await until_ready(other, dead.name, 1)
    await link.consume(dead.name, prefetch=1, sink=inbox)
    assert await inbox.bodies(1) == [b"tick"]


async def test_a_higher_priority_goes_first_and_one_above_the_most_counts_as_the_most(
    link: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue(max_priority=2)
    await link.declare(queue)
    for number, priority in enumerate((0, 1, 2, 0, 9, 1)):
        await link.publish(queue.name, b"%d" % number, priority=priority)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    assert await inbox.bodies(6) == [b"2", b"4", b"1", b"5", b"0", b"3"]


async def test_a_queue_without_priorities_keeps_the_order(link: Transport, new_queue: NewQueue, inbox: Inbox) -> None:
    queue = new_queue()
    await link.declare(queue)
    for number, priority in enumerate((0, 1, 0)):
        await link.publish(queue.name, b"%d" % number, priority=priority)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    assert await inbox.bodies(3) == [b"0", b"1", b"2"]


async def test_a_queue_that_nobody_uses_for_its_time_is_gone(link: Transport, new_queue: NewQueue) -> None:
    queue = new_queue(expires_s=TTL_S)
    await link.declare(queue)

    async def gone() -> bool:  # publishing is no use of the queue, inspecting it would be
        try:
            await link.publish(queue.name, b"body")
        except Unroutable:
            return True
        return False

    await until(gone)
