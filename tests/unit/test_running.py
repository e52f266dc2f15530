"""How a command ends when somebody asks it to: once, and twice."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap

import pytest

from mqinfer.running import Stopped, unless_stopped

TIMEOUT_S = 60


async def test_work_that_ends_by_itself_gives_what_it_gives() -> None:
    async def work() -> int:
        return 7

    assert await unless_stopped(asyncio.Event(), work()) == 7


async def test_work_that_fails_fails_as_it_does() -> None:
    async def work() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await unless_stopped(asyncio.Event(), work())


async def test_work_is_cancelled_and_has_ended_when_it_is_stopped() -> None:
    stop, ended = asyncio.Event(), []

    async def work() -> None:
        try:
            stop.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    with pytest.raises(Stopped):
        await unless_stopped(stop, work())
    assert ended


async def test_work_that_has_begun_is_not_cancelled() -> None:
    stop, begun = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        begun.set()
        stop.set()
        await stop.wait()
        await asyncio.sleep(0)
        return "in order"

    assert await unless_stopped(stop, work(), begun) == "in order"


async def test_work_that_has_not_begun_yet_is_cancelled() -> None:
    stop, begun = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        stop.set()
        await asyncio.Event().wait()

    with pytest.raises(Stopped):
        await unless_stopped(stop, work(), begun)


def start(body: str) -> subprocess.Popen[str]:
    """A process that runs `command(stop)` with this body, and says "ready" first of all."""
    program = f"""\
import asyncio, threading, time
from mqinfer.running import finish, unless_stopped

async def command(stop):
{textwrap.indent(textwrap.dedent(body), "    ")}

print("ended", finish(command, stopped=5))
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen[str], number: signal.Signals, said: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == said
    process.send_signal(number)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out.strip()


ORDERLY = """
print("ready", flush=True)
await stop.wait()
print("stopping", flush=True)
{rest}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_command_to_stop(number: signal.Signals) -> None:
    process = start(ORDERLY.format(rest="return 7"))
    ask(process, number, "ready")
    assert end(process) == (0, "stopping\nended 7")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_leaves_at_once(number: signal.Signals) -> None:
    process = start(ORDERLY.format(rest="await asyncio.Event().wait()"))
    ask(process, number, "ready")
    ask(process, number, "stopping")
    assert end(process) == (128 + number, "")


def test_a_thread_that_can_not_be_stopped_does_not_hold_up_the_end() -> None:
    process = start("""
def load():
    print("ready", flush=True)
    threading.Event().wait()

await unless_stopped(stop, asyncio.to_thread(load))
""")
    ask(process, signal.SIGINT, "ready")
    assert end(process) == (5, "")
