"""What the broker's memory or disk alarm means for the connection that publishes: it waits, as long as that takes.

RabbitMQ sends `connection.blocked` and stops reading. What is sent all the same is taken when the alarm ends, so a
publish that gave up meanwhile would come twice. Hence nothing is sent and no deadline runs until then. That the
connection itself is dead is noticed by its heartbeat, blocked or not. Nothing else of a link belongs here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiormq.abc import AbstractConnection as RawConnection

from mqinfer.observe import LINK_BLOCKED, LINK_UNBLOCKED, emit
from mqinfer.transports.base import Blockage

#: aiormq 7.2 asks the broker for these frames, logs them and has no callback for them. Where another version calls
#: its handlers otherwise, an alarm is a publish that is not confirmed in time, and tests/contract shows it.
_HANDLERS = "_Connection__handle_connection_blocked", "_Connection__handle_connection_unblocked"


class Gate:
    """What is published passes here; shut while the broker has an alarm. Lives in one event loop."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._open = asyncio.Event()
        self._open.set()
        self._reason = ""
        self._shut_at_s = 0.0
        self._earlier_s = 0.0
        self._deadlines: set[asyncio.Timeout] = set()

    def blockage(self) -> Blockage:
        """See base.Transport."""
        now_s = 0.0 if self._open.is_set() else _now_s() - self._shut_at_s
        return Blockage(self._reason, self._earlier_s + now_s)

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Wait for the gate; the body then has `timeout_s`, anew each time it opens. Raises: TimeoutError."""
        async with asyncio.timeout(self._timeout_s if self._open.is_set() else None) as deadline:
            self._deadlines.add(deadline)
            try:
                await self._open.wait()
                yield
            finally:
                self._deadlines.discard(deadline)

    def shut(self, reason: str) -> None:
        """The broker takes nothing more; twice is harmless."""
        self._reason = reason or "alarm"
        if self._open.is_set():
            self._open.clear()
            self._shut_at_s = _now_s()
            emit(LINK_BLOCKED, link=self._name, reason=self._reason)
            self._reschedule(None)

    def open(self) -> None:
        """The broker takes everything again; twice is harmless."""
        was_shut = not self._open.is_set()  # for no time at all, where the loop read both frames in one turn
        seconds = self._unlock()
        if was_shut:
            emit(LINK_UNBLOCKED, link=self._name, seconds=seconds)
            self._reschedule(_now_s() + self._timeout_s)

    def end(self) -> None:
        """The link has ended: who waits here need not wait any more."""
        self._unlock()

    def _unlock(self) -> float:
        """How long it was shut this time."""
        seconds = 0.0 if self._open.is_set() else _now_s() - self._shut_at_s
        self._earlier_s += seconds
        self._reason = ""
        self._open.set()
        return seconds

    def _reschedule(self, when_s: float | None) -> None:
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(when_s)


def listen(connection: RawConnection, gate: Gate) -> None:
    """Shut and open the gate as the broker says on that connection."""

    sent = connection.write_queue

    def blocked(frame: Any) -> None:
        # With megabytes stuck in the socket, heartbeats pile up behind them, and when the queue is full for
        # 2 × (heartbeat + 1) s aiormq ends the connection. The broker reads none of them and waits for none now.
        connection.write_queue = asyncio.Queue()
        gate.shut(frame.reason or "")

    def unblocked(_frame: Any) -> None:
        connection.write_queue = sent
        gate.open()

    for name, tell in zip(_HANDLERS, (blocked, unblocked), strict=True):
        if (handler := getattr(connection, name, None)) is not None:
            setattr(connection, name, _after(handler, tell))


def _after(handler: Callable[[Any], Any], tell: Callable[[Any], None]) -> Callable[[Any], Any]:
    async def handle(frame: Any) -> None:
        await handler(frame)
        tell(frame)

    return handle


def _now_s() -> float:
    return asyncio.get_running_loop().time()
