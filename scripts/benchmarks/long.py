"""The case `long`: a prompt of thousands of tokens joins rows that decode. How much of their rate do they keep?

What is decoded when is read from the log lines of those who compute the last stage: they tell of every forward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import ours, workload
from benchmarks.measure import Case, Contender, Limit
from benchmarks.ours import Layout, Mqinfer, Pipeline
from benchmarks.workload import Agreement, Row, Workload, WrongWork, check

#: The prompt joins when this part of the rows' own time is over.
JOINS_AFTER = 0.25

_TOLD = {"MQINFER_LOG_LEVEL": "debug", "MQINFER_LOG_JSON": "1"}


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of the last stage."""

    #: When it ended, as time.time has it.
    at_s: float
    rows: int
    tokens: int

    @property
    def prefills(self) -> bool:
        """Whether some row computed more than one position."""
        return self.tokens > self.rows

    @property
    def decoded(self) -> int:
        """Tokens drawn for rows that decode, where at most one row is not yet at that."""
        return self.rows - self.prefills


@dataclass(frozen=True, slots=True)
class Rates:
    """What the decoding rows made, all together, in tokens/s."""

    alone: float
    beside_prefill: float
    #: How long the prompt took, from its job's beginning to its result.
    prefill_s: float


def cases(name: str) -> list[Case]:
    """See benchmarks.__main__."""
    work, joining = workload.joined("float32")
    notes: list[str] = []
    mine = Mqinfer("float32", Agreement(notes, wanted=True))
    layouts = [replace(layout, environment=_TOLD) for layout in (ours.TWO_STAGES, ours.TWO_WORKERS, ours.ONE_PROCESS)]
    rows, tokens = len(work.rows), len(joining.prompt)
    return [
        Case(
            name,
            f"{rows} rows decode ({len(work.rows[0].prompt)} tokens in, {work.rows[0].output_tokens} out), one prompt "
            f"of {tokens:,} tokens joins them, float32: what the {rows} rows make in all while it is prefilled, as a "
            "share of what they make before and after.",
            "of their rate",
            [_contender(mine, layout, work, joining, notes) for layout in layouts],
            [Limit(ours.TWO_STAGES.name, 0.6)],
            warmups=0,  # the rows have run by themselves before
            notes=notes,
        )
    ]


def _contender(mine: Mqinfer, layout: Layout, work: Workload, joining: Row, notes: list[str]) -> Contender:
    @contextmanager
    def ready() -> Iterator[Callable[[], float]]:
        seen: list[Rates] = []
        with mine.shared(layout).held() as running:
            alone_s: float = running.run(work.jobs)["seconds"]
            prompt_s: float = running.run([[joining]])["seconds"]

            def run() -> float:
                seen.append(_rates(running, layout, work, joining, JOINS_AFTER * alone_s))
                return seen[-1].beside_prefill / seen[-1].alone

            yield run
        if seen:
            last = seen[-1]
            kept, speed = last.beside_prefill / last.alone, prompt_s / last.prefill_s
            notes.append(
                f"{layout.name}, last round: {last.alone:.0f} tokens/s without the prompt, {last.beside_prefill:.0f} "
                f"beside it; its first token came after {last.prefill_s:.1f} s, where it has the pipeline to itself "
                f"after {prompt_s:.1f} s. The prompt kept {speed:.0%} of its speed: {kept + speed:.0%} in all, where "
                "taking turns would make 100%"
            )

    return Contender(layout.name, ready)


def _rates(running: Pipeline, layout: Layout, work: Workload, joining: Row, after_s: float) -> Rates:
    jobs = [[*work.rows], [joining]]
    answer = running.run(jobs, after_s=[0.0, after_s])
    check(work, answer["outputs"][0], layout.name)
    forwards = _forwards(running.logs(layout.stages - 1, layout), layout.stages - 1)
    return rates(forwards, answer, after_s)


def rates(forwards: Sequence[Forward], answer: dict[str, Any], after_s: float) -> Rates:
    """From the forwards and what `ours_side` says of both jobs.

    Raises: WrongWork where the prompt was not prefilled while all rows decoded.
    """
    started_s: float = answer["started_s"]
    joined_s, done_s = started_s + after_s, answer["times_s"][1][0]
    ended_s = min(answer["times_s"][0])
    first = [forward.at_s for forward in forwards if started_s < forward.at_s < joined_s and forward.prefills]
    settled_s = max(first, default=started_s)
    if not settled_s < joined_s < done_s < ended_s:
        raise WrongWork("the rows did not decode before, during and after the prompt's prefill: nothing to compare")
    outside_s = (joined_s - settled_s) + (ended_s - done_s)
    outside = _decoded(forwards, settled_s, joined_s) + _decoded(forwards, done_s, ended_s)
    return Rates(
        outside / outside_s, _decoded(forwards, joined_s, done_s) / (done_s - joined_s), prefill_s=done_s - joined_s
    )


def _decoded(forwards: Iterable[Forward], after_s: float, until_s: float) -> int:
    return sum(forward.decoded for forward in forwards if after_s < forward.at_s <= until_s)


def _forwards(logs: Sequence[Path], stage: int) -> list[Forward]:
    """All that the logs tell of the stage."""
    lines = (line for log in logs for line in log.read_text().splitlines() if '"step.computed"' in line)
    told = [fields for fields in map(json.loads, lines) if fields["stage"] == stage]
    return [
        Forward(datetime.fromisoformat(fields["timestamp"]).timestamp(), fields["rows"], fields["tokens"])
        for fields in told
    ]
