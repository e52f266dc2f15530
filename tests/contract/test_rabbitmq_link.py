"""What only a real broker and a real network do: refuse a login, fall silent, be restarted."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from broker import Broker
from link_harness import Inbox, Links, NewQueue, ended, until_gone
from private_broker import free_ports
from yarl import URL

from mqinfer.errors import Disconnected, MqinferError, Refused, SettingsError
from mqinfer.queues import QueueSpec
from mqinfer.transports import open_transport, rabbitmq_link
from mqinfer.transports.base import QueueState, Transport
from mqinfer.transports.rabbitmq import RabbitmqTransport

pytestmark = pytest.mark.broker

SECRET = "pass-word-7f3a"


@pytest.fixture
def transport_url(amqp_url: str) -> str:
    """Only RabbitMQ here."""
    return amqp_url


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that takes connections and says nothing."""
    await reader.read()
    writer.close()


async def rude(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that hangs up."""
    writer.close()


@pytest.fixture
async def servers() -> AsyncIterator[dict[str, int]]:
    """Ports of servers that are no brokers."""
    async with AsyncExitStack() as stack:
        ports = {"nobody": free_ports(1)[0]}
        for server in (silent, rude):
            running = await stack.enter_async_context(await asyncio.start_server(server, "127.0.0.1", 0))
            ports[server.__name__] = running.sockets[0].getsockname()[1]
        yield ports


async def refusal(url: URL, caplog: pytest.LogCaptureFixture) -> str:
    """Try to open it; what the person is told. The password is in no message and in no log."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(MqinferError) as caught:
        await open_transport(str(url), timeout_s=1)
    assert SECRET not in caplog.text + "".join(traceback.format_exception(caught.value))
    assert isinstance(caught.value, Refused)
    return str(caught.value)


async def test_a_wrong_password_is_refused_in_clear_words(amqp_url: str, caplog: pytest.LogCaptureFixture) -> None:
    assert "wrong user or password" in await refusal(URL(amqp_url).with_password(SECRET), caplog)


async def test_a_vhost_that_does_not_exist_is_refused_in_clear_words(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert "vhost 'no-such'" in await refusal(URL(amqp_url).with_path("/no-such"), caplog)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"amqp://guest:{SECRET}@127.0.0.1:nobody/", "nothing listens at 127.0.0.1:"),
        (f"amqp://guest:{SECRET}@localhost:nobody/", "nothing listens at localhost:"),
        (f"amqp://guest:{SECRET}@no-such-host.invalid/", "the host no-such-host.invalid is unknown"),
        (f"amqp://guest:{SECRET}@127.0.0.1:silent/", "did not answer within 1 s"),
        (f"amqp://guest:{SECRET}@127.0.0.1:rude/", "does not speak AMQP"),
        (f"amqps://guest:{SECRET}@127.0.0.1:silent/", "did not answer within 1 s"),
    ],
)
async def test_an_address_where_no_broker_answers_is_refused_in_clear_words(
    servers: dict[str, int], url: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, port in servers.items():
        url = url.replace(f":{name}/", f":{port}/")
    assert words in await refusal(URL(url), caplog)


async def test_tls_with_a_broker_that_does_not_speak_it_is_refused_in_clear_words(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = URL(amqp_url)
    plain = url.with_scheme("amqps").with_password(SECRET).with_port(url.port)
    assert f"TLS with {url.host}:{url.port} failed" in await refusal(plain, caplog)


@pytest.mark.parametrize("url", [f"http://guest:{SECRET}@host", f"amqp://guest:{SECRET}@host:port", "amqp:///", "host"])
async def test_what_is_no_url_of_a_broker_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        await open_transport(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("connection", [0, 1])
async def test_the_loss_of_either_connection_ends_the_link(
    links: Links, link: Transport, other: Transport, new_queue: NewQueue, connection: int
) -> None:
    queue = new_queue(durable=False, exclusive=True)
    await link.declare(queue)
    links.proxy(link).cut(only=connection)
    with pytest.raises(Disconnected):
        await ended(link)
    await link.close()
    await until_gone(other, queue.name)


async def test_a_link_on_which_nothing_is_heard_any_more_is_lost_by_its_heartbeat(
    links: Links, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    link = await links.open(heartbeat_s=1)
    await link.declare(queue)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    links.proxy(link).swallow()
    publishing = asyncio.ensure_future(link.publish(queue.name, b"body"))
    with pytest.raises(Disconnected):
        await ended(link)
    with pytest.raises(Disconnected):
        await publishing


async def test_a_publish_that_is_not_confirmed_in_time_ends_the_link(links: Links, new_queue: NewQueue) -> None:
    queue = new_queue()
    link = await links.open(timeout_s=0.5)
    await link.declare(queue)
    links.proxy(link).swallow()
    with pytest.raises(Disconnected, match="did not answer in time"):
        await link.publish(queue.name, b"body")
    with pytest.raises(Disconnected, match="did not answer in time"):
        await ended(link)


async def test_cancelling_a_task_that_waits_for_a_dead_link_cancels_it(links: Links, new_queue: NewQueue) -> None:
    queue = new_queue()
    link = await links.open()
    await link.declare(queue)
    links.proxy(link).swallow()
    publishing = asyncio.ensure_future(link.publish(queue.name, b"body"))
    await asyncio.sleep(0)
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing


@pytest.mark.parametrize("pending_bytes", [0, 32 << 20])
async def test_closing_a_dead_link_returns(
    links: Links, new_queue: NewQueue, monkeypatch: pytest.MonkeyPatch, pending_bytes: int
) -> None:
    monkeypatch.setattr(rabbitmq_link, "CLOSE_TIMEOUT_S", 0.2)
    queue = new_queue()
    link = await links.open()
    await link.declare(queue)
    links.proxy(link).swallow()
    publishing = asyncio.ensure_future(link.publish(queue.name, bytes(pending_bytes)))
    await asyncio.sleep(0)
    await link.close()
    await ended(link)
    with pytest.raises(Disconnected):
        await publishing


def traces(link: RabbitmqTransport) -> list[int]:
    """How many channels there are, and how many callbacks wait for the end of each connection."""
    transports = [connection.transport for connection in (link._link.publishing, link._link.consuming)]
    raws: list[Any] = [transport.connection for transport in transports if transport]
    return [len(found) for raw in raws for found in (raw.channels, raw._closing._callbacks)]


async def test_questions_and_subscriptions_leave_no_channel_behind(
    link: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    assert isinstance(link, RabbitmqTransport)
    queue, missing = new_queue(), new_queue()
    await link.declare(queue)
    before = traces(link)
    for _ in range(10):
        assert await link.inspect(missing.name) is None
        await link.publish(queue.name, b"body")
        subscription = await link.consume(queue.name, prefetch=1, sink=inbox)
        delivery = await inbox.take()
        await subscription.cancel()
        await delivery.ack()
    assert traces(link) == before


async def test_what_is_persistent_outlives_a_restart_of_the_broker_and_the_rest_does_not(
    broker: Broker, links: Links, link: Transport, new_queue: NewQueue, inbox: Inbox
) -> None:
    queue = new_queue()
    mine = new_queue(durable=False, exclusive=True)
    await link.declare(queue)
    await link.declare(mine)
    await link.publish(queue.name, b"persistent", persistent=True)
    await link.publish(queue.name, b"transient")
    await asyncio.to_thread(broker.restart)
    with pytest.raises(Disconnected):
        await ended(link)

    again = await links.open()
    assert await again.inspect(queue.name) == QueueState(ready=1, consumers=0)
    assert await again.inspect(mine.name) is None
    await again.declare(QueueSpec(name=queue.name))
    await again.consume(queue.name, prefetch=1, sink=inbox)
    assert await inbox.bodies(1) == [b"persistent"]
