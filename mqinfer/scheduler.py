"""The coordinator's mind: rows, microbatches, epochs. No clock, no I/O, no asyncio.

Events go in (`add`, `seen`, `taken`, `done`, `gone`, `unsent`, `overdue`), what must be done comes out as decisions,
in order. The invariant: a row is in exactly one place, either `waiting` or one microbatch; a microbatch always has
exactly one step under way, and an end of trip that is not that step's changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean

from mqinfer import batching
from mqinfer.batching import Limits, Pending
from mqinfer.messages import FinishReason, Miss, MissReason, Release, Request, Row, Sampled, StepDone, StepTaken
from mqinfer.pacing import Pace
from mqinfer.plan import Plan
from mqinfer.rows import Decision, Ended, Forget, GivenUp, LiveRow, Microbatch, Replayed, Send, StopFinder, parts_of
from mqinfer.verdicts import MAX_FAILURES, Verdict, decide, explain

#: The step timeout grows to so many times what was set, where trips take longer than that.
MOST_PATIENCE = 8


class Scheduler:
    """See the module's docstring. `owner` is the coordinator's queue."""

    def __init__(
        self, plan: Plan, owner: str, limits: Limits, find_stop: StopFinder, *, step_timeout_s: float = 0.0
    ) -> None:
        self._plan = plan
        self._stages = range(len(plan.stages))
        self._owner = owner
        self._limits = limits
        self._find_stop = find_stop
        self._step_timeout_s = step_timeout_s
        #: Doubles when steps are overdue, halves when one comes home quickly: a pipeline that is slower than the
        #: timeout would replay its rows for ever.
        self._patience = 1
        self._pace = Pace(plan.hidden_size)
        self._given_up = GivenUp()
        self._next_row = 0
        self._next_microbatch = 0
        self.rows: dict[int, LiveRow] = {}
        self.waiting: deque[LiveRow] = deque()
        self.microbatches: dict[int, Microbatch] = {}
        #: Consumers `seen` at each stage.
        self.consumers: list[int] = [0] * len(plan.stages)

    # -- facts ---------------------------------------------------------------------------------

    @property
    def workers(self) -> list[str]:
        """Queues of all workers that hold rows of ours, each once."""
        return list(dict.fromkeys(queue for microbatch in self.microbatches.values() for queue in microbatch.workers))

    def target(self) -> int:
        """How many microbatches there should be."""
        return batching.microbatch_target(self._known(), len(self.rows), self._limits, self._pace.worth_tokens())

    def _known(self) -> list[int]:
        """Workers of each stage that take first trips, or that are on routes."""
        routes = [microbatch.route for microbatch in self.microbatches.values()]
        on_routes = [len({route[stage] for route in routes if stage < len(route)}) for stage in self._stages]
        return list(map(max, self.consumers, on_routes))

    def _shared(self) -> bool:
        """Whether several workers share a stage; in a chain of single ones each waits for all others."""
        return max(self._known()) > 1

    # -- events --------------------------------------------------------------------------------

    def add(self, request: Request) -> tuple[LiveRow, list[Decision]]:
        """A leased request becomes a waiting row, or has its end already; call `form` afterwards."""
        row = LiveRow(
            number=self._next_row,
            request=request,
            output=list(request.output),
            logprobs=list(request.logprobs),
            failures=request.failures,
            kept_failures=request.failures,
            alone=decide(MissReason.LOST, request.failures) is Verdict.REPLAY_ALONE,
        )
        self._next_row += 1
        ended = self._ending(row) if row.output else None
        if ended is not None:
            return row, [ended]
        self.rows[row.number] = row
        self.waiting.append(row)
        return row, []

    def form(self, now_s: float) -> list[Decision]:
        """Waiting rows that are `ready` become new microbatches where there should be more; suspects one at a time."""
        if not self.waiting:
            return []
        decisions: list[Decision] = []
        suspect = next((row for row in self.waiting if row.alone and row.ready), None)
        if suspect is not None and not any(microbatch.alone for microbatch in self.microbatches.values()):
            self.waiting.remove(suspect)
            decisions += self._open([suspect], now_s, alone=True)
        innocent = [row for row in self.waiting if row.ready and not row.alone]
        target = self.target()
        most = batching.fair(len(self.rows), self._limits, target)
        for size in batching.sizes(len(innocent), self._slots(target, now_s), most):
            rows, innocent = innocent[:size], innocent[size:]
            for row in rows:
                self.waiting.remove(row)
            decisions += self._open(rows, now_s)
        return decisions

    def seen(self, stage: int, consumers: int) -> None:
        """So many workers take first trips at the stage. If one has come, nobody joins the routes that there are.

        Only first trips lead to the newcomer, and the broker hands them out by turns to all that are ready for one: it
        has its share when all routes are new ones, as soon as the rows of the old ones have ended. Who took none for a
        while, because it was full, is still on routes and no newcomer.
        """
        if self.consumers[stage] and self._known()[stage] < consumers:
            for microbatch in self.microbatches.values():
                microbatch.closed |= bool(microbatch.route)
        self.consumers[stage] = consumers

    def taken(self, step: StepTaken, now_s: float) -> None:
        """A worker has the step in its hands, or is through with it: its time begins anew."""
        microbatch = self.microbatches.get(step.microbatch)
        if microbatch is not None and step.number == microbatch.step:
            microbatch.take(step, now_s)

    def done(self, end: StepDone, now_s: float) -> list[Decision]:
        """A trip has ended. A stale one (of an older step, of a microbatch that is no more) changes nothing."""
        microbatch = self.microbatches.get(end.microbatch)
        if microbatch is None:
            return self._forget_stale(end)
        if end.number != microbatch.step:
            return []
        if len(end.route) > len(microbatch.route):
            microbatch.route = end.route
        microbatch.closed |= end.closing
        microbatch.end_step(now_s)
        self._pace.note(end.slowest_tokens, end.slowest_s, end.slowest_token_s)
        if now_s - microbatch.sent_at_s < self._step_timeout_s / 2:
            self._patience = max(self._patience // 2, 1)
        missed = {miss.row: miss for miss in end.misses}
        drawn = {sampled.row: sampled for sampled in end.sampled}
        decisions: list[Decision] = []
        for part in microbatch.parts:
            row = self.rows[part.row]
            if part.row in missed:
                decisions += self._give_up(microbatch, row, missed[part.row])
            else:
                decisions += self._advance(microbatch, row, part, drawn.get(part.row))
        return decisions + self._go_on(microbatch, now_s) + self.form(now_s)

    def gone(self, queue: str, now_s: float) -> list[Decision]:
        """The worker behind `queue` no longer exists: what it may have held is replayed.

        Which of them it was computing is not known (see `Microbatch.blame`), but for a first trip that it was the last
        to take: there the broker's redelivery would show the same, once a peer takes it.
        """
        decisions: list[Decision] = []
        for microbatch in [m for m in self.microbatches.values() if m.is_hit_by(queue)]:
            held_at = microbatch.held_at(queue)
            decisions += self._abandon(microbatch, MissReason.LOST, "the worker is gone", without=queue, stage=held_at)
        return decisions + self.form(now_s)

    def unsent(self, microbatch: int, queue: str, now_s: float) -> list[Decision]:
        """The step of `microbatch` could not be sent, since `queue` no longer exists: nobody is to blame."""
        found = self.microbatches.get(microbatch)
        if found is None:
            return []
        return self._abandon(found, MissReason.GONE, "the worker is gone", without=queue) + self.form(now_s)

    def overdue(self, now_s: float) -> list[Decision]:
        """Steps that have not come back within the step timeout are given up; their late ends are stale."""
        late = [m for m in self.microbatches.values() if now_s - m.sent_at_s > m.timeout_s]
        if late:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        elif not self.microbatches:
            self._patience = 1
        decisions = [each for m in late for each in self._abandon(m, MissReason.CACHE, "no answer in time")]
        return decisions + (self.form(now_s) if decisions else [])

    def abandon_all(self) -> list[Forget]:
        """What the workers may forget when this coordinator leaves; its rows stay as they are."""
        releases = []
        for microbatch in self.microbatches.values():
            microbatch.released += [(row.number, row.epoch) for row in microbatch.rows]
            releases += self._releases(microbatch)
        return releases

    # -- rows ----------------------------------------------------------------------------------

    def _advance(self, microbatch: Microbatch, row: LiveRow, part: Row, drawn: Sampled | None) -> list[Decision]:
        row.cached = part.start + part.count
        if part.sampling is None:
            return []
        if drawn is None or not 0 <= drawn.token < self._plan.vocab_size:
            detail = "no token came" if drawn is None else "no such token"
            miss = Miss(row=row.number, epoch=row.epoch, stage=-1, reason=MissReason.COMPUTE, detail=detail)
            return self._give_up(microbatch, row, miss)
        row.output.append(drawn.token)
        if drawn.logprob is not None:
            row.logprobs.append(drawn.logprob)
        row.failures = 0
        microbatch.alone = False
        ended = self._ending(row)
        if ended is None:
            return []
        microbatch.leave(row)
        del self.rows[row.number]
        return [ended]

    def _ending(self, row: LiveRow) -> Ended | None:
        request = row.request
        if not request.ignore_eos and row.output[-1] in self._plan.eos_tokens:
            return Ended(row, FinishReason.STOP)
        if request.stop and (text := self._find_stop(row.output, request.stop)) is not None:
            return Ended(row, FinishReason.STOP, text=text)
        if len(row.output) >= request.max_tokens or row.known >= self._plan.context_tokens:
            return Ended(row, FinishReason.LENGTH)
        return None

    def _give_up(self, microbatch: Microbatch, row: LiveRow, miss: Miss) -> list[Decision]:
        microbatch.leave(row)
        if miss.reason in (MissReason.ROOM, MissReason.GONE):
            microbatch.closed = True
        microbatch.blame(row, miss)
        verdict = decide(miss.reason, row.failures)
        if verdict is Verdict.FAIL:
            del self.rows[row.number]
            code = "memory" if miss.reason in (MissReason.NEVER, MissReason.MEMORY) else "compute"
            return [Ended(row, FinishReason.ERROR, error_code=code, error=explain(miss.reason, miss.detail))]
        under_way = sum(part.count for part in microbatch.parts if part.row == row.number)
        replayed = Replayed(row, miss.reason, miss.detail, row.cached + under_way)
        row.epoch += 1
        row.cached = 0
        row.alone = row.failures >= MAX_FAILURES - 1
        row.fresh = verdict is not Verdict.REPLAY
        self.waiting.appendleft(row)
        return [replayed]

    # -- microbatches --------------------------------------------------------------------------

    def _slots(self, target: int, now_s: float) -> int:
        """How many microbatches may be formed now: few at a time while routes are drawn anew (docs/decisions/0010)."""
        live = [microbatch for microbatch in self.microbatches.values() if self._is_open(microbatch)]
        first = sum(1 for m in live if not m.route and now_s - m.sent_at_s < batching.LONG_FIRST_TRIP_S)
        slots = target - len(live)
        if slots < 1 and not first:  # one at a time, to see who takes it
            slots = min(slots + batching.extra_microbatches([m.route for m in live], self.consumers, target), 1)
        ending = len(self.rows) - len(self.waiting) - sum(len(microbatch.rows) for microbatch in live)
        if ending < batching.MANY_ENDING * len(self.rows) or not self._shared():
            return slots
        return min(slots, batching.first_trips(target) - first)

    def _open(self, rows: list[LiveRow], now_s: float, *, alone: bool = False) -> list[Decision]:
        microbatch = Microbatch(number=self._next_microbatch, rows=rows, alone=alone)
        self._next_microbatch += 1
        self.microbatches[microbatch.number] = microbatch
        for row in rows:
            row.fresh = False
        return [self._send(microbatch, now_s)]

    def _go_on(self, microbatch: Microbatch, now_s: float) -> list[Decision]:
        if len(microbatch.route) < len(self._plan.stages):  # it never came through
            return self._abandon(microbatch, MissReason.CACHE, "it did not reach the last stage")
        self._join(microbatch)
        if not microbatch.rows:
            return self._close(microbatch)
        new = self._even_out(microbatch)
        return [self._send(each, now_s) for each in (microbatch, *new)]

    def _even_out(self, microbatch: Microbatch) -> list[Microbatch]:
        """In a chain of single workers: give rows to smaller microbatches, which go on with them; returns new ones.

        Or a stage would wait for another's large forward. Where rows wait, those that join even it out.
        """
        if self.waiting or self._shared() or not self._is_open(microbatch):
            return []
        peers = [m for m in self.microbatches.values() if m is not microbatch and self._is_open(m)]
        target = self.target()
        if len(peers) >= target or any(peer.route != microbatch.route for peer in peers):
            return []
        missing = min(target - len(self.microbatches), len(microbatch.rows) - 1)
        new = [microbatch.beside(self._next_microbatch + at) for at in range(missing)]
        self._next_microbatch += len(new)
        self.microbatches |= {each.number: each for each in new}
        peers += new
        for peer, count in zip(peers, batching.handed(len(microbatch.rows), [len(m.rows) for m in peers]), strict=True):
            microbatch.hand(count, peer)
        return new

    def _join(self, microbatch: Microbatch) -> None:
        if not self.waiting or not self._is_open(microbatch):
            return
        most = batching.fair(len(self.rows), self._limits, self.target(), self._speed(microbatch))
        joining = [row for row in self.waiting if row.ready and not (row.fresh or row.alone)]
        for row in joining[: max(most - len(microbatch.rows), 0)]:
            self.waiting.remove(row)
            microbatch.rows.append(row)

    def _speed(self, microbatch: Microbatch) -> float:
        """Of its trips, beside the mean of all."""
        if not microbatch.trip_s or not self._shared():
            return 1.0
        trips_s = [each.trip_s for each in self.microbatches.values() if each.trip_s and self._is_open(each)]
        return 1 / microbatch.trip_s / fmean(1 / trip_s for trip_s in trips_s)

    def _is_open(self, microbatch: Microbatch) -> bool:
        return not (microbatch.alone or microbatch.closed or microbatch.step >= self._limits.open_trips)

    def _send(self, microbatch: Microbatch, now_s: float) -> Send:
        microbatch.begin_step(now_s)
        microbatch.timeout_s = self._step_timeout_s * self._patience
        microbatch.parts = self._parts(microbatch.rows)
        step = microbatch.next_step(self._plan.digest, self._owner)
        microbatch.released.clear()
        return Send(microbatch.route[0] if microbatch.route else None, step)

    def _parts(self, rows: Sequence[LiveRow]) -> tuple[Row, ...]:
        pending = [Pending(row.cached, row.known) for row in rows]
        counts = batching.counts(pending, self._pace.step_tokens(pending, self._limits.step_tokens))
        return parts_of(rows, counts, self._plan.context_tokens)

    def _abandon(
        self, microbatch: Microbatch, reason: MissReason, detail: str, *, without: str = "", stage: int = -1
    ) -> list[Decision]:
        self._given_up.remember(microbatch)
        decisions: list[Decision] = []
        for row in list(microbatch.rows):
            miss = Miss(row=row.number, epoch=row.epoch, stage=stage, reason=reason, detail=detail)
            decisions += self._give_up(microbatch, row, miss)
        return decisions + self._close(microbatch, without=without)

    def _forget_stale(self, end: StepDone) -> list[Decision]:
        """What a trip left behind that was given up and came through all the same."""
        rows = self._given_up.rows(end.microbatch)
        release = Release(plan=self._plan.digest, owner=self._owner, rows=rows)
        return [Forget(queue, release) for queue in dict.fromkeys(end.route)] if rows else []

    def _close(self, microbatch: Microbatch, *, without: str = "") -> list[Decision]:
        del self.microbatches[microbatch.number]
        return [forget for forget in self._releases(microbatch) if forget.queue != without]

    def _releases(self, microbatch: Microbatch) -> list[Forget]:
        if not microbatch.released:
            return []
        release = Release(plan=self._plan.digest, owner=self._owner, rows=tuple(microbatch.released))
        return [Forget(queue, release) for queue in dict.fromkeys(microbatch.workers)]
