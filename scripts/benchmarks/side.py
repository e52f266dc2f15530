"""A contender's own process: it loads once, then answers questions, a line of JSON each. Both ends of the pipe.

So that no two contenders share threads, caches or an interpreter, and that a side is gone when its pipe is closed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any

from local_fleet import LOG_TAIL, ROOT, process

from benchmarks.measure import Unavailable

#: How often it is looked whether those that a side waits for are still there.
LOOK_S = 1.0


class SideFailed(Exception):
    """The process ended without an answer; the message has the end of its log."""


class Side:
    """Our end."""

    def __init__(
        self, name: str, running: subprocess.Popen[bytes], log: Path, meanwhile: Callable[[], None] | None
    ) -> None:
        self._name = name
        self._running = running
        self._meanwhile = meanwhile
        self.log = log

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._running.pid

    def ask(self, within_s: float = inf, /, **question: Any) -> dict[str, Any]:
        """The answer. Raises: SideFailed, also where it takes too long; Unavailable; or what `meanwhile` raises."""
        if self._running.stdin is None or self._running.stdout is None:
            raise SideFailed(f"{self._name} has no pipes")
        try:
            self._running.stdin.write(json.dumps(question).encode() + b"\n")
            self._running.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(self._report()) from None
        began_s = time.monotonic()
        while not select.select([self._running.stdout], [], [], LOOK_S)[0]:
            if time.monotonic() - began_s > within_s:
                raise SideFailed(f"{self._name} has not answered for {within_s:.0f} s")
            if self._meanwhile is not None:
                self._meanwhile()
        line = self._running.stdout.readline()
        if not line:
            raise SideFailed(self._report())
        answer: dict[str, Any] = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer

    def _report(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        with suppress(subprocess.TimeoutExpired):  # its pipe has ended before it has
            self._running.wait(LOOK_S)
        return "\n".join([f"{self._name} ended without an answer, with {self._running.returncode}:", *lines])


@contextmanager
def side(
    module: str, *arguments: str, environment: Mapping[str, str], meanwhile: Callable[[], None] | None = None
) -> Iterator[Side]:
    """Run `python -m benchmarks.MODULE`; `meanwhile` is called now and then while an answer is waited for."""
    paths = [str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="mqinfer-bench-") as folder:
        log = Path(folder, f"{module}.log")
        with (
            log.open("wb") as errors,
            process(
                *(sys.executable, "-m", f"benchmarks.{module}", *arguments),
                stop=signal.SIGTERM,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Its files go with ours, however it ends.
                environment={"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": folder, **environment},
            ) as running,
        ):
            yield Side(module, running, log, meanwhile)


class Channel:
    """The process's end. Whatever else it prints goes to its log."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def read(self) -> dict[str, Any] | None:
        """The next question; None when there will be no more."""
        line = sys.stdin.readline()
        question: dict[str, Any] | None = json.loads(line) if line else None
        return question

    def write(self, **answer: Any) -> None:
        """The answer; with `unavailable`, why this can't be done here."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
