"""What a benchmark is made of: contenders that take turns, medians with their spread, ratios with their goals.

These machines are shared and noisy: a figure alone says nothing. All contenders of a case are ready at the same time
and run in turn, round after round; a ratio is the median of the rounds' own, so that a slow minute hits both sides.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace

ROUNDS = 3

#: Only to see that a case works from end to end: as little work as that takes, and figures that say nothing.
SMALL = bool(os.environ.get("MQINFER_BENCH_SMALL"))


class Unavailable(Exception):
    """A contender can't run on this machine; the message says why. Its column says so, the others run."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One side of a comparison."""

    name: str
    #: Makes it ready (servers, weights); gives the function that runs it once and returns the figure. May raise
    #: Unavailable. Called once; left when the case is over.
    ready: Callable[[], AbstractContextManager[Callable[[], float]]]


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of a ratio: the figure of `ours` over that of `rival`, at least (or at most) `bound`."""

    ours: str
    rival: str
    bound: float
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """What is asked of one figure by itself (sizes, shares; never a bare speed)."""

    ours: str
    bound: float
    at_most: bool = False


class Notes(list[str]):
    """A case's further findings by name, each a line of the report; a later one of a name replaces the earlier."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[str, str] = {}

    def put(self, name: str, finding: str) -> None:
        """In the order in which the names first came."""
        self._lines[name] = f"{name}: {finding}"
        self[:] = self._lines.values()


@dataclass(frozen=True, slots=True)
class Case:
    """Contenders that do the same work."""

    name: str
    #: What is done, for the report.
    work: str
    #: Of the figures: "tokens/s", "ms" and so on.
    unit: str
    contenders: Sequence[Contender]
    goals: Sequence[Goal | Limit] = ()
    rounds: int = ROUNDS
    #: Runs of each contender that are not counted.
    warmups: int = 1
    #: Whether nobody has been left out.
    whole: bool = True
    #: Further findings, set while it ran, each a line of the report.
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Figure:
    """What came out for one contender, round by round."""

    name: str
    values: Sequence[float]
    #: Where it could not run: why.
    absent: str = ""

    @property
    def median(self) -> float:
        """Of the rounds; NaN where it did not run."""
        return statistics.median(self.values) if self.values else float("nan")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case has shown."""

    case: Case
    figures: Sequence[Figure]

    def figure(self, name: str) -> Figure:
        """Raises: KeyError."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(name)

    def ratios(self, ours: str, rival: str) -> list[float]:
        """Round by round; empty where either did not run."""
        pairs = zip(self.figure(ours).values, self.figure(rival).values, strict=False)
        return [a / b for a, b in pairs]

    def reached(self, goal: Goal | Limit) -> tuple[float, bool] | None:
        """The median that counts and whether it is good enough; None where it could not be measured."""
        values = self.ratios(goal.ours, goal.rival) if isinstance(goal, Goal) else self.figure(goal.ours).values
        if not values:
            return None
        middle = statistics.median(values)
        return middle, middle <= goal.bound if goal.at_most else middle >= goal.bound


def narrowed(case: Case, only: re.Pattern[str]) -> Case:
    """The case with those contenders alone in whose names it is found, and the goals that only need them."""
    contenders = [contender for contender in case.contenders if only.search(contender.name)]
    names = {contender.name for contender in contenders}
    goals = [goal for goal in case.goals if {goal.ours, getattr(goal, "rival", goal.ours)} <= names]
    return replace(case, contenders=contenders, goals=goals, whole=len(contenders) == len(case.contenders))


def run(case: Case) -> Outcome:
    """All contenders made ready, then in turn."""
    values: dict[str, list[float]] = {contender.name: [] for contender in case.contenders}
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        runners: dict[str, Callable[[], float]] = {}

        def leave_out(name: str, why: Unavailable) -> None:
            absent[name] = " ".join(str(why).partition("\n")[0].split())  # a cell of a table
            say(f"{case.name}: {name} does not run: {why}")

        for contender in case.contenders:
            try:
                runners[contender.name] = stack.enter_context(contender.ready())
            except Unavailable as why:
                leave_out(contender.name, why)
        for round_ in range(-case.warmups, case.rounds):
            turn = list(runners.items())
            # Nobody is always the last; the first contender is the first of all, whose tokens the others must have.
            for name, runner in reversed(turn) if (round_ + case.warmups) % 2 else turn:
                try:
                    value = runner()
                except Unavailable as why:
                    leave_out(name, why)
                    values[name].clear()
                    del runners[name]
                    continue
                counted = "" if round_ >= 0 else " (warm-up)"
                say(f"{case.name}: {name}: {value:,.4g} {case.unit}{counted}")
                if round_ >= 0:
                    values[name].append(value)
    return Outcome(case, [Figure(name, runs, absent.get(name, "")) for name, runs in values.items()])


def say(line: str) -> None:
    """Progress, for who watches."""
    print(line, file=sys.stderr, flush=True)
