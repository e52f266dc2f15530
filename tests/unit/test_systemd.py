"""What goes to systemd's socket, over a socket of our own in its place."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mqinfer import observe
from mqinfer.observe import ACTOR_READY, ACTOR_STALLED, LINK_BLOCKED, LINK_LOST, ROW_MISSED, add_sink, emit
from mqinfer.systemd import ServiceManager, kept_informed

PATIENCE_S = 20.0
#: A watchdog that is fed every millisecond.
WATCHED = {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": str(os.getpid())}


class Systemd:
    """The receiving end."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        """All datagrams since the last look."""
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(65536).decode())
        return found

    async def until(self, said: str) -> None:
        """Until it is told that, whatever else."""
        async with asyncio.timeout(PATIENCE_S):
            while said not in self.heard():
                await asyncio.sleep(0.001)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    """A socket of each kind."""
    found = Systemd(str(tmp_path / "notify") if request.param == "path" else f"@mqinfer-{secrets.token_hex(8)}")
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_sinks", [])


async def alive() -> None:
    """The pulse of who is never stuck."""


def test_fields_go_in_one_datagram_one_a_line(systemd: Systemd) -> None:
    manager = ServiceManager(systemd.environment)
    manager.tell(READY="1", STATUS="two\nlines")
    assert systemd.heard() == ["READY=1\nSTATUS=two lines"]
    manager.close()


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:99"}])
async def test_where_there_is_no_socket_nothing_happens(environment: dict[str, str]) -> None:
    async with kept_informed(alive, asyncio.Event(), environment):
        emit(ACTOR_READY, actor="a")


async def test_a_socket_that_nobody_reads_or_that_is_gone_ends_and_holds_up_nothing(
    systemd: Systemd, tmp_path: Path
) -> None:
    for address in (systemd.environment, {"NOTIFY_SOCKET": str(tmp_path / "gone")}):
        manager = ServiceManager(address)
        for _ in range(10_000):
            manager.tell(STATUS="x" * 100)
        manager.close()


async def test_what_happens_becomes_readiness_and_status(systemd: Systemd) -> None:
    async with kept_informed(alive, asyncio.Event(), systemd.environment):
        emit(ROW_MISSED, reason="room")
        assert systemd.heard() == []
        emit(ACTOR_READY, actor="a")
        assert systemd.heard() == ["READY=1\nSTATUS=serves"]
        emit(LINK_LOST, actor="a", error="reset")
        emit(LINK_BLOCKED, link="a", reason="low on memory")
        assert systemd.heard() == [
            "STATUS=waits for the broker: reset",
            "STATUS=waits for the end of the broker's alarm: low on memory",
        ]
    emit(ACTOR_READY, actor="another")
    assert systemd.heard() == []


async def test_leaving_is_told_when_it_begins(systemd: Systemd) -> None:
    stop = asyncio.Event()
    async with kept_informed(alive, stop, systemd.environment):
        stop.set()
        await systemd.until("STOPPING=1\nSTATUS=leaves: gives back what it holds")


async def test_the_watchdog_is_fed_as_long_as_there_is_a_pulse(systemd: Systemd) -> None:
    free, stalled = asyncio.Event(), asyncio.Event()
    free.set()
    add_sink(lambda event, _: stalled.set() if event == ACTOR_STALLED else None)

    async def pulse() -> None:
        await free.wait()

    async with kept_informed(pulse, asyncio.Event(), systemd.environment | WATCHED):
        for _ in range(3):
            await systemd.until("WATCHDOG=1")
        free.clear()
        await asyncio.wait_for(stalled.wait(), PATIENCE_S)
        assert "STATUS=stuck: the compute thread does not answer" in systemd.heard()
        await asyncio.sleep(0)
        assert systemd.heard() == []
        free.set()
        await systemd.until("WATCHDOG=1")


@pytest.mark.parametrize(
    "watched",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": "me"},
    ],
)
def test_a_watchdog_that_is_not_ours_is_not_fed(watched: dict[str, str]) -> None:
    assert ServiceManager(watched).watchdog_s is None


def test_a_watchdog_without_a_pid_is_ours() -> None:
    assert ServiceManager({"WATCHDOG_USEC": "3000000"}).watchdog_s == 3.0
