"""Opening a connection to RabbitMQ, and saying in words for people why it could not be opened.

What is done with a connection is rabbitmq.py's. No password may get into a message or a log here.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from typing import Any

import aiormq.connection
from aio_pika import Connection
from aio_pika.connection import make_url
from aio_pika.exceptions import AMQPError, AuthenticationError, InvalidFrameError, ProbableAuthenticationError
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from yarl import URL

from mqinfer.errors import Refused, SettingsError
from mqinfer.transports.base import cancelling

#: A connection on which nothing was heard for so many times (heartbeat + 1) s is lost; aiormq looks once in half a
#: heartbeat, and three, its own number, would break the promise of docs/operations.md by that. The broker sends two
#: in each heartbeat.
aiormq.connection.Connection.HEARTBEAT_GRACE_MULTIPLIER = 2


class AbortableConnection(Connection):
    """An aio-pika connection whose socket can be taken away from under it, for closing waits for a dead peer."""

    def __init__(self, url: URL, *, name: str) -> None:
        super().__init__(url, client_properties={"connection_name": name})
        self._sockets = Sockets()
        self.kwargs["transport_factory"] = self._sockets  # aio-pika has no argument for it; aiormq has

    def abort(self) -> None:
        """Everybody who waits on the connection learns that it is lost. Harmless on a closed one."""
        self._sockets.abort()


class Sockets(TransportFactory):
    """Makes a connection's socket as aiormq would, and keeps hold of it."""

    def __init__(self) -> None:
        self._writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **how: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Called by aiormq."""
        factory = TLSTransportFactory() if _tls(url) else TCPTransportFactory()
        reader, self._writer = await factory.create(url, **how)
        return reader, self._writer

    def abort(self) -> None:
        """Close it at once, with what was not sent."""
        if self._writer is not None:
            self._writer.transport.abort()


async def connect(url: URL, *, name: str, heartbeat_s: float, timeout_s: float) -> AbortableConnection:
    """Open a connection that the broker's operator sees as `name`. Raises: Refused, with words for people."""
    connection = AbortableConnection(make_url(url, heartbeat=max(1, round(heartbeat_s))), name=name)
    before = cancelling()
    try:
        await connection.connect(timeout=timeout_s)
    except BaseException as error:
        # Its destructor would start a task if nobody closed it, even though it was never open.
        await connection.close()
        # aiormq cancels who waits on a connection that it loses: nobody asked for that.
        if isinstance(error, Exception) or (isinstance(error, asyncio.CancelledError) and cancelling() == before):
            raise Refused(why(error, url, timeout_s)) from error
        raise
    return connection


def parse(url: str) -> URL:
    """Raises: SettingsError that does not quote the URL, for there may be a password in it."""
    try:
        parsed = URL(url)
        if parsed.host:
            return parsed
    except ValueError:
        pass
    raise SettingsError("the broker's URL can't be read; it looks like amqp://user:password@host:5672/vhost") from None


def why(error: BaseException, url: URL, timeout_s: float) -> str:
    """The first cause that says something to a person who only knows the URL."""
    where = f"{url.host}:{url.port or {'amqp': 5672, 'amqps': 5671}[url.scheme]}"
    for cause in _causes(error):
        words = _words(cause, where, url, timeout_s)
        if words:
            return words
    if isinstance(error, AMQPError | OSError):
        return f"the broker at {where} refused the connection: {error}"
    return f"{where} hung up while the connection was being opened ({error!r})"


def _causes(error: BaseException) -> list[BaseException]:
    """Deepest first: what the operating system said is plainer than what was made of it."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    return causes[::-1]


def _words(cause: BaseException, where: str, url: URL, timeout_s: float) -> str | None:
    match cause:
        case AuthenticationError() | ProbableAuthenticationError():
            return f"wrong user or password for the broker at {where} (user {url.user or 'guest'})"
        case InvalidFrameError() if "Connection.OpenOk" in str(cause):
            # aiormq drops what the broker said, but this is the frame that it answers to the name of the vhost.
            return f"the vhost {_vhost(url)!r} does not exist at {where}, or user {url.user or 'guest'} may not use it"
        case ssl.SSLError():
            return f"TLS with {where} failed: {cause.strerror or cause}"
        case socket.gaierror():
            return f"the host {url.host} is unknown"
        case TimeoutError():
            return f"{where} did not answer within {timeout_s:g} s"
        case FileNotFoundError() | PermissionError():
            return f"a certificate or key that the URL names can't be read: {cause.strerror}"
        case asyncio.IncompleteReadError() | ConnectionResetError():
            return f"what listens at {where} does not speak AMQP" + (" (or it wants amqps://)" if not _tls(url) else "")
        case OSError() if not isinstance(cause, AMQPError):
            return _os_words(cause, where)
        case _:
            return None


def _os_words(error: OSError, where: str) -> str:
    # A host of several addresses gives one error that has only the text of each.
    if error.errno == errno.ECONNREFUSED or f"[Errno {errno.ECONNREFUSED}]" in str(error):
        return f"nothing listens at {where}"
    return f"{where} can't be reached: {error.strerror or error}"


def _vhost(url: URL) -> str:
    return url.path[1:] or "/"


def _tls(url: URL) -> bool:
    return url.scheme == "amqps"
