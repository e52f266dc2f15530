"""`mqinfer top`: looks at a pipeline again and again, and draws it on the terminal until somebody has seen enough.

What is drawn is pipeline_view's. rich's Live does it: there is nothing here to select or scroll that would need more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.live import Live

from mqinfer import console, pipeline_view, survey
from mqinfer.commands import connecting, read_plan
from mqinfer.link import keep_linked
from mqinfer.observe import LINK_LOST, add_sink
from mqinfer.plan import Plan
from mqinfer.running import Stopped, unless_stopped
from mqinfer.settings import Settings
from mqinfer.transports.base import Transport

Draw = Callable[[RenderableType], None]


async def watch(settings: Settings, interval_s: float, *, stop: asyncio.Event) -> int:
    """Draw until `stop` is set. The exit code. Raises: Refused where there is no broker to begin with."""
    plan = read_plan(settings)
    with contextlib.ExitStack() as terminal:
        draw = terminal.enter_context(_screen(stop))
        terminal.callback(add_sink(lambda event, fields: _tell_lost(event, fields, draw)))
        terminal.enter_context(_keys(stop))

        async def session(transport: Transport) -> None:
            with contextlib.suppress(Stopped):
                await unless_stopped(stop, _look_again_and_again(transport, plan, interval_s, draw))

        watching = asyncio.ensure_future(keep_linked("top", connecting(settings, "top"), session, stop))
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait({watching, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
    await watching  # the terminal is as it was by now, however long the link takes to close
    return 0


async def _look_again_and_again(transport: Transport, plan: Plan, interval_s: float, draw: Draw) -> None:
    earlier = await survey.take(transport, plan)
    while True:
        await asyncio.sleep(interval_s)
        later = await survey.take(transport, plan)
        draw(pipeline_view.live(plan, earlier, later, time.strftime("%H:%M:%S")))
        earlier = later


def _tell_lost(event: str, fields: Mapping[str, Any], draw: Draw) -> None:
    if event == LINK_LOST:
        draw(f"{time.strftime('%H:%M:%S')} the broker is away: {fields['error']}; trying again")


@contextlib.contextmanager
def _screen(stop: asyncio.Event) -> Iterator[Draw]:
    """The whole terminal, given back at the end; where there is none, what is drawn is printed one after the other."""
    if not console.out.is_terminal:
        yield lambda view: None if stop.is_set() else pipeline_view.show(view)
        return
    with Live(console=console.out, screen=True, auto_refresh=False) as live:
        yield lambda view: None if stop.is_set() else live.update(view, refresh=True)


@contextlib.contextmanager
def _keys(stop: asyncio.Event) -> Iterator[None]:
    """The key q sets `stop`, where somebody could press it."""
    if not (sys.stdin.isatty() and console.out.is_terminal):
        yield
        return
    import termios
    import tty

    fd, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def pressed() -> None:
        keys = os.read(fd, 64)
        if not keys:
            loop.remove_reader(fd)
        if b"q" in keys.lower():
            stop.set()

    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    loop.add_reader(fd, pressed)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
