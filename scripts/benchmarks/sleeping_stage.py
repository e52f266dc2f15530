"""Stage workers that sleep where others compute: all of a worker is real but its engine.

`python -m benchmarks.sleeping_stage --pipeline FILE --broker URL --stages 0,1,1 --step-s 0.02` is three
workers, one process each, that end together. With `--curves` they are unlike, and sleep by a forward's rows. Hidden
states are noise of the right size, tokens are the rows' positions; a row whose earlier positions a worker does not hold
is missed, as by a real one. Other settings: MQINFER_*.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from local_fleet import end_with_parent
from torch import Tensor

from mqinfer.fleet_costs import Curve
from mqinfer.messages import Miss, MissReason, Row, Sampled
from mqinfer.observe import log_to_stderr
from mqinfer.plan import Plan, read
from mqinfer.running import finish
from mqinfer.settings import WorkerSettings, load
from mqinfer.stage_compute import StageCompute
from mqinfer.stage_engine import Done, Work
from mqinfer.stage_worker import StageWorker
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

#: What one row's keys and values count as, and how many rows have room: more than ever come.
ROW_BYTES, KV_ROWS = 2**20, 100_000

#: Seconds of a forward over these microbatches.
Pace = Callable[[Sequence[Work]], float]


class SleepingEngine:
    """Has the interface of a StageEngine, for the one compute thread."""

    def __init__(self, plan: Plan, stage: int, forward_s: Pace) -> None:
        """`forward_s`: how long it sleeps over a forward."""
        self.device = torch.device("cpu")
        self.first = stage == 0
        self.last = stage == len(plan.stages) - 1
        self.kv_budget_bytes = KV_ROWS * ROW_BYTES
        self._plan = plan
        self._stage = stage
        self._forward_s = forward_s
        #: (owner, row) -> epoch, positions held.
        self._held: dict[tuple[str, int], tuple[int, int]] = {}
        self._noise = torch.empty(0)

    @property
    def cached_rows(self) -> int:
        """See StageEngine."""
        return len(self._held)

    @property
    def kv_used_bytes(self) -> int:
        """See StageEngine."""
        return len(self._held) * ROW_BYTES

    def fits(self, rows: Sequence[Row]) -> bool:
        """See StageEngine."""
        return len(self._held) + sum(row.start == 0 for row in rows) <= KV_ROWS

    def forget(self, owner: str, rows: Sequence[tuple[int, int]]) -> None:
        """See StageEngine."""
        for row, epoch in rows:
            if self._held.get((owner, row), (epoch + 1, 0))[0] <= epoch:
                del self._held[owner, row]

    def forget_idle(self) -> int:
        """Nothing is ever idle here."""
        return 0

    def forget_all(self) -> None:
        """See StageEngine."""
        self._held.clear()

    def run(self, works: Sequence[Work]) -> list[Done]:
        """See StageEngine."""
        time.sleep(self._forward_s(works))
        return [self._done(work) for work in works]

    def _done(self, work: Work) -> Done:
        reasons = {row.row: self._admit(work.owner, row) for row in work.rows}
        rows = tuple(row for row in work.rows if reasons[row.row] is None)
        sampled = [
            Sampled(row=row.row, epoch=row.epoch, token=(row.start + row.count) % self._plan.vocab_size)
            for row in rows
            if self.last and row.sampling is not None
        ]
        misses = [
            Miss(row=row.row, epoch=row.epoch, stage=self._stage, reason=reason)
            for row in work.rows
            if (reason := reasons[row.row]) is not None
        ]
        hidden = None if self.last or not rows else self._hidden(sum(row.count for row in rows))
        return Done(rows=rows, hidden=hidden, sampled=tuple(sampled), misses=tuple(misses))

    def _admit(self, owner: str, row: Row) -> MissReason | None:
        epoch, length = self._held.get((owner, row.row), (row.epoch - 1, 0))
        if epoch < row.epoch:  # it is new here
            if row.start:
                return MissReason.CACHE
            if not self.fits([row]):
                return MissReason.ROOM
            epoch = row.epoch
        elif epoch > row.epoch or length < row.start:
            return MissReason.CACHE
        self._held[owner, row.row] = epoch, row.start + row.count
        return None

    def _hidden(self, tokens: int) -> Tensor:
        """[tokens, hidden_size]: compresses about as real ones do."""
        if len(self._noise) < tokens:
            self._noise = torch.randn(tokens, self._plan.hidden_size).to(getattr(torch, self._plan.dtype))
        return self._noise[:tokens]


def _by_rows(curve: Curve, works: Sequence[Work]) -> float:
    return curve.at(sum(len(work.rows) for work in works))


def serve(plan: Plan, stage: int, forward_s: Pace, settings: WorkerSettings) -> int:
    """One worker, until SIGTERM. The exit code."""

    async def connect() -> Transport:
        return await open_transport(settings.broker, name=f"sleeping worker {stage}", heartbeat_s=settings.heartbeat_s)

    log_to_stderr(level=settings.log_level, as_json=settings.log_json)
    engine: Any = SleepingEngine(plan, stage, forward_s)
    compute = StageCompute(plan, stage, engine, codec=settings.codec, threads=settings.threads)
    finish(StageWorker(plan, stage, compute, settings, connect).run, stopped=0)
    return 0


def serve_all(works: Sequence[Callable[[], int]]) -> int:
    """Each in a process of its own, forked, for imports take seconds; all end when one does. The exit code."""
    children = [_forked(work) for work in works]

    def end(*_: object) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    code = 0
    for _ in works:
        ended, status = os.wait()
        children.remove(ended)
        code = max(code, abs(os.waitstatus_to_exitcode(status)))
        end()
    return code


def _forked(work: Callable[[], int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        end_with_parent()
        code = work()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="the plan's file")
    parser.add_argument("--broker", required=True)
    parser.add_argument("--stages", required=True, help="of each worker: 0,1,1")
    pace = parser.add_mutually_exclusive_group(required=True)
    pace.add_argument("--step-s", type=float, help="sleep for each microbatch of a forward")
    pace.add_argument("--curves", type=json.loads, help="of each worker: [[rows of a forward, seconds], …], as JSON")
    options = parser.parse_args()
    plan = read(options.pipeline)
    settings = load(WorkerSettings, broker=options.broker, threads=1)
    stages = [int(stage) for stage in options.stages.split(",")]
    paces: list[Pace] = [lambda works: len(works) * options.step_s] * len(stages)
    if options.curves:
        paces = [
            partial(_by_rows, Curve(tuple((rows, seconds) for rows, seconds in curve))) for curve in options.curves
        ]
    works = [partial(serve, plan, stage, pace, settings) for stage, pace in zip(stages, paces, strict=True)]
    return works[0]() if len(works) == 1 else serve_all(works)


if __name__ == "__main__":
    sys.exit(main())
