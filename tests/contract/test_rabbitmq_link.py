"""What only a real broker and a real network do: refuse a login, fall silent, be restarted."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import shutil
import ssl
import subprocess
import traceback
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiormq.channel
import aiormq.connection
import pytest
from aio_pika.exceptions import AMQPConnectionError
from broker import Broker, give_up
from link_harness import Inbox, Links, NewQueue, ended, until_gone
from private_broker import free_ports
from proxy import Proxy
from yarl import URL

from mqinfer.errors import Disconnected, MqinferError, Refused, SettingsError, Unroutable
from mqinfer.queues import QueueSpec, new_id
from mqinfer.transports import open_transport, rabbitmq_link
from mqinfer.transports.base import QueueState, Transport
from mqinfer.transports.rabbitmq import RabbitmqTransport
from mqinfer.transports.rabbitmq_connect import AbortableConnection, why

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


async def refusal(url: URL, caplog: pytest.LogCaptureFixture, *, timeout_s: float = 20) -> str:
    """Try to open it; what the person is told. The password is in no message and in no log."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(MqinferError) as caught:
        await open_transport(str(url), timeout_s=timeout_s)
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
    assert words in await refusal(URL(url), caplog, timeout_s=1 if "within 1 s" in words else 20)


@pytest.mark.parametrize("error", [StopAsyncIteration(), asyncio.CancelledError(), IndexError("bytes")])
async def test_whatever_the_client_makes_of_a_broker_that_goes_while_it_says_hello_it_can_be_tried_again(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors were seen to end by the first, when brokers were killed: so aiormq says that the stream has ended."""

    async def connect(self: object, **_: object) -> None:
        raise error

    monkeypatch.setattr(AbortableConnection, "connect", connect)
    with pytest.raises(Refused, match=r"127\.0\.0\.1:5672 hung up while the connection was being opened"):
        await open_transport("amqp://127.0.0.1/")


async def test_an_error_of_no_kind_with_which_the_client_ends_what_waits_on_a_lost_channel_is_a_lost_link(
    links: Links, new_queue: NewQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator was seen to end by it: aiormq rejects futures without a reason with a bare Exception."""
    link, queue, inbox = await links.open(), new_queue(), Inbox()
    await link.declare(queue)
    await link.consume(queue.name, prefetch=1, sink=inbox)
    await link.publish(queue.name, b"body")
    delivery = await inbox.take()

    async def rejected(self: object, *_: object) -> None:
        raise Exception

    monkeypatch.setattr(aiormq.channel.Channel, "basic_ack", rejected)
    with pytest.raises(Disconnected):
        await delivery.ack()
    with pytest.raises(Disconnected):
        await link.closed()


async def test_who_is_cancelled_while_a_connection_is_opened_is_cancelled(servers: dict[str, int]) -> None:
    opening = asyncio.ensure_future(open_transport(f"amqp://127.0.0.1:{servers['silent']}/"))
    await asyncio.wait({opening}, timeout=0.2)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening


async def test_tls_with_a_broker_that_does_not_speak_it_is_refused_in_clear_words(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = URL(amqp_url)
    plain = url.with_scheme("amqps").with_password(SECRET).with_port(url.port)
    assert f"TLS with {url.host}:{url.port} failed" in await refusal(plain, caplog)


async def test_a_connection_that_is_refused_leaves_no_task_behind(
    servers: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "aiormq")  # a captured record would keep the connection alive
    with pytest.raises(Refused):
        await open_transport(f"amqp://127.0.0.1:{servers['nobody']}/")
    gc.collect()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody vouches for, with its key in the same file."""
    if shutil.which("openssl") is None:
        give_up("openssl is not installed")
    path = tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {path} -out {path}.crt -days 1 -subj /CN=test"
    subprocess.run([*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


async def test_messages_go_over_tls_to_a_broker_whose_certificate_the_url_vouches_for(
    amqp_url: str, new_queue: NewQueue, certificate: Path
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    queue, body = new_queue(), bytes(1 << 20)
    async with Proxy(amqp_url, tls=tls) as proxy:
        link = await open_transport(f"{proxy.url}?cafile={certificate}")
        await link.declare(queue)
        await link.publish(queue.name, body)
        assert await link.delete(queue.name) == 1
        await link.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ssl.SSLCertVerificationError(1, "certificate verify failed"),
            "TLS with host:5671 failed: certificate verify failed",
        ),
        (FileNotFoundError(2, "No such file"), "a certificate or key that the URL names can't be read: No such file"),
        (OSError(113, "No route to host"), "host:5671 can't be reached: No route to host"),
        (AMQPConnectionError("anything else"), "the broker at host:5671 refused the connection: anything else"),
    ],
)
def test_a_cause_is_told_in_words(error: Exception, words: str) -> None:
    outer = AMQPConnectionError("anything else")
    outer.__cause__ = error
    assert re.fullmatch(words, why(outer, URL("amqps://host"), 1))


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


async def test_silence_is_a_loss_soon_enough_for_the_promised_time() -> None:
    """aiormq looks once in half a heartbeat, and adds that to what this says."""
    connection = aiormq.connection.Connection("amqp://localhost?heartbeat=10")
    assert vars(connection)["_Connection__heartbeat_grace_timeout"] + 10 / 2 <= 3 * (10 + 1)


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
        assert await link.inspect(queue.name) is not None
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


async def test_a_cancellation_that_aiormq_swallows_still_cancels(links: Links) -> None:
    for delay in range(40):
        link = await links.open()
        task = asyncio.ensure_future(inspect_for_ever(link))
        await asyncio.sleep(delay / 4000)  # so that it meets every stage of opening, asking and closing
        task.cancel()
        _, stuck = await asyncio.wait({task}, timeout=10)
        assert not stuck
        await asyncio.gather(task, return_exceptions=True)
        await link.close()


async def inspect_for_ever(link: Transport) -> None:
    while True:
        await link.inspect("mqinfer.test.not-there")


async def test_to_publish_to_a_queue_that_is_not_there_makes_nothing(links: Links, broker: Broker) -> None:
    link, pipeline = await links.open(), new_id("never")
    for _ in range(2):
        with pytest.raises(Unroutable):
            await link.publish(f"mqinfer.{pipeline}.requests", b"body")
        await link.broadcast(f"mqinfer.{pipeline}.control", b"body")
    assert pipeline not in broker.ctl("list_exchanges", "--quiet", "name")
