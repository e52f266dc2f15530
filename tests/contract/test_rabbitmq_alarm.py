"""A broker short of memory or disk: who publishes waits as long as that takes, says so, and what is sent comes once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from broker import Broker
from fakes import make_plan
from link_harness import Inbox, Links, NewQueue, ended, until_ready

from mqinfer import survey
from mqinfer.errors import Disconnected
from mqinfer.observe import LINK_BLOCKED, LINK_UNBLOCKED, add_sink
from mqinfer.queues import Topology, new_id
from mqinfer.transports.base import Transport

pytestmark = pytest.mark.broker

#: What the broker calls an alarm -> how to raise it, and to end it.
ALARMS = {
    "memory": (("set_vm_memory_high_watermark", "0"), ("set_vm_memory_high_watermark", "0.4")),
    "disk": (("set_disk_free_limit", "900000GB"), ("set_disk_free_limit", "50MB")),
}
#: Far below how long an alarm lasts here.
TIMEOUT_S = 0.5


@pytest.fixture
def transport_url(amqp_url: str) -> str:
    """Only RabbitMQ here."""
    return amqp_url


class Alarm:
    """One kind of alarm of the broker."""

    def __init__(self, broker: Broker, kind: str) -> None:
        self._broker = broker
        self.kind = kind

    async def begin(self) -> None:
        await asyncio.to_thread(self._broker.ctl, *ALARMS[self.kind][0])

    async def end(self) -> None:
        await asyncio.to_thread(self._broker.ctl, *ALARMS[self.kind][1])


@pytest.fixture(params=ALARMS)
def alarm(broker: Broker, request: pytest.FixtureRequest) -> Iterator[Alarm]:
    """The test runs once for each kind; there is no alarm after it."""
    yield Alarm(broker, request.param)
    broker.ctl(*ALARMS[request.param][1])


@pytest.fixture
def memory(broker: Broker) -> Iterator[Alarm]:
    """Where the kind makes no difference."""
    yield Alarm(broker, "memory")
    broker.ctl(*ALARMS["memory"][1])


@pytest.fixture
def told() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What was emitted about blocked links."""
    events: list[tuple[str, dict[str, Any]]] = []
    forget = add_sink(lambda event, fields: events.append((event, dict(fields))))
    yield events
    forget()


async def blocked(link: Transport, publishing: asyncio.Future[None]) -> None:
    """Until the link knows that it is blocked, and longer than a deadline."""
    async with asyncio.timeout(20):
        while not link.blockage().reason:
            await asyncio.sleep(0.01)
    done, _ = await asyncio.wait({publishing}, timeout=3 * TIMEOUT_S)
    assert not done


async def test_a_publish_waits_for_the_end_of_an_alarm_and_its_message_comes_once(
    alarm: Alarm,
    links: Links,
    other: Transport,
    new_queue: NewQueue,
    inbox: Inbox,
    told: list[tuple[str, dict[str, Any]]],
) -> None:
    queue = new_queue()
    link = await links.open(name="test", timeout_s=TIMEOUT_S)
    await link.declare(queue)
    await alarm.begin()
    first = asyncio.ensure_future(link.publish(queue.name, b"on the way when the alarm is noticed"))
    await blocked(link, first)
    second = asyncio.ensure_future(link.publish(queue.name, b"begun during the alarm"))
    given_up = asyncio.ensure_future(link.publish(queue.name, b"cancelled during the alarm"))
    await blocked(link, second)
    given_up.cancel()
    assert alarm.kind in link.blockage().reason
    assert link.blockage().total_s > TIMEOUT_S

    await alarm.end()
    await asyncio.wait_for(asyncio.gather(first, second), 20)
    assert link.blockage().reason == ""
    assert link.blockage().total_s > TIMEOUT_S
    await until_ready(other, queue.name, 2)
    await link.publish(queue.name, b"after it")
    await link.consume(queue.name, prefetch=0, sink=inbox)
    assert await inbox.bodies(3) == [
        b"on the way when the alarm is noticed",
        b"begun during the alarm",
        b"after it",
    ]
    assert [event for event, _ in told] == [LINK_BLOCKED, LINK_UNBLOCKED]
    assert told[0][1].keys() == {"link", "reason"}
    assert told[1][1]["seconds"] > TIMEOUT_S


async def test_acks_and_deliveries_go_on_during_an_alarm(
    memory: Alarm, links: Links, other: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    link = await links.open(timeout_s=TIMEOUT_S * 10)
    await link.declare(queue)
    for body in (b"a", b"b"):
        await link.publish(queue.name, body)
    await memory.begin()
    publishing = asyncio.ensure_future(link.publish(queue.name, b"c"))
    await blocked(link, publishing)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    assert await inbox.bodies(2) == [b"a", b"b"]
    await memory.end()
    assert await inbox.bodies(1) == [b"c"]
    await publishing


async def test_a_blocked_link_that_dies_ends_by_its_heartbeat(memory: Alarm, links: Links, new_queue: NewQueue) -> None:
    queue = new_queue()
    link = await links.open(heartbeat_s=1, timeout_s=TIMEOUT_S)
    await link.declare(queue)
    await memory.begin()
    first = asyncio.ensure_future(link.publish(queue.name, b"sent"))
    await blocked(link, first)
    second = asyncio.ensure_future(link.publish(queue.name, b"held back"))
    links.proxy(link).swallow()
    with pytest.raises(Disconnected):
        await ended(link)
    for publishing in (first, second):
        with pytest.raises(Disconnected):
            await asyncio.wait_for(publishing, 20)
    assert link.blockage().reason == ""


async def test_a_blocked_link_can_be_closed(memory: Alarm, links: Links, new_queue: NewQueue) -> None:
    queue = new_queue()
    link = await links.open(timeout_s=TIMEOUT_S)
    await link.declare(queue)
    await memory.begin()
    publishing = [asyncio.ensure_future(link.publish(queue.name, bytes(4 << 20))) for _ in range(3)]
    await blocked(link, publishing[0])
    await asyncio.wait_for(link.close(), 20)
    for ending in publishing:
        with pytest.raises(Disconnected):
            await ending


async def test_a_link_with_more_to_send_than_the_socket_takes_outlives_a_long_alarm(
    memory: Alarm, links: Links, new_queue: NewQueue
) -> None:
    queue = new_queue()
    link = await links.open(heartbeat_s=1, timeout_s=TIMEOUT_S)
    await link.declare(queue)
    await memory.begin()
    publishing = [asyncio.ensure_future(link.publish(queue.name, bytes(8 << 20))) for _ in range(4)]
    await blocked(link, publishing[0])
    done, _ = await asyncio.wait(publishing, timeout=16)
    assert not done
    await memory.end()
    await asyncio.wait_for(asyncio.gather(*publishing), 60)


async def test_a_survey_during_an_alarm_says_so_and_still_sees_the_queues(
    memory: Alarm, links: Links, new_queue: NewQueue
) -> None:
    plan = make_plan(new_id("test"))
    link = await links.open(timeout_s=TIMEOUT_S)
    requests = new_queue()
    await link.declare(requests)
    await link.declare(Topology(plan.name).coordinator("c-1"))  # somebody who could be asked
    await memory.begin()
    async with asyncio.timeout(20):
        seen = await survey.take(link, plan)
    assert "memory or disk alarm" in seen.complaint()
    assert "memory" in seen.blocked
    assert await link.inspect(requests.name) is not None
