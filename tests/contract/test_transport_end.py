"""The contract of base.py over both transports: the end of a link, and queues that live as long as a link."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from link_harness import Inbox, Links, NewQueue, ended, until_gone

from mqinfer.errors import Disconnected, Refused, Unroutable
from mqinfer.queues import QueueSpec
from mqinfer.transports.base import Transport

Call = Callable[[Transport, QueueSpec], Awaitable[object]]

CALLS: dict[str, Call] = {
    "declare": lambda link, queue: link.declare(queue),
    "publish": lambda link, queue: link.publish(queue.name, b"body"),
    "broadcast": lambda link, queue: link.broadcast(f"{queue.name}.control", b"body"),
    "consume": lambda link, queue: link.consume(queue.name, prefetch=1, sink=Inbox()),
    "inspect": lambda link, queue: link.inspect(queue.name),
    "purge": lambda link, queue: link.purge(queue.name),
    "delete": lambda link, queue: link.delete(queue.name),
}
#: What only the owner of an exclusive queue may do.
OWNER_CALLS = ["declare", "consume", "inspect", "purge", "delete"]


async def take_away(links: Links, link: Transport) -> None:
    """Lose the link and wait until it knows."""
    await links.lose(link)
    with pytest.raises(Disconnected):
        await ended(link)


async def test_closed_returns_after_close_and_closing_twice_is_harmless(link: Transport) -> None:
    await link.close()
    await ended(link)
    await link.close()
    await ended(link)


async def test_closed_raises_when_the_link_is_lost_and_close_does_not_mend_it(links: Links, link: Transport) -> None:
    await take_away(links, link)
    await link.close()
    with pytest.raises(Disconnected):
        await ended(link)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lost", [False, True])
async def test_every_call_after_the_end_raises_disconnected(
    links: Links, link: Transport, new_queue: NewQueue, call: str, lost: bool
) -> None:
    queue = new_queue()
    await link.declare(queue)
    await (take_away(links, link) if lost else link.close())
    with pytest.raises(Disconnected):
        await CALLS[call](link, queue)


@pytest.mark.parametrize("lost", [False, True])
async def test_settling_and_cancelling_after_the_end_raise_disconnected(
    links: Links, link: Transport, new_queue: NewQueue, inbox: Inbox, lost: bool
) -> None:
    queue = new_queue()
    await link.declare(queue)
    await link.publish(queue.name, b"body")
    subscription = await link.consume(queue.name, prefetch=1, sink=inbox)
    delivery = await inbox.take()
    await (take_away(links, link) if lost else link.close())
    for call in (delivery.ack, delivery.requeue, subscription.cancel):
        with pytest.raises(Disconnected):
            await call()


async def test_another_link_is_not_disturbed(
    links: Links, link: Transport, other: Transport, new_queue: NewQueue
) -> None:
    queue = new_queue()
    await other.declare(queue)
    await take_away(links, link)
    await other.publish(queue.name, b"body")


@pytest.mark.parametrize("lost", [False, True])
async def test_an_exclusive_queue_goes_with_its_link(
    links: Links, link: Transport, other: Transport, new_queue: NewQueue, lost: bool
) -> None:
    queue = new_queue(durable=False, exclusive=True)
    await link.declare(queue)
    await other.publish(queue.name, b"body")
    await (links.lose(link) if lost else link.close())
    await until_gone_for_others(other, queue.name)
    with pytest.raises(Unroutable):
        await other.publish(queue.name, b"body")


async def until_gone_for_others(other: Transport, queue: str) -> None:
    """While it exists, asking for another link's queue is refused."""
    while True:
        try:
            return await until_gone(other, queue)
        except Refused:
            continue


async def test_anyone_may_publish_to_an_exclusive_queue(
    link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue(durable=False, exclusive=True)
    await link.declare(queue)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    await other.publish(queue.name, b"yours")
    await link.publish(queue.name, b"mine")
    assert await inbox.bodies(2) == [b"yours", b"mine"]


@pytest.mark.parametrize("call", OWNER_CALLS)
async def test_another_links_exclusive_queue_is_refused_and_both_links_live(
    link: Transport, other: Transport, new_queue: NewQueue, call: str
) -> None:
    queue = new_queue(durable=False, exclusive=True)
    await link.declare(queue)
    with pytest.raises(Refused, match=queue.name):
        await CALLS[call](other, queue)
    await other.publish(queue.name, b"body")
    assert await link.purge(queue.name) == 1
