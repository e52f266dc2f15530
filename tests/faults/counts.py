"""Counting as RabbitMQ's own Jepsen suite does, and the report that a fault's test leaves behind.

A report is one line of JSON in the file that MQINFER_FAULTS_REPORT names; scripts/faults makes its table of them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import rows
from workload import Question, original

REPORT_FILE = "MQINFER_FAULTS_REPORT"


@dataclass(slots=True)
class Counts:
    """What became of the lines of one or more jobs."""

    #: Lines that were asked.
    attempted: int = 0
    #: Lines that have a row with the right answer (or, where a failure is right, a failure).
    answered: int = 0
    #: Lines without a row.
    lost: int = 0
    #: Rows beyond the first of their line.
    repeated: int = 0
    #: Rows of no line, failures, and texts that are not those of the run without faults.
    unexpected: int = 0

    @property
    def good(self) -> bool:
        """One right row for every line."""
        return self.attempted == self.answered and not (self.lost or self.repeated or self.unexpected)

    def add(self, other: Counts) -> None:
        """Another job's counts."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(slots=True)
class Report:
    """What a test says of its fault: one line of the table."""

    test: str
    fault: str = ""
    done: str = ""
    counts: Counts | None = None
    #: Positions that had to be computed again, in percent of all that the job needs.
    replayed_percent: float | None = None
    #: The longest time from the fault (or its end) to the next result.
    flowing_s: float | None = None
    #: More that was measured.
    note: str = ""

    def count(self, counts: Counts) -> None:
        """Add a job's counts."""
        self.counts = self.counts or Counts()
        self.counts.add(counts)

    def flowed(self, seconds: float) -> None:
        """Note how long nothing flowed."""
        self.flowing_s = max(self.flowing_s or 0.0, seconds)

    def write(self, outcome: str, seconds: float) -> None:
        """Append it to the suite's report, if one is made."""
        if file := os.environ.get(REPORT_FILE):
            line = asdict(self) | {"outcome": outcome, "seconds": round(seconds, 1)}
            with Path(file).open("a") as report:
                report.write(json.dumps(line) + "\n")


def count(output: Path, asked: Mapping[str, Question], answers: Mapping[str, str], failing: frozenset[str]) -> Counts:
    """Compare a results file with what it must hold; the lines in `failing` must end in a failure row."""
    found = rows(output)
    times = Counter(row["custom_id"] for row in found)
    right = {row["custom_id"] for row in found if _is_right(row, answers, failing)}
    wrong = {name for name in times if name not in right}
    return Counts(
        attempted=len(asked),
        answered=len(right & asked.keys()),
        lost=len(asked.keys() - times.keys()),
        repeated=sum(times.values()) - len(times),
        unexpected=len(wrong | (times.keys() - asked.keys())),
    )


def text(row: Mapping[str, Any]) -> str:
    """The text of an answer."""
    return str(row["response"]["body"]["choices"][0]["text"])


def used_tokens(output: Path) -> int:
    """Positions that the job's rows need, each computed once."""
    usages = [row["response"]["body"]["usage"] for row in rows(output) if row["response"]]
    return sum(usage["prompt_tokens"] + usage["completion_tokens"] - 1 for usage in usages)


def _is_right(row: Mapping[str, Any], answers: Mapping[str, str], failing: frozenset[str]) -> bool:
    if row["custom_id"] in failing:
        return bool(row["error"])
    return not row["error"] and text(row) == answers.get(original(row["custom_id"]))
