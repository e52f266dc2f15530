"""Running a command in an event loop of its own, and how it ends when somebody asks it to.

The first Ctrl-C or SIGTERM sets an event that the command looks at; the second one leaves at once. What commands do is
not known here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
Command = Callable[[asyncio.Event], Coroutine[Any, Any, T]]

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130
#: No process of ours has more files open.
MOST_FILES = 2**16


class Stopped(Exception):
    """Asked to stop before anything was under way that would have to be ended in order."""


async def unless_stopped(stop: asyncio.Event, work: Awaitable[T], begun: asyncio.Event | None = None) -> T:
    """What `work` returns. If `stop` is set before `begun` is, it is cancelled; after that it must look at `stop`.

    A thread that it waits for goes on. Raises: Stopped.
    """
    task = asyncio.ensure_future(work)
    halt = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, halt}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() or (begun is not None and begun.is_set()):
            return await task
        raise Stopped
    finally:
        halt.cancel()
        if task.cancel():
            await asyncio.wait({task})


def finish(command: Command[T], *, stopped: int = INTERRUPTED) -> T:
    """What the command returns; where it raises Stopped, the process ends with the code `stopped`."""
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        try:
            return runner.run(_watched(command))
        except Stopped:
            _leave(stopped)  # a thread that still reads weights would keep the runner from closing


async def _watched(command: Command[T]) -> T:
    stop = asyncio.Event()

    def asked(number: int) -> None:
        if stop.is_set():
            _leave(128 + number)
        stop.set()
        if sys.stderr.isatty():
            print("stopping (Ctrl-C again leaves at once)", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, asked, number)
    return await command(stop)


def begin_anew(**environment: str) -> NoReturn:
    """This command from its beginning, in this process but with none of its memory: what a GPU's driver keeps too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ.update(environment)
    os.closerange(3, MOST_FILES)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()
