"""`mqinfer` with something wrong in it: a launcher for tests, so that the product needs no hook for faults.

SABOTAGE says what, as a comma-separated list:

    raise:TOKEN      computing a row with that token in its prompt raises
    kill:TOKEN       ... kills the process
    memory:TOKEN     ... raises torch.OutOfMemoryError, however few rows are computed with it
    crowd:ROWS       computing more than so many rows at once raises torch.OutOfMemoryError
    nan:TOKEN        the hidden states of a row with that token leave the stage as NaN
    fsync:ERRNO:N    the N-th and every later fsync fails with that error

Each time it strikes it says so in the log, as a JSON line whose event is `sabotage`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def said(kind: str) -> None:
    """Tell the log, at once: the process may be about to die."""
    os.write(2, (json.dumps({"event": "sabotage", "kind": kind}) + "\n").encode())


def with_token(jobs: Any, token: int) -> bool:
    """Whether a row of these jobs computes that token; only stage 0 sees tokens."""
    return any(not job.inputs.is_floating_point() and bool((job.inputs == token).any()) for job in jobs)


def before_compute(strike: Callable[[Any], None]) -> None:
    """Call `strike` with the jobs of every forward before it runs."""
    from mqinfer.stage_engine import StageEngine

    compute = StageEngine._compute

    def sabotaged(self: StageEngine, jobs: Any) -> None:
        strike(jobs)
        compute(self, jobs)

    StageEngine._compute = sabotaged  # type: ignore[method-assign]


def raising(token: int) -> None:
    """See the module's docstring."""

    def strike(jobs: Any) -> None:
        if with_token(jobs, token):
            said("raise")
            raise RuntimeError("a poisoned row")

    before_compute(strike)


def killing(token: int) -> None:
    """See the module's docstring."""

    def strike(jobs: Any) -> None:
        if with_token(jobs, token):
            said("kill")
            os.kill(os.getpid(), signal.SIGKILL)

    before_compute(strike)


def out_of_memory(token: int) -> None:
    """See the module's docstring."""
    import torch

    def strike(jobs: Any) -> None:
        if with_token(jobs, token):
            said("memory")
            raise torch.OutOfMemoryError("injected")

    before_compute(strike)


def crowded(most: int) -> None:
    """See the module's docstring."""
    import torch

    def strike(jobs: Any) -> None:
        if len(jobs) > most:
            said("crowd")
            raise torch.OutOfMemoryError("injected")

    before_compute(strike)


def not_finite(token: int) -> None:
    """See the module's docstring: after the engine's own check, as a broken bus would."""
    from mqinfer.stage_engine import StageEngine

    run = StageEngine._split

    def sabotaged(self: StageEngine, jobs: Any, hidden: Any) -> None:
        run(self, jobs, hidden)
        for job in jobs:
            if with_token([job], token) and job.hidden is not None:
                said("nan")
                job.hidden.fill_(float("nan"))

    StageEngine._split = sabotaged  # type: ignore[method-assign]


def failing_fsync(name: str, first: int) -> None:
    """See the module's docstring."""
    fsync, calls = os.fsync, [0]
    number = getattr(errno, name)

    def sabotaged(fd: Any) -> None:
        calls[0] += 1
        if calls[0] >= first:
            said("fsync")
            raise OSError(number, os.strerror(number))
        fsync(fd)

    os.fsync = sabotaged


KINDS: dict[str, Callable[[int], None]] = {
    "raise": raising,
    "kill": killing,
    "memory": out_of_memory,
    "crowd": crowded,
    "nan": not_finite,
}


def main() -> None:
    """Break what SABOTAGE says, then be `mqinfer`."""
    for item in filter(None, os.environ.get("SABOTAGE", "").split(",")):
        kind, *values = item.split(":")
        if kind == "fsync":
            failing_fsync(values[0], int(values[1]))
        else:
            KINDS[kind](int(values[0]))
    from mqinfer.cli import main as mqinfer

    sys.argv[0] = "mqinfer"
    mqinfer()


if __name__ == "__main__":
    main()
