"""How long parts of a model take on this machine, measured as a worker computes them. Synchronous; no broker here.

Stages of one layer and of several, of the first layer and of the last: their differences are a layer, the embedding and
the head. Only those layers are read, so that models are measured that do not fit. What is measured is all that a
worker's compute thread does with a step: unpack, forward, sample, pack, encode.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from mqinfer.codec_choice import RAW
from mqinfer.device import free_bytes
from mqinfer.errors import ComputeError, PlanError
from mqinfer.host_profile import HostProfile, Points
from mqinfer.messages import Row, Sampling, Step
from mqinfer.observe import size
from mqinfer.plan import Plan, StageSpec
from mqinfer.settings import WorkerSettings
from mqinfer.stage_compute import AUTO, StageCompute, load_compute
from mqinfer.tensor_codec import pack

#: Rows of the forwards that decode.
ROWS = (1, 8, 32)
#: New positions of a step that prefills, as the coordinator's steps have.
PREFILL_TOKENS = 256
#: Forwards that count, after some that do not.
FORWARDS, WARM_FORWARDS = 15, 3
#: So many weights at least, where there are layers for it and memory: fewer would stay in a processor's cache.
LEAST_BYTES = 2**28
OWNER = "profile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What must be known of the model's layers."""

    #: Of each layer against the mean one.
    work: Sequence[float]
    layer_bytes: int
    #: Of embedding and head.
    ends_bytes: int
    kv_layer_token_bytes: int

    def kv_bytes(self, context_tokens: int) -> int:
        """In one layer, for all rows: twice what they need, since a cache wants room to grow."""
        return 2 * max(ROWS) * (context_tokens + 256) * self.kv_layer_token_bytes


def count_layers(weights: Weights, free: int | None, context_tokens: int) -> int:
    """How many layers to measure at once. Raises: PlanError where the model has too few or there is no room."""
    inner = len(weights.work) - 2
    if inner < 2:
        raise PlanError(f"a model of {inner + 2} layers can't be profiled: it takes four")
    layer_bytes = weights.layer_bytes + weights.kv_bytes(context_tokens)
    room = inner if free is None else (free - weights.ends_bytes) * 3 // 4 // layer_bytes - 3
    if room < 2:
        raise PlanError(f"not enough memory: five layers, embedding and head are measured, {size(free or 0)} are free")
    return max(2, min(inner, room, -(-LEAST_BYTES // weights.layer_bytes)))


def profile(
    plan: Plan,
    weights: Weights,
    folder: Path,
    settings: WorkerSettings,
    *,
    context_tokens: int,
    layers: int | None,
    tell: Callable[[str], None],
) -> HostProfile:
    """Measure; `tell` hears how far it is. Raises: PlanError, OutOfMemory, ComputeError."""
    memory_bytes = free_bytes(settings.device)
    several = layers or count_layers(weights, memory_bytes, context_tokens)
    last = len(weights.work) - 1
    if not 2 <= several <= last - 1:
        raise PlanError(f"layers: {several} is not between 2 and {last - 1}")
    watches = []
    for first, end in ((1, 2), (1, 1 + several), (0, 1), (last, last + 1)):
        tell(f"loading layers [{first}, {end})")
        watches.append(_load(plan, weights, folder, settings, first, end, context_tokens))
    prefill_s = _prefill(watches, tell)
    one, more, begin, end_ = _decode(watches, tell)
    own, further = weights.work[1], sum(weights.work[2 : 1 + several])
    layer = {rows: max(more[rows] - one[rows], 0.0) / further for rows in ROWS}
    forward = {rows: max(one[rows] - own * layer[rows], 0.0) for rows in ROWS}

    def beside(stage: Mapping[int, float], work: float) -> Points:
        return _points({rows: stage[rows] - forward[rows] - work * layer[rows] for rows in ROWS})

    return HostProfile(
        host=socket.gethostname(),
        device=settings.device,
        threads=settings.threads,
        model=plan.model,
        fingerprint=plan.fingerprint,
        dtype=plan.dtype,
        memory_bytes=memory_bytes or 0,
        context_tokens=context_tokens,
        prefill_tokens=min(PREFILL_TOKENS, context_tokens),
        layers=several,
        forward=_points(forward),
        layer=_points(layer),
        head=beside(end_, weights.work[last]),
        embedding=beside(begin, weights.work[0]),
        layer_prefill_token_s=max(prefill_s[1] - prefill_s[0], 0.0) / further,
    )


def _points(seconds: Mapping[int, float]) -> Points:
    """What noise has made negative is nothing."""
    return tuple((rows, max(taken, 0.0)) for rows, taken in seconds.items())


def _prefill(watches: Sequence[_Stopwatch], tell: Callable[[str], None]) -> list[float]:
    """Seconds of a token, by stage. They take turns: what disturbs the machine for a while disturbs all of them."""
    seconds: list[list[float]] = [[] for _ in watches]
    for row in range(max(ROWS)):
        if row % 8 == 0:
            tell(f"prompts: {row} of {max(ROWS)}")
        for watch, taken in zip(watches, seconds, strict=True):
            taken += watch.prefill(row)
    return [statistics.median(taken) for taken in seconds]


def _decode(watches: Sequence[_Stopwatch], tell: Callable[[str], None]) -> list[dict[int, float]]:
    """Seconds of a forward, by stage and by rows; likewise."""
    seconds: list[dict[int, list[float]]] = [{rows: [] for rows in ROWS} for _ in watches]
    for turn in range(WARM_FORWARDS + FORWARDS):
        if turn % 4 == 0:
            tell(f"decoding: {turn} of {WARM_FORWARDS + FORWARDS}")
        for rows in ROWS:
            for watch, taken in zip(watches, seconds, strict=True):
                taken[rows].append(watch.decode(rows))
    return [{rows: statistics.median(all_[WARM_FORWARDS:]) for rows, all_ in taken.items()} for taken in seconds]


def _load(
    plan: Plan, weights: Weights, folder: Path, settings: WorkerSettings, first: int, end: int, context_tokens: int
) -> _Stopwatch:
    bounds = sorted({0, first, end, len(weights.work)})
    specs = tuple(StageSpec(first=a, end=b) for a, b in pairwise(bounds))
    cut, stage = replace(plan, stages=specs), bounds.index(first)
    kv_bytes = weights.kv_bytes(context_tokens) * (end - first)
    codec = RAW if settings.codec == AUTO else settings.codec  # auto asks the link, and here is none
    compute = load_compute(
        cut, stage, folder, settings.model_copy(update={"kv_bytes": max(kv_bytes, 2**20), "codec": codec})
    )
    compute.prepare_thread()
    return _Stopwatch(cut, stage, compute, codec, context_tokens)


class _Stopwatch:
    """Steps through one stage, and what they took."""

    def __init__(self, plan: Plan, stage: int, compute: StageCompute, codec: str, context_tokens: int) -> None:
        self._plan = plan
        self._stage = stage
        self._compute = compute
        self._codec = codec
        self._context_tokens = context_tokens

    def prefill(self, row: int) -> list[float]:
        """Take a row up to the context; seconds of a token, of each step."""
        taken = []
        for start in range(0, self._context_tokens, PREFILL_TOKENS):
            count = min(PREFILL_TOKENS, self._context_tokens - start)
            taken.append(self._seconds([(row, start)], count) / count)
        return taken

    def decode(self, rows: int) -> float:
        """Seconds of a forward in which so many rows decode at the context's end, again and again the same token."""
        return self._seconds([(row, self._context_tokens) for row in range(rows)], 1)

    def _seconds(self, rows: Sequence[tuple[int, int]], count: int) -> float:
        """Of a step in which each (row, position) computes `count` positions. Raises: ComputeError."""
        step = self._step(rows, count)
        began_s = time.perf_counter()
        outgoing = self._compute.run([step], "profile")[0]
        seconds = time.perf_counter() - began_s
        if outgoing.misses or outgoing.unreadable:
            why = outgoing.unreadable or outgoing.misses[0].detail
            raise ComputeError(f"stage {self._stage} could not be measured: {why}")
        return seconds

    def _step(self, rows: Sequence[tuple[int, int]], count: int) -> Step:
        tokens = len(rows) * count
        first = self._stage == 0
        hidden = torch.randn(tokens, self._plan.hidden_size).to(getattr(torch, self._plan.dtype))
        return Step(
            plan=self._plan.digest,
            owner=OWNER,
            microbatch=0,
            number=0,
            stage=self._stage,
            route=("profile",) * self._stage,
            rows=tuple(
                Row(
                    row=row,
                    epoch=0,
                    start=start,
                    count=count,
                    reserve=self._context_tokens + 1,
                    sampling=Sampling() if count == 1 else None,
                )
                for row, start in rows
            ),
            tokens=tuple(at % self._plan.vocab_size for at in range(tokens)) if first else (),
            hidden=None if first else pack(hidden, self._codec),
        )
