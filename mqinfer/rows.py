"""Rows and microbatches under way, and what the scheduler decides about them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mqinfer.messages import FinishReason, Miss, MissReason, Release, Request, Row, Step, StepTaken, TokenLogprob
from mqinfer.verdicts import BLAMED, MAX_FAILURES

#: What the latest trip counts against those before it.
LATEST = 0.2
#: So many microbatches that were given up are remembered.
MOST_GIVEN_UP = 1024


@dataclass(slots=True, kw_only=True)
class LiveRow:
    """A request being computed."""

    number: int
    request: Request
    output: list[int]
    logprobs: list[TokenLogprob]
    epoch: int = 0
    #: Positions whose keys and values the workers of this epoch's route hold.
    cached: int = 0
    #: Blames since its last progress: three are its end.
    failures: int = 0
    #: Blames that its request in the broker tells of; the row waits while it has more (docs/decisions/0007).
    kept_failures: int = 0
    #: Joins nobody and nobody joins it.
    alone: bool = False
    #: Must begin in a new microbatch.
    fresh: bool = False

    @property
    def ready(self) -> bool:
        """Whether it may go on its way: what it is blamed for would be remembered."""
        return self.failures <= self.kept_failures

    @property
    def known(self) -> int:
        """Positions whose tokens are known."""
        return len(self.request.prompt) + len(self.output)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """The token ids of positions [start, end)."""
        prompt = self.request.prompt
        tail = self.output[max(start - len(prompt), 0) : max(end - len(prompt), 0)]
        return (*prompt[start:end], *tail)

    def checkpoint(self) -> Request:
        """The request with the tokens that it has so far."""
        return replace(self.request, output=tuple(self.output), logprobs=tuple(self.logprobs), failures=self.failures)

    def outgoing(self) -> Request:
        """A checkpoint that is about to be kept; from now on the broker may have forgotten any blame that it lacks."""
        self.kept_failures = min(self.kept_failures, self.failures)
        return self.checkpoint()


def parts_of(rows: Sequence[LiveRow], counts: Sequence[int], context_tokens: int) -> tuple[Row, ...]:
    """What the rows' next step says of those that have new positions in it: so many each (`counts`)."""
    return tuple(
        Row(
            row=row.number,
            epoch=row.epoch,
            start=row.cached,
            count=count,
            reserve=min(len(row.request.prompt) + row.request.max_tokens, context_tokens),
            sampling=row.request.sampling if row.cached + count == row.known else None,
        )
        for row, count in zip(rows, counts, strict=True)
        if count
    )


@dataclass(slots=True, kw_only=True)
class Microbatch:
    """Rows that travel together, and the one step that is under way."""

    number: int
    rows: list[LiveRow]
    alone: bool = False
    #: Nobody joins any more.
    closed: bool = False
    route: tuple[str, ...] = ()
    #: Workers that have taken the step under way on its first trip, all that is known of its route until it comes
    #: home; where the microbatch is `alone`, those that compute it just now.
    takers: list[str] = field(default_factory=list)
    #: Where it is `alone`: workers that are through with the step under way, as far as they have said so.
    passed: int = 0
    #: Number of the step under way.
    step: int = -1
    sent_at_s: float = 0.0
    #: How long its trips take, the latest ones most; 0 before the second has ended.
    trip_s: float = 0.0
    timeout_s: float = 0.0
    parts: tuple[Row, ...] = ()
    #: (row, epoch) of rows that left, to be forgotten by the workers of the route.
    released: list[tuple[int, int]] = field(default_factory=list)

    @property
    def workers(self) -> tuple[str, ...]:
        """Queues of the workers that may hold its rows."""
        return self.route or tuple(self.takers)

    def begin_step(self, now_s: float) -> None:
        """The next step, which nobody has taken yet."""
        self.step += 1
        self.sent_at_s = now_s
        self.passed = 0
        self.takers.clear()

    def end_step(self, now_s: float) -> None:
        """A trip has ended. The first one had all its workers to find, and mostly a prompt of each row to compute."""
        if self.step > 0 and not self.alone:  # the time of a suspect begins anew at each stage
            took_s = max(now_s - self.sent_at_s, 0.0)
            self.trip_s += (took_s - self.trip_s) * (LATEST if self.trip_s else 1.0)

    def take(self, step: StepTaken, now_s: float) -> None:
        """A worker has `step`, the one under way, in its hands, or is through with it: its time begins anew."""
        self.sent_at_s = now_s
        if step.passed:
            self.passed += 1
            self.takers = [taker for taker in self.takers if taker != step.worker]
        elif not self.route or (self.alone and step.worker in self.route):
            self.takers.append(step.worker)

    def is_hit_by(self, worker: str) -> bool:
        """Whether the loss of that worker ends its trip.

        What becomes of a suspect must be heard: only the worker that has it ends its trip. That another is gone shows
        when the step comes there, on this trip or the next.
        """
        if self.alone and self.route:
            return worker in self.route[self.passed : self.passed + 1]
        return worker in self.workers

    def held_at(self, worker: str) -> int:
        """At which stage this worker has the step in its hands, about; -1 where that is not known."""
        holding = self.takers if self.alone else self.takers[-1:]
        return len(self.takers) - 1 if worker in holding else -1

    def beside(self, number: int) -> Microbatch:
        """One without rows that takes the same way and ends as early."""
        return Microbatch(number=number, rows=[], route=self.route, step=self.step, trip_s=self.trip_s)

    def hand(self, count: int, other: Microbatch) -> None:
        """Its first so many rows go on with the other's next step; none of them is in a step under way.

        The first are those that have been here longest: the last may just have come in the same way, and wait.
        """
        other.rows += self.rows[:count]
        del self.rows[:count]

    def next_step(self, plan: str, owner: str) -> Step:
        """The step under way, as stage 0 gets it."""
        rows = {row.number: row for row in self.rows}
        return Step(
            plan=plan,
            owner=owner,
            microbatch=self.number,
            number=self.step,
            stage=0,
            route=self.route,
            rows=self.parts,
            release=tuple(self.released),
            alone=self.alone,
            ttl_s=self.timeout_s,
            tokens=tuple(token for p in self.parts for token in rows[p.row].tokens(p.start, p.start + p.count)),
        )

    def leave(self, row: LiveRow) -> None:
        """The row goes; its workers are told with the next step."""
        self.rows.remove(row)
        self.released.append((row.number, row.epoch))

    def blame(self, row: LiveRow, miss: Miss) -> None:
        """Note a failure that may be the row's own doing.

        A worker that died on a route may have died of any row of any microbatch there: the first such death counts
        as one failure, the second sends the row on alone. One row at a time travels alone, and the worker says when it
        computes that row and nothing else: a death then counts in full for it, any other death not at all.
        """
        if miss.reason not in BLAMED:
            return
        if miss.reason is MissReason.LOST and self.alone:
            row.failures += miss.stage >= 0 and bool(self.takers)
        elif miss.reason is MissReason.LOST and miss.stage < 0:
            row.failures = max(row.failures, min(row.failures + 1, MAX_FAILURES - 1))
        else:
            row.failures += 1


class GivenUp:
    """Microbatches that were given up and may come home all the same, the latest ones: to have their rows forgotten."""

    def __init__(self) -> None:
        #: (row, epoch) pairs by the microbatch's number.
        self._rows: OrderedDict[int, tuple[tuple[int, int], ...]] = OrderedDict()

    def remember(self, microbatch: Microbatch) -> None:
        """With the rows that it has still."""
        left = tuple((row.number, row.epoch) for row in microbatch.rows)
        self._rows[microbatch.number] = (*microbatch.released, *left)
        if len(self._rows) > MOST_GIVEN_UP:
            self._rows.popitem(last=False)

    def rows(self, microbatch: int) -> tuple[tuple[int, int], ...]:
        """(row, epoch) pairs that its workers may hold; none where it is not remembered."""
        return self._rows.get(microbatch, ())


@dataclass(frozen=True, slots=True)
class Send:
    """Publish the step: to the worker `queue`, or to the stage's shared queue where it is None."""

    queue: str | None
    step: Step


@dataclass(frozen=True, slots=True)
class Forget:
    """Tell the worker behind `queue`."""

    queue: str
    release: Release


@dataclass(frozen=True, slots=True)
class Ended:
    """The row has its result; `text` is given where a stop string cut it."""

    row: LiveRow
    reason: FinishReason
    text: str | None = None
    error_code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Replayed:
    """The row goes back to waiting (for logs and counts; where it is not `ready`, its blame is to be kept now)."""

    row: LiveRow
    reason: MissReason
    detail: str
    #: Positions whose computing is lost, those of the step under way included.
    lost_tokens: int


Decision = Send | Forget | Ended | Replayed

#: Given a row's output and its stop strings: the text before the first of them, or None.
StopFinder = Callable[[Sequence[int], Sequence[str]], str | None]
