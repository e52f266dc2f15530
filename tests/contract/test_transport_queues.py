"""The contract of base.py over both transports: declaring, inspecting, purging and deleting queues."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from link_harness import Inbox, NewQueue

from mqinfer.errors import Refused, Unroutable
from mqinfer.queues import new_id
from mqinfer.transports.base import QueueState, Transport


async def test_declaring_twice_alike_is_harmless(link: Transport, other: Transport, new_queue: NewQueue) -> None:
    dead = new_queue()
    queue = new_queue(max_priority=1, message_ttl_s=3600.0, expires_s=3600.0, dead_letter_to=dead.name)
    await link.declare(queue)
    await link.publish(queue.name, b"body")
    await other.declare(queue)
    assert await link.inspect(queue.name) == QueueState(ready=1, consumers=0)


@pytest.mark.parametrize("field", ["max_priority", "message_ttl_s", "expires_s", "dead_letter_to"])
async def test_declaring_a_queue_unlike_what_it_is_is_refused_and_harmless(
    link: Transport, new_queue: NewQueue, field: str
) -> None:
    queue = new_queue(max_priority=1, message_ttl_s=3600.0, expires_s=3600.0, dead_letter_to="dead")
    others: dict[str, Any] = {
        "max_priority": 2,
        "message_ttl_s": None,
        "expires_s": 60.0,
        "dead_letter_to": None,
        "durable": False,
    }
    await link.declare(queue)
    with pytest.raises(Refused, match=queue.name):
        await link.declare(replace(queue, **{field: others[field]}))
    await link.publish(queue.name, b"body")


async def test_a_binding_may_be_added_to_a_queue_that_is_there(
    link: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue, exchange = new_queue(), f"mqinfer.{new_id('test')}.control"
    await link.declare(queue)
    await link.declare(replace(queue, fanout=exchange))
    await link.broadcast(exchange, b"body")
    await link.consume(queue.name, prefetch=1, sink=inbox)
    assert await inbox.bodies(1) == [b"body"]


async def test_inspecting_tells_ready_messages_and_consumers(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    assert await link.inspect(queue.name) is None
    await link.declare(queue)
    for _ in range(3):
        await link.publish(queue.name, b"body")
    assert await other.inspect(queue.name) == QueueState(ready=3, consumers=0)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    await inbox.take()
    assert await other.inspect(queue.name) == QueueState(ready=2, consumers=1)


async def test_purging_removes_what_is_ready_and_leaves_what_is_held(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    await link.declare(queue)
    for _ in range(4):
        await link.publish(queue.name, b"body")
    await link.consume(queue.name, prefetch=1, sink=inbox)
    held = await inbox.take()
    assert await other.purge(queue.name) == 3
    assert await other.inspect(queue.name) == QueueState(ready=0, consumers=1)
    await held.requeue()
    assert await inbox.bodies(1) == [b"body"]


async def test_purging_a_queue_that_does_not_exist_is_unroutable_and_harmless(
    link: Transport, new_queue: NewQueue
) -> None:
    missing = new_queue()
    with pytest.raises(Unroutable, match=missing.name):
        await link.purge(missing.name)
    await link.declare(missing)


async def test_deleting_tells_what_went_and_deleting_nothing_is_no_error(link: Transport, new_queue: NewQueue) -> None:
    queue = new_queue()
    await link.declare(queue)
    for _ in range(2):
        await link.publish(queue.name, b"body")
    assert await link.delete(queue.name) == 2
    assert await link.delete(queue.name) == 0
    assert await link.inspect(queue.name) is None
    with pytest.raises(Unroutable):
        await link.publish(queue.name, b"body")


async def test_a_queue_that_was_deleted_can_be_declared_otherwise(link: Transport, new_queue: NewQueue) -> None:
    queue = new_queue(fanout=f"mqinfer.{new_id('test')}.control")
    await link.declare(queue)
    await link.publish(queue.name, b"body")
    await link.delete(queue.name)
    await link.declare(replace(queue, max_priority=1, fanout=None))
    await link.broadcast(queue.fanout or "", b"not bound any more")
    assert await link.inspect(queue.name) == QueueState(ready=0, consumers=0)
