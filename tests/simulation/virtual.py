"""An event loop whose clock jumps, and processes inside it that can be killed or paused between any two callbacks.

A process is a context: whatever its tasks schedule inherits it, so the loop knows whose turn each callback is. Killed,
none of its callbacks ever runs again (no `finally`, no goodbye), as after SIGKILL; paused, they are kept and run when
it is resumed, as after SIGSTOP and SIGCONT. Nothing of mqinfer may be known here.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from enum import Enum
from typing import Any

PROCESS: ContextVar[Process] = ContextVar("process")


class State(Enum):
    """What a process does with its callbacks."""

    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"


class Stalled(Exception):
    """Nothing will ever happen again."""


class Process:
    """One simulated operating-system process: a main task and all that it starts."""

    def __init__(self, loop: VirtualLoop, name: str, *, call_s: Callable[[str], float] = lambda work: 0.0005) -> None:
        self.name = name
        self.loop = loop
        self.state = State.RUNNING
        #: Told when it is killed, by whomever.
        self.on_death: list[Callable[[], None]] = []
        self.task: asyncio.Task[Any]
        self.context: Context = copy_context()
        self.context.run(PROCESS.set, self)
        #: How long a thread takes for the function of that name.
        self.call_s = call_s
        self.thread_free_at_s = 0.0
        self._kept: list[asyncio.Handle] = []
        self._doom: int | None = None

    def start(self, main: Coroutine[Any, Any, Any], on_end: Callable[[asyncio.Task[Any]], None]) -> None:
        """Run `main`; `on_end` is told outside of this process's context."""
        outside = copy_context()
        self.task = self.loop.create_task(main, context=self.context)
        self.task.add_done_callback(on_end, context=outside)

    def kill(self, after_callbacks: int = 0) -> None:
        """End it now, or after so many more of its callbacks: between any two of them is an await."""
        if after_callbacks:
            self._doom = after_callbacks
        elif self.state is not State.DEAD:
            self.state = State.DEAD
            self._kept.clear()
            for tell in self.on_death:
                tell()

    def pause(self) -> None:
        """As SIGSTOP."""
        if self.state is State.RUNNING:
            self.state = State.PAUSED

    def resume(self) -> None:
        """As SIGCONT: what came meanwhile runs now, in its order."""
        if self.state is State.PAUSED:
            self.state = State.RUNNING
            self.loop.ready_again(self._kept)
            self._kept = []

    def may_run(self, handle: asyncio.Handle) -> bool:
        """Whether the callback may run now; otherwise it is dropped or kept."""
        if self.state is State.RUNNING:
            if self._doom is None:
                return True
            self._doom -= 1
            if self._doom > 0:
                return True
            self.kill()
        elif self.state is State.PAUSED:
            self._kept.append(handle)
        return False


class Task(asyncio.Task[Any]):
    """Hashes by its number, so that sets of tasks have the same order in every run."""

    _made = 0

    def __init__(self, coroutine: Any, **options: Any) -> None:
        Task._made += 1
        self._hash = Task._made
        self.process = PROCESS.get(None)
        super().__init__(coroutine, **options)

    def __hash__(self) -> int:
        return self._hash


class VirtualLoop(asyncio.BaseEventLoop):
    """Time passes only when nothing else is to be done; it never waits and never reads the real clock."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        Task._made = 0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self.callbacks = 0
        #: Kept, for the tasks of a killed process must not run their `finally` when they are collected.
        self.tasks: list[Task] = []
        self.set_task_factory(_make_task)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """The function runs here, after the time that a thread would have needed; an executor's calls in turn."""
        process = PROCESS.get()
        future = self.create_future()
        begins_s = self._now_s if executor is None else max(self._now_s, process.thread_free_at_s)
        ends_s = begins_s + process.call_s(_name(func))
        if executor is not None:
            process.thread_free_at_s = ends_s

        def run() -> None:
            try:
                result = func(*args)
            except BaseException as error:
                if process.state is not State.DEAD and not future.done():
                    future.set_exception(error)
                return
            if not future.done():
                future.set_result(result)

        self.call_at(ends_s, run)
        return future

    def ready_again(self, handles: list[asyncio.Handle]) -> None:
        """Callbacks that a process kept while it was paused."""
        self._ready.extend(handles)  # type: ignore[attr-defined]

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's own; callbacks of the same moment run in the order of asking."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _run_once(self) -> None:
        """One round of asyncio's own loop, with a clock that jumps and processes that may not run."""
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise Stalled
            self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(PROCESS)
            if process is None or process.may_run(handle):
                self.callbacks += 1
                handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers leave when their time comes."""

    def _write_to_self(self) -> None:
        """There is no other thread to wake it."""

    def _process_events(self, event_list: object) -> None:
        """There are no sockets."""


def _name(func: Callable[..., Any]) -> str:
    """The name of a function, also of one that `asyncio.to_thread` has wrapped to keep its context."""
    wrapped = func.args[0] if isinstance(func, functools.partial) else func
    return str(getattr(wrapped, "__name__", ""))


def _make_task(loop: VirtualLoop, coroutine: Any, **options: Any) -> Task:
    task = Task(coroutine, loop=loop, **options)
    loop.tasks.append(task)
    return task
