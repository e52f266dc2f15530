"""What only a memory broker does: it is dropped by tests, and it ends with its event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from link_harness import Inbox, ended

from mqinfer.errors import Disconnected, Unroutable
from mqinfer.queues import QueueSpec, new_id
from mqinfer.transports import open_transport
from mqinfer.transports.base import QueueState
from mqinfer.transports.memory import drop, restart

QUEUE = QueueSpec(name="queue")


async def test_links_of_one_name_share_a_broker_and_those_of_another_do_not() -> None:
    name = new_id("test")
    links = [await open_transport(f"memory://{name}") for _ in range(2)]
    stranger = await open_transport(f"memory://{name}-other")
    await links[0].declare(QUEUE)
    assert await links[1].inspect(QUEUE.name) == QueueState(ready=0, consumers=0)
    assert await stranger.inspect(QUEUE.name) is None


async def test_a_broker_that_is_dropped_takes_its_links_and_queues_with_it() -> None:
    name = new_id("test")
    link, stranger = await open_transport(f"memory://{name}"), await open_transport("memory://")
    await link.declare(QUEUE)
    drop(name)
    drop(name)
    with pytest.raises(Disconnected, match="dropped"):
        await ended(link)
    assert await (await open_transport(f"memory://{name}")).inspect(QUEUE.name) is None
    await stranger.inspect(QUEUE.name)


def test_a_broker_ends_with_its_event_loop() -> None:
    async def once() -> None:
        link = await open_transport("memory://the-same-name")
        with pytest.raises(Unroutable):
            await link.publish(QUEUE.name, b"body")
        await link.declare(QUEUE)
        await link.publish(QUEUE.name, b"body", ttl_s=3600.0)

    for _ in range(2):
        asyncio.run(once())


async def test_a_body_that_its_publisher_changes_later_stays_what_it_was() -> None:
    link, inbox = await open_transport(f"memory://{new_id('test')}"), Inbox()
    await link.declare(QUEUE)
    buffer: Any = bytearray(b"before")
    await link.publish(QUEUE.name, buffer)
    buffer[:] = b"after!"
    await link.consume(QUEUE.name, prefetch=1, sink=inbox)
    assert await inbox.bodies(1) == [b"before"]


async def test_a_restarted_broker_keeps_persistent_messages_in_durable_queues_and_nothing_else() -> None:
    name = new_id("test")
    link = await open_transport(f"memory://{name}")
    for spec in (QUEUE, QueueSpec(name="mine", durable=False, exclusive=True)):
        await link.declare(spec)
        for persistent in (True, False):
            await link.publish(spec.name, b"kept" if persistent else b"gone", persistent=persistent)
    held = Inbox()
    await link.consume(QUEUE.name, prefetch=1, sink=held)
    assert (await held.take()).body == b"kept"
    restart(name)
    with pytest.raises(Disconnected, match="restarted"):
        await ended(link)
    later, inbox = await open_transport(f"memory://{name}"), Inbox()
    assert await later.inspect("mine") is None
    assert await later.inspect(QUEUE.name) == QueueState(ready=1, consumers=0)
    await later.consume(QUEUE.name, prefetch=0, sink=inbox)
    assert await inbox.bodies(1) == [b"kept"]
