"""The case `long`: a prompt of thousands of tokens joins rows that decode. How much of its speed does each side keep?

What is decoded when is read from the log lines of those who compute the last stage: they tell of every forward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
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
    """What one round showed."""

    #: What the decoding rows made, all together, in tokens/s: without the prompt, and while it was prefilled.
    alone: float
    beside_prefill: float
    #: How long the prompt took, from its job's beginning to its result: in a pipeline of its own, and beside the rows.
    prompt_alone_s: float
    prefill_s: float

    @property
    def rows_kept(self) -> float:
        """The decoding rows' rate beside the prompt, as a share of their own."""
        return self.beside_prefill / self.alone

    @property
    def prompt_kept(self) -> float:
        """The prompt's speed beside the rows, as a share of its own."""
        return self.prompt_alone_s / self.prefill_s


#: What is looked at, by its name in the report.
ROWS, PROMPT = "the rows that decode", "the prompt"
KEPT: Mapping[str, Callable[[Rates], float]] = {ROWS: lambda r: r.rows_kept, PROMPT: lambda r: r.prompt_kept}


def cases(name: str) -> list[Case]:
    """See benchmarks.__main__."""
    work, joining = workload.joined("float32")
    notes: list[str] = []
    agreement = Agreement(notes, wanted=True)
    mine = Mqinfer("float32", agreement)
    layouts = [replace(layout, environment=_TOLD) for layout in (ours.TWO_STAGES, ours.TWO_WORKERS, ours.ONE_PROCESS)]
    joinings = [Joining(mine, layout, work, joining, agreement, notes) for layout in layouts]
    rows, tokens = len(work.rows), len(joining.prompt)
    return [
        Case(
            name,
            f"{rows} rows decode ({len(work.rows[0].prompt)} tokens in, {work.rows[0].output_tokens} out), one prompt "
            f"of {tokens:,} tokens joins them, float32. Of the rows: what they make in all while it is prefilled, as a "
            "share of what they make before and after. Of the prompt: the time until its first token where it has the "
            "pipeline to itself, as a share of that beside the rows. Taking turns would make 1 of both together.",
            "of their speed alone",
            [joining.contender(what) for joining in joinings for what in KEPT],
            # The second is no goal of the issue's: an engine that lets the prompt wait would reach the first by it.
            [Limit(f"{ours.TWO_STAGES.name}: {ROWS}", 0.6), Limit(f"{ours.TWO_STAGES.name}: {PROMPT}", 0.25)],
            warmups=0,  # the rows have run by themselves before
            notes=notes,
        )
    ]


@dataclass(slots=True)
class Joining:
    """The rounds of one layout: the rows and the prompt are contenders that look at the same ones."""

    mine: Mqinfer
    layout: Layout
    work: Workload
    prompt: Row
    agreement: Agreement
    notes: list[str]
    #: What the rows take by themselves, from the run that warms the layout up.
    rows_s: float = 0.0
    seen: list[Rates] = field(default_factory=list)

    def contender(self, what: str) -> Contender:
        """`what`: of KEPT."""
        return Contender(f"{self.layout.name}: {what}", partial(self._ready, KEPT[what]))

    @contextmanager
    def _ready(self, kept: Callable[[Rates], float]) -> Iterator[Callable[[], float]]:
        with self.mine.shared(self.layout).held() as running:
            self.rows_s = self.rows_s or running.run(self.work.jobs)["seconds"]
            numbers = count()
            yield lambda: kept(self._round(running, next(numbers)))
        if self.seen:
            self.notes.append(self._told())
            self.seen.clear()  # the other contender has the same to tell

    def _round(self, running: Pipeline, number: int) -> Rates:
        """Measured by who comes first."""
        if number == len(self.seen):
            self.seen.append(self._rates(running))
        return self.seen[number]

    def _rates(self, running: Pipeline) -> Rates:
        """The prompt by itself, then both. Raises: WrongWork."""
        after_s = JOINS_AFTER * self.rows_s
        alone = running.run([[self.prompt]])
        answer = running.run([[*self.work.rows], [self.prompt]], after_s=[0.0, after_s])
        outputs = [output for job in answer["outputs"] for output in job]
        check(replace(self.work, jobs=(*self.work.jobs, (self.prompt,))), outputs, self.layout.name)
        self.agreement.see(self.layout.name, outputs, ours=True)
        last = self.layout.stages - 1
        forwards = _forwards(running.logs(last, self.layout), last)
        return rates(forwards, answer, after_s, prompt_alone_s=alone["times_s"][0][0] - alone["started_s"])

    def _told(self) -> str:
        alone, beside, prompt_s, prefill_s = (
            median(getattr(rates, name) for rates in self.seen)
            for name in ("alone", "beside_prefill", "prompt_alone_s", "prefill_s")
        )
        return (
            f"{self.layout.name}: {alone:.0f} tokens/s without the prompt, {beside:.0f} beside it; the prompt's first "
            f"token came after {prefill_s:.1f} s, by itself after {prompt_s:.1f} s"
        )


def rates(forwards: Sequence[Forward], answer: Mapping[str, Any], after_s: float, *, prompt_alone_s: float) -> Rates:
    """From the forwards and what `ours_side` says of both jobs. `forwards`: by the time of their ends.

    The rows' rate beside the prompt is that from the beginning of its first chunk to the end of its last, or to the
    first row's end where that is earlier. Raises: WrongWork where that was not while all rows decoded.
    """
    started_s: float = answer["started_s"]
    joined_s, done_s, ended_s = started_s + after_s, answer["times_s"][1][0], min(answer["times_s"][0])
    until_s = min(done_s, ended_s)
    first = [forward.at_s for forward in forwards if started_s < forward.at_s < joined_s and forward.prefills]
    settled_s = max(first, default=started_s)
    chunks = [forward.at_s for forward in forwards if joined_s < forward.at_s <= until_s and forward.prefills]
    if not chunks:
        raise WrongWork("the prompt was not prefilled while all rows decoded: nothing to compare")
    began_s = max((forward.at_s for forward in forwards if joined_s < forward.at_s < chunks[0]), default=joined_s)
    over_s = chunks[-1] if done_s < ended_s else ended_s
    outside_s = (joined_s - settled_s) + max(ended_s - done_s, 0.0)
    outside = _decoded(forwards, settled_s, joined_s) + _decoded(forwards, done_s, ended_s)
    return Rates(
        alone=outside / outside_s,
        beside_prefill=_decoded(forwards, began_s, over_s) / (over_s - began_s),
        prompt_alone_s=prompt_alone_s,
        prefill_s=done_s - joined_s,
    )


def _decoded(forwards: Iterable[Forward], after_s: float, until_s: float) -> int:
    return sum(forward.decoded for forward in forwards if after_s < forward.at_s <= until_s)


def _forwards(logs: Sequence[Path], stage: int) -> list[Forward]:
    """All that the logs tell of the stage, by time."""
    lines = (line for log in logs for line in log.read_text().splitlines() if '"step.computed"' in line)
    told = [fields for fields in map(json.loads, lines) if fields["stage"] == stage]
    found = [
        Forward(datetime.fromisoformat(fields["timestamp"]).timestamp(), fields["rows"], fields["tokens"])
        for fields in told
    ]
    return sorted(found, key=lambda forward: forward.at_s)
