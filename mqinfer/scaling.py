"""Which stage should have a consumer more, or less: advice from what was seen over a window, and when to act on it.

Pure policy: standard library only, no clock, no I/O. What a pipeline of other consumers would do is forecast.py's; who
acts, and how, is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import ceil
from statistics import fmean

from mqinfer.batching import busy_target
from mqinfer.forecast import Load, Speed, fit, tokens_per_s

#: What one more consumer must bring to be worth a machine.
LEAST_GAIN = 0.10
#: What may be lost by taking one away: far less than LEAST_GAIN, so that what is added is not taken away again.
MOST_LOSS = 0.02
#: A coordinator that computes so much of the time has no more to give.
FULL_COORDINATOR = 0.85
#: Below that share of its time at work the busiest consumer is not what trips wait for.
HARDLY_BUSY = 0.7
#: Where none is busy, that share of a trip outside of all of them is what binds.
MOSTLY_ELSEWHERE = 0.4
#: The stages whose consumers are busiest are looked at, and no more: the others bind nothing.
LOOKED_AT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """What one consumer did in the window; each but `seconds` is the difference of a counter of its reports."""

    #: Of its own clock.
    seconds: float
    busy_s: float = 0.0
    forwards: float = 0.0
    steps: float = 0.0
    rows: float = 0.0
    tokens: float = 0.0
    #: Sum of the squares of the forwards' positions; and of positions times seconds.
    tokens_squared: float = 0.0
    token_busy_s: float = 0.0

    @property
    def busy(self) -> float:
        """Share of the time that it computes."""
        return min(self.busy_s / max(self.seconds, 1e-6), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeen:
    """One stage over the window."""

    #: That answered at its end.
    consumers: int
    #: Those that answered at both of its ends.
    worked: tuple[Worked, ...] = ()
    #: First trips that wait in the stage's queue.
    ready: float = 0.0
    #: Steps in consumers' hands that wait for their forward.
    unacknowledged: float = 0.0

    def rate(self, name: str) -> float:
        """What its consumers did per second; those not seen at both ends count as the others do."""
        if not self.worked:
            return 0.0
        each = fmean(getattr(one, name) / max(one.seconds, 1e-6) for one in self.worked)
        return each * max(self.consumers, len(self.worked))

    @property
    def busy(self) -> float:
        """Share of the time that a consumer computes, the mean of all."""
        return fmean(one.busy for one in self.worked) if self.worked else 0.0

    @property
    def busiest(self) -> float:
        """The same of the one that computes most."""
        return max((one.busy for one in self.worked), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What was seen of a pipeline over some seconds."""

    stages: tuple[StageSeen, ...]
    coordinators: int
    #: Requests that no coordinator holds.
    requests: float = 0.0
    #: Requests that coordinators hold, and those of them that are in no microbatch.
    rows: float = 0.0
    waiting: float = 0.0
    microbatches: float = 0.0
    #: Rows that a coordinator puts into one microbatch at most; 0: not known.
    microbatch_rows: float = 0.0
    #: Share of its time that the busiest coordinator computes.
    coordinator_busy: float = 0.0
    #: Why the broker takes nothing; "": it does.
    blocked: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many consumers a stage may have."""

    least: int = 1
    most: int = 1_000_000


class Change(StrEnum):
    """What to do."""

    UP = "up"
    DOWN = "down"
    NONE = "none"


class Why(StrEnum):
    """What the advice rests on."""

    UNSERVED = "unserved"
    BELOW_LEAST = "below-least"
    BOUND = "bound"
    SPARE = "spare"
    BALANCED = "balanced"
    AT_MOST = "at-most"
    IDLE = "idle"
    LITTLE_WORK = "little-work"
    COORDINATOR = "coordinator"
    ELSEWHERE = "elsewhere"
    BLOCKED = "blocked"
    NO_COORDINATOR = "no-coordinator"
    UNSEEN = "unseen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What one window says."""

    change: Change
    why: Why
    #: That is to change; without a change the one that binds; None where none does.
    stage: int | None = None
    #: Of the throughput, by the change; without one, by the best that there is. -0.01: one hundredth is lost.
    gain: float = 0.0
    #: Rows that came round per second.
    rows_per_s: float = 0.0
    #: Of each stage: see StageSeen.busy.
    busy: tuple[float, ...] = ()
    #: What one more consumer brings, by stage, where that was forecast.
    gains: Mapping[int, float] = field(default_factory=dict)


def advise(window: Window, limits: Mapping[int, Limits] | None = None) -> Advice:
    """What one window says; `limits` by stage, where they are not the default. Takes a tenth of a second or so."""
    bounds = [(limits or {}).get(stage, Limits()) for stage in range(len(window.stages))]
    if plain := _without_forecast(window, bounds):
        return plain
    model = _model(window)
    if model is None:
        return _advice(window, Why.UNSEEN)
    gains = {stage: model.gain_of_one_more(stage) for stage in _busiest(window)}
    free = [stage for stage in gains if window.stages[stage].consumers < bounds[stage].most]
    best = max(free, key=gains.__getitem__, default=None)
    if best is not None and gains[best] >= LEAST_GAIN:
        return _advice(window, Why.BOUND, gains, Change.UP, best, gains[best])
    rest = {
        stage: model.gain_of_one_less(stage)
        for stage, seen in enumerate(window.stages)
        if seen.consumers > max(bounds[stage].least, 1)
    }
    spare = max(rest, key=rest.__getitem__, default=None)
    if spare is not None and rest[spare] >= -MOST_LOSS:
        return _advice(window, Why.SPARE, gains, Change.DOWN, spare, rest[spare])
    why = _reason(window, model, gains)
    full = max(gains, key=gains.__getitem__) if why is Why.AT_MOST else None
    return _advice(window, why, gains, stage=full)


def _without_forecast(window: Window, bounds: Sequence[Limits]) -> Advice | None:
    """What is plain to see."""
    if window.blocked:
        return _advice(window, Why.BLOCKED)
    for stage, (seen, limits) in enumerate(zip(window.stages, bounds, strict=True)):
        wanted = limits.least or bool(window.rows or window.requests)
        if seen.consumers < min(wanted, limits.most):
            why = Why.BELOW_LEAST if seen.consumers else Why.UNSERVED
            return _advice(window, why, {}, Change.UP, stage)
    if not window.coordinators:
        return _advice(window, Why.NO_COORDINATOR)
    if not window.rows and not window.requests:
        return _advice(window, Why.IDLE)
    return _advice(window, Why.COORDINATOR) if window.coordinator_busy >= FULL_COORDINATOR else None


def _busiest(window: Window) -> list[int]:
    stages = range(len(window.stages))
    return sorted(stages, key=lambda stage: window.stages[stage].busiest, reverse=True)[:LOOKED_AT]


def _advice(
    window: Window,
    why: Why,
    gains: Mapping[int, float] | None = None,
    change: Change = Change.NONE,
    stage: int | None = None,
    gain: float = 0.0,
) -> Advice:
    """Without a change and a stage it names the busiest one."""
    busy = tuple(seen.busy for seen in window.stages)
    if change is Change.NONE:
        gain = max((gains or {}).values(), default=0.0)
        if stage is None and any(busy):
            stage = _busiest(window)[0]
    rows_per_s = window.stages[-1].rate("rows") if window.stages else 0.0
    return Advice(
        change=change, why=why, stage=stage, gain=gain, rows_per_s=rows_per_s, busy=busy, gains=dict(gains or {})
    )


def _reason(window: Window, model: _Model, gains: Mapping[int, float]) -> Why:
    """Why nothing helps."""
    if max(gains.values()) >= LEAST_GAIN:
        return Why.AT_MOST
    if model.elsewhere >= MOSTLY_ELSEWHERE:
        return Why.ELSEWHERE
    return Why.LITTLE_WORK if max(seen.busiest for seen in window.stages) < HARDLY_BUSY else Why.BALANCED


@dataclass(frozen=True, slots=True)
class _Model:
    """What a window's pipeline is made of, in the forecast's words."""

    window: Window
    stages: tuple[tuple[Speed, ...], ...]
    load: Load
    #: Positions per second that it has by the forecast.
    now: float
    #: Part of a trip that no consumer has to do with.
    elsewhere: float = 0.0

    def gain(self, stage: int, speeds: Sequence[Speed]) -> float:
        """Of the throughput, if the stage had these consumers."""
        other = (*self.stages[:stage], tuple(speeds), *self.stages[stage + 1 :])
        return tokens_per_s(other, self._load(other)) / self.now - 1

    def _load(self, stages: Sequence[Sequence[Speed]]) -> Load:
        """The same positions in as many microbatches as there would be."""
        before, after = (_target(self.window, each) for each in (self.stages, stages))
        count = max(self.load.microbatches + after - before, 1)
        return replace(self.load, microbatches=count, tokens=self.load.tokens * self.load.microbatches / count)

    def gain_of_one_more(self, stage: int) -> float:
        """By a consumer like the mean of those that are there."""
        return self.gain(stage, (*self.stages[stage], _mean(self.stages[stage])))

    def gain_of_one_less(self, stage: int) -> float:
        """Without the quickest, whichever goes in the end."""
        return self.gain(stage, sorted(self.stages[stage], key=lambda one: one.seconds(self.load.tokens))[1:])


def _target(window: Window, stages: Sequence[Sequence[Speed]]) -> int:
    """How many microbatches the coordinators make for these consumers, all together."""
    rows, coordinators = max(window.rows - window.waiting, 1.0), max(window.coordinators, 1)
    full = ceil(rows / coordinators / window.microbatch_rows) if window.microbatch_rows else 1
    busy = busy_target([len(stage) for stage in stages])
    return max(min(coordinators * max(busy, full), int(rows)), 1)


def _model(window: Window) -> _Model | None:
    """None where some stage computed nothing, so that nobody knows how long it takes."""
    stages = tuple(_speeds(stage) for stage in window.stages)
    steps_per_s = fmean(stage.rate("steps") for stage in window.stages)
    if not all(stages) or steps_per_s <= 0:
        return None
    tokens = fmean(stage.rate("tokens") for stage in window.stages) / steps_per_s
    load = Load(max(round(window.microbatches), 1), tokens)
    now = tokens_per_s(stages, load)
    model = _Model(window, stages, load, now)
    if max(seen.busiest for seen in window.stages) >= HARDLY_BUSY:
        return model
    trip_s = load.microbatches / steps_per_s
    beyond_s = max(trip_s - load.microbatches * tokens / now, 0.0)
    load = replace(load, hop_s=load.hop_s + beyond_s / (len(stages) + 1))
    return replace(model, load=load, now=tokens_per_s(stages, load), elsewhere=beyond_s / trip_s)


def _speeds(stage: StageSeen) -> tuple[Speed, ...]:
    """Of its consumers; those that have not been seen at work count as the mean of the others."""
    found = [
        fit(
            forwards=one.forwards,
            tokens=one.tokens,
            busy_s=one.busy_s,
            tokens_squared=one.tokens_squared,
            token_busy_s=one.token_busy_s,
        )
        for one in stage.worked
    ]
    known = [speed for speed in found if speed is not None]
    return (*known, *[_mean(known)] * (stage.consumers - len(known))) if known else ()


def _mean(speeds: Sequence[Speed]) -> Speed:
    return Speed(fmean(one.fixed_s for one in speeds), fmean(one.token_s for one in speeds))


class Hysteresis:
    """Lets an advice through when it is time to act on it: once it has lasted, and not soon after another."""

    def __init__(self, *, confirm: int = 3, cooldown_s: float = 60.0) -> None:
        """`confirm`: windows in a row that must say the same."""
        self._confirm = confirm
        self._cooldown_s = cooldown_s
        self._said: list[tuple[Change, int | None]] = []
        self._held_until_s: dict[int, float] = {}

    def lasting(self, advice: Advice, now_s: float) -> bool:
        """Whether to act on the advice now, of any clock that goes forward; then this counts as done."""
        said = (advice.change, advice.stage)
        held = now_s < self._held_until_s.get(-1 if advice.stage is None else advice.stage, float("-inf"))
        if advice.change is Change.NONE or advice.stage is None or held:
            self._said.clear()
            return False
        self._said = [*self._said, said] if self._said[-1:] == [said] else [said]
        if len(self._said) < self._confirm:
            return False
        self.changed(advice.stage, now_s)
        return True

    def changed(self, stage: int, now_s: float) -> None:
        """The stage has other consumers now: it is left alone for a cool-down."""
        self.hold(stage, now_s + self._cooldown_s)

    def hold(self, stage: int, until_s: float) -> None:
        """Leave the stage alone until then; what was said before counts no more."""
        self._said.clear()
        self._held_until_s[stage] = until_s
