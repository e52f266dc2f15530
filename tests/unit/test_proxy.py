"""The tests' own proxy does to a connection what it says: otherwise the faults would show nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from urllib.parse import urlsplit

import pytest
from proxy import Proxy

PATIENCE_S = 10.0
#: Long enough to show that nothing comes.
SILENCE_S = 0.2

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """In front of a server that sends back what it gets."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(await asyncio.start_server(echo, "127.0.0.1", 0))
        port = server.sockets[0].getsockname()[1]
        yield await stack.enter_async_context(Proxy(f"amqp://guest@127.0.0.1:{port}/"))


@pytest.fixture
async def connect(proxy: Proxy) -> AsyncIterator[Connect]:
    """Opens connections through the proxy, which are closed in the end."""
    opened: list[asyncio.StreamWriter] = []

    async def connect() -> Streams:
        url = urlsplit(proxy.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        opened.append(writer)
        return reader, writer

    yield connect
    for writer in opened:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def sent(streams: Streams, data: bytes) -> bytes:
    reader, writer = streams
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), PATIENCE_S)


async def test_it_changes_nothing_by_itself(connect: Connect) -> None:
    assert await sent(await connect(), b"hello") == b"hello"


async def test_it_flips_one_byte_of_a_long_enough_chunk_to_the_broker_once(proxy: Proxy, connect: Connect) -> None:
    streams = await connect()
    proxy.flip(from_bytes=10)
    assert await sent(streams, b"short") == b"short"
    changed = await sent(streams, bytes(100))
    assert changed.count(0) == 99
    assert proxy.flipped == 1
    assert await sent(streams, bytes(100)) == bytes(100)


async def test_it_delays_each_way(proxy: Proxy, connect: Connect) -> None:
    streams = await connect()
    proxy.delay(0.1)
    began_s = time.monotonic()
    await sent(streams, b"late")
    assert time.monotonic() - began_s >= 0.2


async def test_it_slows(proxy: Proxy, connect: Connect) -> None:
    streams = await connect()
    proxy.slow(100_000)
    began_s = time.monotonic()
    await sent(streams, bytes(20_000))
    assert time.monotonic() - began_s >= 0.15
    proxy.slow(0)
    assert await sent(streams, b"fast") == b"fast"


async def test_a_half_open_connection_swallows_while_a_new_one_is_served(proxy: Proxy, connect: Connect) -> None:
    old = await connect()
    await sent(old, b"hello")
    proxy.half_open()
    old[1].write(b"swallowed")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(old[0].read(1), SILENCE_S)
    assert await sent(await connect(), b"new") == b"new"
    proxy.heal()
    assert await asyncio.wait_for(old[0].readexactly(9), PATIENCE_S) == b"swallowed"


async def test_what_is_cut_ends_at_once(proxy: Proxy, connect: Connect) -> None:
    reader, _ = streams = await connect()
    await sent(streams, b"hello")
    proxy.cut()
    with suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(1), PATIENCE_S) == b""
