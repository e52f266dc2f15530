"""A queue that is deleted and declared again before its consumer's channel has seen it, as on a loaded broker.

RabbitMQ 4 tells consumers in any case; it is RabbitMQ 3 that has to be asked to.
"""

from __future__ import annotations

import asyncio

import pytest
from broker import Broker
from link_harness import Inbox, NewQueue, ended

from mqinfer.errors import Disconnected
from mqinfer.transports.base import QueueState, Transport

pytestmark = pytest.mark.broker

#: The channels that consume the queue see nothing from here on.
SUSPEND = """
    {{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{name}">>)),
    [sys:suspend(element(1, Consumer)) || Consumer <- rabbit_amqqueue:consumers(Queue)].
"""
RESUME = "[catch sys:resume(Channel) || Channel <- rabbit_channel:list()]."


@pytest.fixture
def transport_url(amqp_url: str) -> str:
    """Only RabbitMQ here."""
    return amqp_url


async def test_who_consumed_a_queue_that_was_deleted_and_declared_at_once_is_told(
    broker: Broker, link: Transport, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    await link.declare(queue)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    try:
        suspended = await asyncio.to_thread(broker.ctl, "eval", SUSPEND.format(name=queue.name))
        await other.delete(queue.name)
        await other.declare(queue)
        await other.publish(queue.name, b"for whoever comes next")
    finally:
        await asyncio.to_thread(broker.ctl, "eval", RESUME)
    assert suspended.strip() == "[ok]"
    with pytest.raises(Disconnected, match=f"the broker cancelled the consumer of {queue.name}"):
        await ended(link)
    assert await other.inspect(queue.name) == QueueState(ready=1, consumers=0)
    assert len(inbox) == 0
