"""A TCP proxy between a client and its broker, with which tests do what networks do: cut, and swallow."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from ssl import SSLContext
from typing import Self
from urllib.parse import urlsplit, urlunsplit


class Proxy:
    """Forwards connections to the host and port of `url`, until told otherwise; with `tls` it is what speaks TLS."""

    def __init__(self, url: str, *, tls: SSLContext | None = None) -> None:
        self._parts = urlsplit(url)
        self._tls = tls
        self._server: asyncio.Server | None = None
        #: Both writers of each connection, in the order of connecting.
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

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
        for pair in self._pairs if only is None else [self._pairs[only]]:
            for writer in pair:
                writer.transport.abort()

    def swallow(self) -> None:
        """Let nothing through any more, while every connection seems to live."""
        self._flowing.clear()

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
        server, to_server = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        self._pairs.append((to_client, to_server))
        for source, sink in ((client, to_server), (server, to_client)):
            task = asyncio.ensure_future(self._forward(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._flowing.wait()
                sink.write(data)
                await sink.drain()
        sink.close()
