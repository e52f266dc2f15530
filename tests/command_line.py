"""Commands of `mqinfer` as processes, and the files that they need, for the tests of the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mqinfer.queues import new_id

PATIENCE_S = 60.0


class Ended(NamedTuple):
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


def write_prompts(path: Path, count: int, max_tokens: int = 4) -> Path:
    lines = [{"custom_id": f"id-{i}", "prompt": f"prompt {i}", "max_tokens": max_tokens} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MQINFER_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


class Process:
    """A command that runs; what it says goes to files, so that it can be waited for."""

    def __init__(self, folder: Path, *arguments: object, program: tuple[str, ...] = ("-m", "mqinfer")) -> None:
        name = new_id("process")
        self.out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        command = [sys.executable, *program, *map(str, arguments)]
        with self.out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment(), start_new_session=True
            )

    def said(self, words: str) -> None:
        """Returns when it has said that on standard error."""
        self.until(lambda: words in self._err.read_text())

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self._err.read_text()
            assert time.monotonic() < deadline_s, self._err.read_text()
            time.sleep(0.01)

    def end(self, number: signal.Signals | None = None) -> Ended:
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        return Ended(code, self.out.read_text(), self._err.read_text())
