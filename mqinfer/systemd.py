"""What systemd is told of an actor: that it serves, what it is doing, that it leaves, and that it is not stuck.

The protocol of sd_notify(3): datagrams of `NAME=value` lines to the socket in `NOTIFY_SOCKET`. That variable and
`WATCHDOG_USEC` and `WATCHDOG_PID` are systemd's, not settings: they are read here and nowhere else. Where there is no
such socket (no systemd, or another system) nothing happens. What an actor does may not be known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from mqinfer.observe import (
    ACTOR_READY,
    ACTOR_STALLED,
    LINK_BLOCKED,
    LINK_LOST,
    LINK_OPENED,
    LINK_UNBLOCKED,
    add_sink,
    emit,
)

#: Event -> what `systemctl status` shows after it.
_STATUS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    LINK_OPENED: lambda _: "linked to the broker",
    LINK_LOST: lambda fields: f"waits for the broker: {fields.get('error')}",
    LINK_BLOCKED: lambda fields: f"waits for the end of the broker's alarm: {fields.get('reason')}",
    LINK_UNBLOCKED: lambda _: "serves",
    ACTOR_READY: lambda _: "serves",
    ACTOR_STALLED: lambda _: "stuck: the compute thread does not answer",
}

Pulse = Callable[[], Awaitable[None]]


async def loop_turns() -> None:
    """A Pulse: the event loop turns, which is all that can be said of who computes nothing, or not yet."""
    await asyncio.sleep(0)


class ServiceManager:
    """The other end of the notification socket, where there is one."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        #: How long systemd waits for a sign of life before it kills; None: it does not watch.
        self.watchdog_s = _watchdog_s(environment)
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def tell(self, **fields: str) -> None:
        """Send these fields. What can't be sent is dropped: it must not hold up or end what it is about."""
        if self._socket is not None and self._address is not None:
            lines = "\n".join(f"{name}={_one_line(value)}" for name, value in fields.items())
            with contextlib.suppress(OSError):
                self._socket.sendto(lines.encode(), self._address)

    def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            self._socket.close()

    def sink(self, event: str, fields: Mapping[str, Any]) -> None:
        """An observe.Sink: what happens becomes the unit's status."""
        if event == ACTOR_READY:
            self.tell(READY="1", STATUS=_STATUS[event](fields))
        elif event in _STATUS:
            self.tell(STATUS=_STATUS[event](fields))


@asynccontextmanager
async def kept_informed(
    pulse: Pulse, stop: asyncio.Event, environment: Mapping[str, str] = os.environ
) -> AsyncIterator[None]:
    """While the body runs, systemd knows how it is.

    `pulse` returns when the actor is alive; while it does not return, the watchdog is not fed. `stop` is what asks the
    actor to leave.
    """
    manager = ServiceManager(environment)
    forget = add_sink(manager.sink)
    tasks = [asyncio.create_task(_tell_leaving(manager, stop))]
    if manager.watchdog_s is not None:
        tasks.append(asyncio.create_task(_feed(manager, pulse, manager.watchdog_s / 4)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        forget()
        manager.close()


async def _tell_leaving(manager: ServiceManager, stop: asyncio.Event) -> None:
    await stop.wait()
    manager.tell(STOPPING="1", STATUS="leaves: gives back what it holds")


async def _feed(manager: ServiceManager, pulse: Pulse, interval_s: float) -> None:
    while True:
        if await _beat(pulse, interval_s):
            manager.tell(STATUS="serves")
        manager.tell(WATCHDOG="1")
        await asyncio.sleep(interval_s)


async def _beat(pulse: Pulse, interval_s: float) -> bool:
    """Returns when the pulse was felt: whether that took long, which is said, once, while it does."""
    began_s = time.monotonic()
    beat = asyncio.ensure_future(pulse())
    try:
        done, _ = await asyncio.wait({beat}, timeout=interval_s)
        if not done:
            emit(ACTOR_STALLED, seconds=time.monotonic() - began_s)
        await beat
        return not done
    finally:
        beat.cancel()


def _address(name: str) -> str | None:
    """A path, or the name of an abstract socket; other kinds (vsock) are for virtual machines as a whole."""
    if not hasattr(socket, "AF_UNIX") or not name.startswith(("/", "@")):
        return None
    return "\0" + name[1:] if name.startswith("@") else name


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """Raises nothing: what can't be read is as if it were not there."""
    try:
        seconds = int(environment.get("WATCHDOG_USEC", "")) / 1e6
        ours = int(environment.get("WATCHDOG_PID", os.getpid())) == os.getpid()
    except ValueError:
        return None
    return seconds if ours and seconds > 0 else None


def _one_line(value: str) -> str:
    return " ".join(value.split())
