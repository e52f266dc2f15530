"""A pipeline in miniature: a closed queueing network of stages with unlike consumers, played event by event.

Microbatches go round and round, each pinned to the consumer that took it on its first trip, as in the real thing; a
consumer computes all that waits for it in one forward. What a survey would see of it is looked at from outside
(`Look`). Nothing of mqinfer's own forecasts is used here: this is what they are held against.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mqinfer.batching import busy_target
from mqinfer.pacing import LEAST_TOKENS

#: Of one microbatch at most.
MICROBATCH_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """What a forward takes: fixed_s + token_s x positions, give or take."""

    fixed_s: float
    token_s: float
    #: Standard deviation of the seconds, as a share of them.
    noise: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Park:
    """A pipeline to be played."""

    stages: tuple[tuple[Consumer, ...], ...]
    #: In flight.
    rows: int
    #: From one actor to the next.
    hop_s: float = 0.002
    #: The one coordinator's work for a microbatch's step.
    coordinator_s: float = 0.001
    prompt_tokens: int = 100
    output_tokens: int = 100
    merge_tokens: int = 1024
    #: That a microbatch makes before its rows have ended and others, on a new route, take its place: between these.
    trips: tuple[int, int] = (20, 80)

    @property
    def microbatches(self) -> int:
        """As the coordinator makes them."""
        full = -(-self.rows // MICROBATCH_ROWS)
        return min(max(busy_target([len(stage) for stage in self.stages]), full), self.rows)


@dataclass(slots=True, eq=False)
class _Microbatch:
    rows: int
    route: list[_Server | None]
    trips: int
    #: Positions of prompts that are still to be computed.
    to_prefill: int = 0
    #: Of the step under way.
    positions: int = 0


@dataclass(slots=True, eq=False)
class _Server:
    """A consumer at work, with the counters of its reports."""

    stage: int
    consumer: Consumer
    own: deque[_Microbatch] = field(default_factory=deque)
    #: A first trip that the broker has handed to it already.
    held: _Microbatch | None = None
    batch: list[_Microbatch] = field(default_factory=list)
    forwards: int = 0
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    tokens_squared: int = 0
    busy_s: float = 0.0
    token_busy_s: float = 0.0
    seconds: float = 0.0


class Play:
    """One run of a park."""

    def __init__(self, park: Park, seed: int) -> None:
        self.park = park
        self.now_s = 0.0
        self.trips = self.row_trips = 0
        self.servers = [[_Server(k, consumer) for consumer in stage] for k, stage in enumerate(park.stages)]
        self.shared: list[deque[_Microbatch]] = [deque() for _ in park.stages]
        self._turns = [deque(servers) for servers in self.servers]
        self.coordinator_busy_s = 0.0
        self._random = random.Random(seed)
        self._free_s = 0.0
        self._events: list[tuple[float, int, _Server | None, _Microbatch | None, int]] = []
        self._number = 0
        count = park.microbatches
        each, more = divmod(park.rows, count) if count else (0, 0)
        for number in range(count):
            self._begin(_Microbatch(each + (number < more), [], 0))

    def run(self, seconds: float) -> None:
        """Go on for so long."""
        end_s, events = self.now_s + seconds, self._events
        while events and events[0][0] <= end_s:
            self._next()
        self.now_s = end_s

    def _next(self) -> None:
        self.now_s, _, server, microbatch, stage = heapq.heappop(self._events)
        if server is not None:
            self._finish(server)
        elif microbatch is not None:
            self._arrive(microbatch, stage)

    def run_trips(self, trips: int) -> None:
        """Go on until so many microbatches more have come round."""
        end = self.trips + trips
        while self.trips < end:
            self._next()

    def _later(self, delay_s: float, server: _Server | None, microbatch: _Microbatch | None, stage: int) -> None:
        self._number += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._number, server, microbatch, stage))

    def _begin(self, microbatch: _Microbatch) -> None:
        microbatch.route = [None] * len(self.park.stages)
        microbatch.trips = self._random.randint(*self.park.trips)
        self._send(microbatch)

    def _send(self, microbatch: _Microbatch) -> None:
        park = self.park
        self._free_s = max(self._free_s, self.now_s) + park.coordinator_s
        self.coordinator_busy_s += park.coordinator_s
        joining = int(microbatch.rows / park.output_tokens + self._random.random())
        microbatch.to_prefill += joining * park.prompt_tokens
        prefilled = min(microbatch.to_prefill, max(microbatch.rows, LEAST_TOKENS))
        microbatch.to_prefill -= prefilled
        microbatch.positions = microbatch.rows + prefilled
        self._later(self._free_s - self.now_s + park.hop_s, None, microbatch, 0)

    def _arrive(self, microbatch: _Microbatch, stage: int) -> None:
        if stage == len(self.servers):
            self._come_round(microbatch)
            return
        server = microbatch.route[stage]
        if server is not None:
            server.own.append(microbatch)
            if not server.batch:
                self._start(server)
            return
        self.shared[stage].append(microbatch)
        for _ in self.servers[stage]:  # the broker hands first trips to its consumers in turn
            server = self._turns[stage][0]
            self._turns[stage].rotate(-1)
            if server.held is None:
                self._take(server)
                return

    def _come_round(self, microbatch: _Microbatch) -> None:
        self.trips += 1
        self.row_trips += microbatch.rows
        microbatch.trips -= 1
        if microbatch.trips > 0:
            self._send(microbatch)
        else:
            self._begin(microbatch)

    def _take(self, server: _Server) -> None:
        """The broker hands it the first trip that waits longest."""
        if server.held is None and self.shared[server.stage]:
            server.held = self.shared[server.stage].popleft()
            server.held.route[server.stage] = server
            if not server.batch:
                self._start(server)

    def _start(self, server: _Server) -> None:
        tokens, batch = 0, server.batch
        while server.own and tokens < self.park.merge_tokens:
            batch.append(server.own.popleft())
            tokens += batch[-1].positions
        if server.held is not None and tokens < self.park.merge_tokens:
            batch.append(server.held)
            tokens += server.held.positions
            server.held = None
        if not batch:
            return
        consumer = server.consumer
        mean_s = consumer.fixed_s + consumer.token_s * tokens
        seconds = mean_s * max(self._random.gauss(1.0, consumer.noise), 0.2)
        server.seconds = seconds
        self._later(seconds, server, None, 0)
        self._take(server)

    def _finish(self, server: _Server) -> None:
        tokens, seconds = sum(microbatch.positions for microbatch in server.batch), server.seconds
        server.forwards += 1
        server.steps += len(server.batch)
        server.rows += sum(microbatch.rows for microbatch in server.batch)
        server.tokens += tokens
        server.tokens_squared += tokens * tokens
        server.busy_s += seconds
        server.token_busy_s += tokens * seconds
        for microbatch in server.batch:
            self._later(self.park.hop_s, None, microbatch, server.stage + 1)
        server.batch.clear()
        self._start(server)


def look(play: Play) -> list[list[_Server]]:
    """The counters of every consumer as they are now."""
    return [[replace(server) for server in servers] for servers in play.servers]


def true_rate(park: Park, seed: int, trips: int = 200) -> float:
    """Rows per second in the long run; on many routes, for which of them are taken is chance."""
    play = Play(replace(park, trips=(5, 25)), seed)
    play.run_trips(20 * park.microbatches)
    began_s, before = play.now_s, play.row_trips
    play.run_trips(trips * park.microbatches)
    return (play.row_trips - before) / (play.now_s - began_s)


def with_one_more(park: Park, stage: int) -> Park:
    """The park with one more consumer, as good as the mean of those that are there."""
    there = park.stages[stage]
    newcomer = Consumer(
        fixed_s=sum(consumer.fixed_s for consumer in there) / len(there),
        token_s=sum(consumer.token_s for consumer in there) / len(there),
        noise=there[0].noise,
    )
    return _with(park, stage, (*there, newcomer))


def with_one_less(park: Park, stage: int, without: int) -> Park:
    """The park without that consumer."""
    there = park.stages[stage]
    return _with(park, stage, (*there[:without], *there[without + 1 :]))


def _with(park: Park, stage: int, consumers: Sequence[Consumer]) -> Park:
    return replace(park, stages=(*park.stages[:stage], tuple(consumers), *park.stages[stage + 1 :]))
