"""`mqinfer worker` in all but its compute, which sleeps: a side that starts and ends such workers while a job runs.

Each is a process of its own that runs the real command, `--stage auto` included; only what loads a stage is another.
They are forked from this process, for the imports of a worker take seconds of a processor that all of them share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from local_fleet import end_with_parent

from benchmarks.side import Channel
from benchmarks.sleeping_stage import SleepingEngine
from mqinfer import cli, stage_compute, stage_worker, worker_command  # noqa: F401 - what a worker imports late, too
from mqinfer.plan import Plan
from mqinfer.settings import WorkerSettings
from mqinfer.stage_compute import StageCompute
from mqinfer.stage_engine import Work

#: No process of ours has more files open.
MOST_FILES = 256


def load_sleeping(
    position_s: Sequence[float], plan: Plan, stage: int, _: Path, settings: WorkerSettings
) -> StageCompute:
    """In place of `stage_compute.load_compute`; `position_s`: what a new position takes, by stage."""
    engine: Any = SleepingEngine(plan, stage, partial(_by_positions, position_s[stage]))
    return StageCompute(plan, stage, engine, codec=settings.codec, threads=settings.threads)


def _by_positions(position_s: float, works: Sequence[Work]) -> float:
    return position_s * sum(row.count for work in works for row in work.rows)


def start(arguments: Sequence[str], position_s: Sequence[float], log: str) -> int:
    """The process id of `mqinfer worker` with these arguments."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent()
        _write_to(log)
        stage_compute.load_compute = partial(load_sleeping, position_s)
        sys.argv = ["mqinfer", "worker", *arguments]
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _write_to(log: str) -> None:
    """Nothing is read, all goes to the log, and no pipe of the side's is kept open."""
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(nothing, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.closerange(3, MOST_FILES)


def ended(pid: int) -> int | None:
    """The worker's exit code; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def main() -> None:
    """Answer until the pipe is closed or SIGTERM; who runs then is killed."""
    channel = Channel()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    children: set[int] = set()
    try:
        while (question := channel.read()) is not None:
            match question.pop("op"):
                case "ready":
                    channel.write()
                case "start":
                    children.add(pid := start(**question))
                    channel.write(pid=pid)
                case "stop":
                    os.kill(question["pid"], signal.SIGTERM)
                    channel.write()
                case "ended":
                    code = ended(question["pid"])
                    children -= set() if code is None else {question["pid"]}
                    channel.write(code=code)
                case other:
                    raise ValueError(other)
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
