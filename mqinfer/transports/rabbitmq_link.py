"""The two connections of a link to RabbitMQ: they live and end together; foreign errors become ours at their border.

Two, because a broker short of memory stops reading from who publishes, and acks must still get through. Nothing
reconnects here: that is the actor's (see base.py). What is sent over the connections is rabbitmq.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, ChannelPreconditionFailed, PublishError
from aiormq.abc import AbstractChannel as RawChannel
from aiormq.abc import AbstractConnection as RawConnection
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource

from mqinfer.errors import Disconnected, Forbidden, Refused, Unroutable
from mqinfer.transports.base import cancelling
from mqinfer.transports.rabbitmq_alarm import Gate, listen
from mqinfer.transports.rabbitmq_connect import AbortableConnection

#: A broker that hears us answers within milliseconds; one that does not must not hold up our going.
CLOSE_TIMEOUT_S = 5.0


class Link:
    """Ends once: when it is closed, when either connection is lost, or when somebody says so."""

    def __init__(
        self, publishing: AbortableConnection, consuming: AbortableConnection, name: str, timeout_s: float
    ) -> None:
        self.publishing = publishing
        self.consuming = consuming
        #: What is published passes it; shut while the broker has an alarm.
        self.gate = Gate(name, timeout_s)
        self._timeout_s = timeout_s
        self._ended = asyncio.Event()
        self._loss: Disconnected | Forbidden | None = None
        self._closing: asyncio.Task[None] | None = None
        listen(_raw(publishing), self.gate)
        for connection in (publishing, consuming):
            self.watch(_raw(connection), "the connection to the broker was lost")

    @property
    def has_ended(self) -> bool:
        """Whether it was lost or closed."""
        return self._ended.is_set()

    def check(self) -> None:
        """Raises: Disconnected once the link has ended."""
        if self.has_ended:
            raise Disconnected("the link to the broker has ended")

    def watch(self, closer: RawConnection | RawChannel, what: str) -> Callable[[], object]:
        """End the link when that connection or channel closes; call what is returned to watch no more."""

        def on_closed(closing: asyncio.Future[Any]) -> None:
            cause = None if closing.cancelled() else closing.exception()
            words = f"{what}: {cause}" if str(cause or "") else what
            # A publish that is not allowed is answered by the end of its channel.
            self.end(Forbidden(words) if isinstance(cause, ChannelAccessRefused) else Disconnected(words), cause)

        observer = closer.closing
        observer.add_done_callback(on_closed)
        return partial(observer.remove_done_callback, on_closed)

    def end(self, loss: Disconnected | Forbidden | None, cause: BaseException | None = None) -> None:
        """End the link, lost or (None) closed: what is unsettled goes back, exclusive queues vanish."""
        if self.has_ended:
            return
        if loss is not None:
            loss.__cause__ = cause
        self._loss = loss
        self._ended.set()
        self.gate.end()
        self._closing = asyncio.get_running_loop().create_task(self._close_connections())

    async def closed(self) -> None:
        """Waits until the link ends. Raises: Disconnected if it was lost, Forbidden if by what we may not do."""
        await self._ended.wait()
        if self._loss is not None:
            raise type(self._loss)(str(self._loss)) from self._loss.__cause__

    async def close(self) -> None:
        """End the link and wait, not for ever, until both connections are closed."""
        self.end(None)
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def open_channel(self) -> RawChannel:
        """A channel for consuming or administering; to be opened and used inside `border`."""
        return await _raw(self.consuming).channel(publisher_confirms=False)

    @asynccontextmanager
    async def border(self, queue: str = "", *, publishing: bool = False) -> AsyncIterator[None]:
        """Foreign errors become ours here; what the broker does not answer in time ends the link.

        `publishing`: while the broker has an alarm it is waited for, however long that takes.
        """
        self.check()
        before = cancelling()
        try:
            async with self.gate.passing() if publishing else asyncio.timeout(self._timeout_s):
                self.check()
                yield
        except (PublishError, ChannelNotFoundEntity) as error:
            raise Unroutable(f"the queue {queue} does not exist") from error
        except ChannelAccessRefused as error:
            raise Forbidden(f"the broker forbids this: {error}") from error
        except (ChannelPreconditionFailed, ChannelLockedResource) as error:
            raise Refused(f"the broker refuses this for the queue {queue}: {error}") from error
        except asyncio.CancelledError as error:
            # aiormq cancels what waits when the connection is lost. If nobody cancelled this task, it is that.
            if cancelling() > before:
                raise
            raise self._lost(error) from error
        except Exception as error:
            # aiormq rejects what waits on a channel that it loses with a bare Exception, where it knows no reason.
            if isinstance(error, AMQPError | OSError | RuntimeError) or type(error) is Exception:
                raise self._lost(error) from error
            raise
        finally:
            if cancelling() > before:  # aiormq swallows a cancellation that meets it closing a channel
                raise asyncio.CancelledError

    @asynccontextmanager
    async def throw_away_channel(self, queue: str) -> AsyncIterator[RawChannel]:
        """Inside `border`: a channel for one question, which the broker closes when the answer is no."""
        async with self.border(queue):
            channel = await self.open_channel()
            try:
                yield channel
            finally:
                await channel.close()

    def _lost(self, error: BaseException) -> Disconnected:
        words = "the broker did not answer in time" if isinstance(error, TimeoutError) else "the link was lost"
        self.end(Disconnected(words), error)
        return Disconnected(str(self._loss or words))

    async def _close_connections(self) -> None:
        connections = (self.publishing, self.consuming)
        closings = [asyncio.ensure_future(_close(connection)) for connection in connections]
        _, stuck = await asyncio.wait(closings, timeout=CLOSE_TIMEOUT_S)
        if stuck:
            for connection in connections:
                connection.abort()
            await asyncio.wait(stuck, timeout=CLOSE_TIMEOUT_S)


async def _close(connection: AbortableConnection) -> None:
    with suppress(Exception):  # there is nobody whom it would help to know
        await connection.close()


def _raw(connection: AbortableConnection) -> RawConnection:
    if connection.transport is None:
        raise Disconnected("the link to the broker has ended")
    return connection.transport.connection
