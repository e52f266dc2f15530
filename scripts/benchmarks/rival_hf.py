"""The rival transformers: the whole model in one process with all cores, as good as its own means allow.

Static batches are what most people run. Continuous batching is its newer engine, made for GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.measure import Contender
from benchmarks.shared import Shared
from benchmarks.side import Side, side
from benchmarks.workload import WARM_ROWS, WARM_TOKENS, Agreement, Row, Workload, in_order

#: Positions of a prefill that cost about as much as one more step of a batch: so many, and so many for each row
#: (on 2 cores 75 ms a step at 1 row, 180 at 16, 255 at 32; some 600 positions/s).
_STEP_POSITIONS, _ROW_POSITIONS = 40, 4


class Transformers:
    """Its contenders for one piece of work; they share a process."""

    def __init__(self, work: Workload, agreement: Agreement) -> None:
        self._work = work
        self._agreement = agreement
        self._process = Shared(lambda: _process(work.dtype))

    def static(self, name: str, size: int) -> Contender:
        """`generate` over batches of `size` rows, put together so that the least is wasted."""
        order = _order(self._work.rows, size)
        return self._contender(name, "generate", order, lambda rows: {"batches": _batches(rows, size)})

    def scored(self, name: str, size: int) -> Contender:
        """A plain forward over batches of `size` prompts."""
        order = _order(self._work.rows, size)
        return self._contender(name, "score", order, lambda rows: {"batches": _batches(rows, size)})

    def continuous(self, name: str, at_once: int) -> Contender:
        """Its own continuous batching, up to `at_once` rows in flight."""

        def question(rows: Sequence[Row]) -> dict[str, Any]:
            asked = [{"prompt": row.prompt, "output_tokens": row.output_tokens} for row in rows]
            return {"rows": asked, "at_once": at_once}

        return self._contender(name, "continuous", range(len(self._work.rows)), question)

    def _contender(
        self, name: str, op: str, order: Sequence[int], question: Callable[[Sequence[Row]], dict[str, Any]]
    ) -> Contender:
        rows = self._work.rows

        def run(process: Side) -> float:
            answer = process.ask(op=op, **question([rows[index] for index in order]))
            drawn = zip(rows, in_order(order, answer["outputs"]), strict=True)
            outputs = [output[: row.output_tokens] for row, output in drawn]  # the rest is the batch's, and of no use
            return self._agreement.rate(self._work, outputs, answer["seconds"], name)

        @contextmanager
        def ready() -> Iterator[Callable[[], float]]:
            with self._process.held() as process:
                process.ask(op=op, **question(self._work.beginning(WARM_ROWS, WARM_TOKENS).rows))
                yield lambda: run(process)

        return Contender(name, ready)


def waste(work: Workload, size: int) -> str:
    """How many of the rows' steps in static batches of `size` draw a token that nobody asked for, as a sentence."""
    best = [work.rows[index] for index in _order(work.rows, size)]
    by_prompt = sorted(work.rows, key=lambda row: len(row.prompt))
    return (
        f"transformers' batches of {size} are put together with all lengths known, as no user knows them: "
        f"{_wasted(best, size):.0%} of the steps of their rows are wasted; sorted by prompt alone it would be "
        f"{_wasted(by_prompt, size):.0%}"
    )


def _wasted(rows: Sequence[Row], size: int) -> float:
    steps = sum(len(group) * max(row.output_tokens for row in group) for group in _groups(rows, size))
    return 1 - sum(row.output_tokens for row in rows) / steps


@contextmanager
def _process(dtype: str) -> Iterator[Side]:
    cores = str(len(os.sched_getaffinity(0)))
    with side("hf_side", dtype, environment={"OMP_NUM_THREADS": cores}) as process:
        yield process


def _batches(rows: Sequence[Row], size: int) -> list[dict[str, Any]]:
    return [
        {"prompts": [row.prompt for row in group], "output_tokens": max(row.output_tokens for row in group)}
        for group in _groups(rows, size)
    ]


def _groups(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _order(rows: Sequence[Row], size: int) -> list[int]:
    """The rows' numbers, sorted by output, prompt or both, whichever wastes least in batches of `size`.

    No user knows beforehand how long answers will be: this is better than its best.
    """
    keys: list[Callable[[Row], tuple[int, int]]] = [
        lambda row: (row.output_tokens, len(row.prompt)),
        lambda row: (len(row.prompt), row.output_tokens),
        lambda row: (row.output_tokens + len(row.prompt), 0),
    ]
    orders = [sorted(range(len(rows)), key=lambda index: key(rows[index])) for key in keys]
    return min(orders, key=lambda order: _cost([rows[index] for index in order], size))


def _cost(rows: Sequence[Row], size: int) -> int:
    """Of static batches in this order, in positions, about."""
    return sum(
        len(group) * max(len(row.prompt) for row in group)
        + (_STEP_POSITIONS + _ROW_POSITIONS * len(group)) * max(row.output_tokens for row in group)
        for group in _groups(rows, size)
    )
