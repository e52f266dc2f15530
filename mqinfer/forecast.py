"""What a pipeline of such consumers would do: it is played, event by event, for some dozens of trips.

Pure: standard library only, no clock; alike arguments make alike forecasts. What is measured, and what is made of a
forecast, is not known here.

Why it is not a formula: a consumer takes all that waits for it into one forward, microbatches keep to the consumers of
their first trip, and there are about as few of them as consumers. Mean value analysis with such servers was tried:
where each stage has one consumer, it promised 10 to 20% for what brought nothing.

A worker takes no more into a forward than is worth it (`Speed.worth_tokens`), which is not played yet: where a forward
has hardly a fixed part, what one more consumer brings is told too low (+71% where it is +91%).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

#: From one actor to the next: an idle broker takes 0.6 ms for 1 KiB, 3 ms for 1 MiB.
HOP_S = 0.002
#: Standard deviation of what a forward takes, as a share of it: rows come and go, others use the machine.
NOISE = 0.2
#: Trips of each microbatch that are counted, after some that are not.
TRIPS, FIRST_TRIPS = 60, 10
#: Trips on one route: fewer than in a real pipeline, so that a few dozen trips see many routes.
ROUTE_TRIPS = 10
#: Microbatches that share a forward arrive at the next stage together, which has had nothing to do until then. That is
#: worth it while what is saved, fixed_s each time, is a ninth of the forward or more. Where 8 microbatches went over
#: stages of 2, 2, 4 (two consumers) and 2 ms a position and nothing beside, sharing made 68% of the 500 positions/s
#: that bound them, and not sharing 79 to 93% (a virtual clock: tests/simulation/test_elasticity.py).
WORTH = 8.0
#: The weight of "half of it is fixed" in `fit`, for forwards that vary by a fifth (0.2²) where any slope between
#: nothing and all is about as likely (0.35²).
PRIOR = 0.2**2 / 0.35**2


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a consumer: a forward over so many positions takes fixed_s + token_s x positions."""

    fixed_s: float
    token_s: float

    def seconds(self, tokens: float) -> float:
        """Of a forward."""
        return self.fixed_s + self.token_s * tokens

    @property
    def worth_tokens(self) -> float:
        """Positions of a forward from which on another microbatch in it is worth nothing any more."""
        return max(WORTH * self.fixed_s / self.token_s, 1.0) if self.token_s else inf


@dataclass(frozen=True, slots=True)
class Load:
    """What circulates."""

    microbatches: int
    #: Positions of one microbatch's step.
    tokens: float
    #: From one actor to the next, the coordinator included.
    hop_s: float = HOP_S
    #: Positions of a forward from which on nothing more is taken into it.
    merge_tokens: float = 1024.0


Stages = Sequence[Sequence[Speed]]


def fit(*, forwards: float, tokens: float, busy_s: float, tokens_squared: float, token_busy_s: float) -> Speed | None:
    """The line through a consumer's forwards, from their sums; None where there were none.

    Least squares, pulled a little towards "half of it is fixed": where forwards are all alike, they can't tell.
    """
    if forwards < 1 or tokens <= 0 or busy_s <= 0:
        return None
    mean_tokens, mean_s = tokens / forwards, busy_s / forwards
    most = mean_s / mean_tokens
    pull = PRIOR * mean_tokens**2
    spread = max(tokens_squared - tokens * mean_tokens, 0.0)
    token_s = (token_busy_s - busy_s * mean_tokens + pull * most / 2) / (spread + pull)
    token_s = min(max(token_s, 0.0), most)
    return Speed(mean_s - token_s * mean_tokens, token_s)


def tokens_per_s(stages: Stages, load: Load) -> float:
    """Positions that come round per second; 0 where a stage has no consumer."""
    if load.microbatches < 1 or not all(stages):
        return 0.0
    play = _Play(stages, load)
    began_s = play.until(FIRST_TRIPS * load.microbatches)
    ended_s = play.until((FIRST_TRIPS + TRIPS) * load.microbatches)
    return TRIPS * load.microbatches * load.tokens / max(ended_s - began_s, 1e-9)


@dataclass(slots=True, eq=False)
class _Consumer:
    stage: int
    speed: Speed
    #: Microbatches of its own that wait for the next forward; a first trip that it has taken; those in the forward.
    own: deque[_Microbatch] = field(default_factory=deque)
    taken: _Microbatch | None = None
    under_way: list[_Microbatch] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Microbatch:
    #: Who serves it at each stage, as far as it has come.
    route: list[_Consumer] = field(default_factory=list)
    trips: int = 0


class _Play:
    """A closed network of queues, and its clock."""

    def __init__(self, stages: Stages, load: Load) -> None:
        self._load = load
        self._random = random.Random(1)
        self._events: list[tuple[float, int, int, _Consumer | _Microbatch]] = []
        self._order = 0
        self._now_s = 0.0
        self._trips = 0
        #: Of each stage: its consumers, the next in turn first; first trips that nobody has taken.
        self._turns = [deque(_Consumer(k, speed) for speed in stage) for k, stage in enumerate(stages)]
        self._shared: list[deque[_Microbatch]] = [deque() for _ in stages]
        for number in range(load.microbatches):
            self._later(number * load.hop_s, 0, _Microbatch(trips=number % ROUTE_TRIPS))

    def until(self, trips: int) -> float:
        """Go on until so many trips have ended; the clock then."""
        while self._trips < trips:
            self._now_s, _, stage, who = heappop(self._events)
            if isinstance(who, _Consumer):
                self._finish(who)
            elif stage < len(self._turns):
                self._arrive(who, stage)
            else:
                self._come_round(who)
        return self._now_s

    def _later(self, delay_s: float, stage: int, who: _Consumer | _Microbatch) -> None:
        self._order += 1
        heappush(self._events, (self._now_s + delay_s, self._order, stage, who))

    def _come_round(self, microbatch: _Microbatch) -> None:
        self._trips += 1
        microbatch.trips += 1
        if microbatch.trips % ROUTE_TRIPS == 0:
            microbatch.route.clear()
        self._later(self._load.hop_s, 0, microbatch)

    def _arrive(self, microbatch: _Microbatch, stage: int) -> None:
        if stage < len(microbatch.route):
            consumer = microbatch.route[stage]
            consumer.own.append(microbatch)
            self._begin(consumer)
            return
        self._shared[stage].append(microbatch)
        turns = self._turns[stage]
        for _ in range(len(turns)):  # the broker hands first trips to consumers in turn
            consumer = turns[0]
            turns.rotate(-1)
            if consumer.taken is None:
                self._take(consumer)
                return

    def _take(self, consumer: _Consumer) -> None:
        if consumer.taken is None and self._shared[consumer.stage]:
            consumer.taken = self._shared[consumer.stage].popleft()
            consumer.taken.route.append(consumer)
            self._begin(consumer)

    def _begin(self, consumer: _Consumer) -> None:
        """The next forward, over all that waits, unless one is under way."""
        forward, each, most = consumer.under_way, self._load.tokens, self._load.merge_tokens
        if forward or not (consumer.own or consumer.taken):
            return
        while consumer.own and len(forward) * each < most:
            forward.append(consumer.own.popleft())
        if consumer.taken and len(forward) * each < most:
            forward.append(consumer.taken)
            consumer.taken = None
        noise = max(self._random.gauss(1.0, NOISE), 0.2)
        self._later(noise * consumer.speed.seconds(len(forward) * each), consumer.stage, consumer)
        self._take(consumer)

    def _finish(self, consumer: _Consumer) -> None:
        for microbatch in consumer.under_way:
            self._later(self._load.hop_s, consumer.stage + 1, microbatch)
        consumer.under_way.clear()
        self._begin(consumer)
