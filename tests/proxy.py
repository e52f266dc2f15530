"""A TCP proxy between a client and its broker, with which tests do what networks do.

It cuts, swallows, forgets one side (half-open), slows, delays and flips a byte. What is done to it applies to the
connections that live, and but for `cut`, `half_open` and `flip` also to those that come.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ssl import SSLContext
from typing import Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")

#: Chunks that wait in one direction while they are delayed or slowed.
DELAYED_CHUNKS = 256
#: A pace is kept in slices of this length.
SLICE_S = 0.02


class Connection:
    """One client's connection through the proxy: two streams, and whether they flow."""

    def __init__(self, to_client: asyncio.StreamWriter, to_server: asyncio.StreamWriter, *, flows: bool) -> None:
        self.to_client = to_client
        self.to_server = to_server
        self.flowing = asyncio.Event()
        if flows:
            self.flowing.set()

    def cut(self) -> None:
        """Reset both sides."""
        for writer in (self.to_client, self.to_server):
            writer.transport.abort()


class Proxy:
    """Forwards connections to the host and port of `url`, until told otherwise; with `tls` it is what speaks TLS."""

    def __init__(self, url: str, *, tls: SSLContext | None = None) -> None:
        self._parts = urlsplit(url)
        self._tls = tls
        self._server: asyncio.Server | None = None
        #: In the order of connecting.
        self._connections: list[Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = True
        self._delay_s = 0.0
        self._bytes_per_s = 0.0
        self._flip_from_bytes = 0
        #: Bytes that were flipped on their way to the broker.
        self.flipped = 0

    @property
    def url(self) -> str:
        """The same URL, by way of the proxy."""
        if self._server is None:
            raise RuntimeError("the proxy does not run")
        port = self._server.sockets[0].getsockname()[1]
        login, at, _ = self._parts.netloc.rpartition("@")
        scheme = "amqps" if self._tls else self._parts.scheme
        return urlunsplit(self._parts._replace(scheme=scheme, netloc=f"{login}{at}127.0.0.1:{port}"))

    def cut(self, only: int | None = None) -> None:
        """Reset every connection, or only the one of that number."""
        for connection in self._connections if only is None else [self._connections[only]]:
            connection.cut()

    def swallow(self) -> None:
        """Let nothing through any more, while every connection seems to live."""
        self._flows = False
        self.half_open()

    def half_open(self) -> None:
        """Swallow on the connections that there are; new ones are served, as after a router forgot its table."""
        for connection in self._connections:
            connection.flowing.clear()

    def slow(self, bytes_per_s: float) -> None:
        """In each direction of each connection; 0: as fast as can be."""
        self._bytes_per_s = bytes_per_s

    def delay(self, delay_s: float) -> None:
        """Each byte arrives so much later; what is on its way keeps the delay that it has."""
        self._delay_s = delay_s

    def flip(self, from_bytes: int = 1) -> None:
        """Change one byte in the middle of the next chunk to the broker that is at least so long."""
        self._flip_from_bytes = from_bytes

    def heal(self) -> None:
        """Everything flows again, what was swallowed too."""
        self._flows, self._delay_s, self._bytes_per_s, self._flip_from_bytes = True, 0.0, 0.0, 0
        for connection in self._connections:
            connection.flowing.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            server, to_server = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        except OSError:  # the broker is down, and so are we
            to_client.transport.abort()
            return
        connection = Connection(to_client, to_server, flows=self._flows)
        self._connections.append(connection)
        chunks: list[asyncio.Queue[tuple[float, bytes]]] = [asyncio.Queue(DELAYED_CHUNKS) for _ in range(2)]
        for work in (
            self._take(client, chunks[0], to_broker=True),
            self._give(chunks[0], to_server, connection),
            self._take(server, chunks[1], to_broker=False),
            self._give(chunks[1], to_client, connection),
        ):
            task = asyncio.ensure_future(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take(
        self, source: asyncio.StreamReader, chunks: asyncio.Queue[tuple[float, bytes]], *, to_broker: bool
    ) -> None:
        data = b"."
        while data:
            try:
                data = await source.read(65536)
            except OSError:
                data = b""
            if to_broker and 0 < self._flip_from_bytes <= len(data):
                data = self._flipped(data)
            await chunks.put((time.monotonic() + self._delay_s, data))

    def _flipped(self, data: bytes) -> bytes:
        self._flip_from_bytes = 0
        self.flipped += 1
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]

    async def _give(
        self, chunks: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter, connection: Connection
    ) -> None:
        with suppress(OSError):
            while True:
                due_s, data = await chunks.get()
                await connection.flowing.wait()
                if not data:
                    break
                if (early_s := due_s - time.monotonic()) > 0:
                    await asyncio.sleep(early_s)
                await self._write(data, sink)
        sink.close()

    async def _write(self, data: bytes, sink: asyncio.StreamWriter) -> None:
        view = memoryview(data)
        while view:
            count = max(1, int(self._bytes_per_s * SLICE_S)) if self._bytes_per_s else len(view)
            sink.write(view[:count])
            await sink.drain()
            view = view[count:]
            if self._bytes_per_s:
                await asyncio.sleep(SLICE_S)


class ProxyThread:
    """An event loop in a thread of its own, so that tests without one can have proxies."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()
        self._proxies: list[Proxy] = []

    def open(self, url: str) -> Proxy:
        """A proxy that runs until `close`; everything but its `url` is to be used inside `do`."""
        proxy = Proxy(url)
        asyncio.run_coroutine_threadsafe(proxy.__aenter__(), self._loop).result(10)
        self._proxies.append(proxy)
        return proxy

    def do(self, what: Callable[[], T]) -> T:
        """Call `what` in the proxies' loop."""

        async def call() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def close(self) -> None:
        """End every proxy."""
        for proxy in self._proxies:
            asyncio.run_coroutine_threadsafe(proxy.__aexit__(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
