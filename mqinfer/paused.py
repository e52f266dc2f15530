"""A worker that has left its device to others: nothing of it is there any more, but it can be seen and called back.

A worker that leaves starts its program anew (`worker_command`), which gives back even what CUDA keeps for as long as a
process lives; here it waits until it may return. torch may not be imported here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime

from mqinfer.gpu_guests import guests_on
from mqinfer.hours import Hours
from mqinfer.link import Connect, keep_linked, now_s
from mqinfer.messages import Pause
from mqinfer.observe import WORKER_PAUSED, WORKER_RESUMED, emit
from mqinfer.plan import Plan
from mqinfer.presence import Presence
from mqinfer.settings import WorkerSettings
from mqinfer.transports.base import Transport

#: Why a worker is not on its device: somebody said so; it is outside of its hours; somebody else computes there.
BY_HAND, BY_HOURS, BY_GUEST = "hand", "hours", "guest"
#: Why it leaves a stage, for another one and at its leisure.
TO_MOVE = "move"
#: How often the clock, which may jump (machines sleep), and the device are looked at.
LOOK_S = 1.0
#: How long nobody else may have been on the device before a worker returns.
ALONE_S = 30.0
#: How long a worker that pauses goes on with what it has; the device is to be free within 5 s.
DRAIN_S = 2.0


class Leave:
    """Whether a worker is to leave, and why."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        #: Why it pauses or moves; "": it ends.
        self.reason = ""

    def pause(self, reason: str) -> None:
        """Leave the device, to come back later or elsewhere. By hand goes before other reasons, the end before all."""
        if not self.asked.is_set() or (reason == BY_HAND and self.reason):
            self.reason = reason
            self.asked.set()

    def drain_s(self, usual_s: float) -> float:
        """How long it may go on serving the rows that are cached: somebody waits for the device."""
        return usual_s if self.reason in ("", TO_MOVE) else min(usual_s, DRAIN_S)

    @asynccontextmanager
    async def watching(self, stop: asyncio.Event, settings: WorkerSettings, *, called: bool) -> AsyncIterator[None]:
        """Within, it is asked to leave: when `stop` is set, its hours are over, or somebody else uses its GPU.

        `called`: back by hand, so that outside of its hours it stays until they end the next time.
        Raises: SettingsError where nobody could tell the last.
        """
        watches = [asyncio.ensure_future(self._end_with(stop))]
        if settings.yield_gpu:
            watches.append(asyncio.ensure_future(self._make_way(guests_on(settings.device))))
        if settings.hours:
            watches.append(asyncio.ensure_future(self._keep(Hours.parse(settings.hours), called)))
        try:
            yield
        finally:
            for watch in watches:
                watch.cancel()

    async def _end_with(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.reason = ""
        self.asked.set()

    async def _keep(self, hours: Hours, called: bool) -> None:
        if called:
            await until(lambda: is_time(hours))
        await until(lambda: not is_time(hours))
        self.pause(BY_HOURS)

    async def _make_way(self, guests: Callable[[], bool]) -> None:
        await until(guests)
        self.pause(BY_GUEST)


def is_time(hours: Hours) -> bool:
    """Whether a worker with these hours works now, by the local clock."""
    return hours.covers(datetime.now().time())


async def until(true: Callable[[], bool]) -> None:
    """Look every LOOK_S."""
    while not true():  # noqa: ASYNC110 - the clock on the wall tells nobody
        await asyncio.sleep(LOOK_S)


class PausedWorker:
    """What is left of a worker while it is paused."""

    def __init__(self, plan: Plan, stage: int, reason: str, settings: WorkerSettings, connect: Connect) -> None:
        self._plan = plan
        self._stage = stage
        self._reason = reason
        self._settings = settings
        self._connect = connect
        #: Set when it may return, or is to end.
        self._over = asyncio.Event()
        #: Whether somebody called it back.
        self.called = False

    async def run(self, stop: asyncio.Event) -> bool:
        """Until it is to return to its device (True) or `stop` is set (False). Raises: Refused at the first link."""
        emit(WORKER_PAUSED, stage=self._stage, reason=self._reason)
        guests = guests_on(self._settings.device) if self._settings.yield_gpu else lambda: False
        watches = [asyncio.ensure_future(self._end_with(stop)), asyncio.ensure_future(self._wait_for_cause(guests))]
        try:
            await keep_linked("paused worker", self._connect, self._session, self._over)
        finally:
            for watch in watches:
                watch.cancel()
        if stop.is_set():
            return False
        emit(WORKER_RESUMED, stage=self._stage)
        return True

    async def _end_with(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._over.set()

    async def _wait_for_cause(self, guests: Callable[[], bool]) -> None:
        """Until its hours have begun and nobody else is there; whom somebody sent away by hand is called by hand."""
        hours, last_s = Hours.parse(self._settings.hours), now_s()
        alone_s = ALONE_S if self._reason == BY_GUEST else 0.0

        def may_return() -> bool:
            nonlocal last_s
            if guests():
                last_s = now_s()
            return self._reason != BY_HAND and is_time(hours) and now_s() - last_s >= alone_s

        await until(may_return)
        self._over.set()

    async def _session(self, transport: Transport) -> None:
        presence = Presence(self._plan, self._stage, "paused", self._facts, self._be_told)
        async with asyncio.TaskGroup() as tasks:
            await presence.open(transport)
            loops = [tasks.create_task(transport.closed()), tasks.create_task(presence.serve(transport))]
            await self._over.wait()
            for loop in loops:
                loop.cancel()

    def _facts(self) -> dict[str, str]:
        return {"device": self._settings.device, "instance": self._settings.instance, "reason": self._reason}

    def _be_told(self, message: Pause) -> None:
        if message.paused:
            self._reason = BY_HAND
        else:
            self.called = True
            self._over.set()
