"""What a stage costs a machine, and how fast a pipeline of unlike machines is then: arithmetic, standard library only.

The model of a pipeline: rows in flight are spread evenly over microbatches (`batching`); a stage's workers pull them
from one queue, so that its rate is the sum of theirs; the slowest stage bounds all. Which machine serves what is chosen
in `fleet_plan.py`, where the numbers come from is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from mqinfer.batching import Limits, microbatch_target
from mqinfer.errors import SettingsError

#: Of their rates together, what workers bring where some share a stage: microbatches keep the routes that they got on
#: their first trip, so that now and then a quick worker waits. 0.81 to 0.98 in ten fleets of a simulated ring.
SHARED = 0.92


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by the rows of a forward: straight between the points and beyond the last, level before the first."""

    #: (rows, seconds), rows rising.
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        rows = [at for at, _ in self.points]
        if not rows or rows != sorted(set(rows)) or any(seconds < 0 for _, seconds in self.points):
            raise SettingsError(
                f"{list(self.points)} are not (rows, seconds) with rising rows and seconds of 0 or more"
            )

    def at(self, rows: float) -> float:
        """Seconds of a forward with so many rows."""
        (before, low), *rest = self.points
        if rows <= before or not rest:
            return low
        for at, high in rest:
            slope, origin = (high - low) / (at - before), (before, low)
            if rows <= at:
                break
            before, low = at, high
        return max(origin[1] + slope * (rows - origin[0]), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a machine takes for a forward of one model; all of it in seconds by rows that decode."""

    #: Beside layers, head and embedding: whatever a forward costs anyway.
    forward: Curve
    #: A layer of mean work.
    layer: Curve
    head: Curve
    #: By tokens looked up.
    embedding: Curve
    #: A layer of mean work, for each token of a prompt.
    layer_prefill_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Machines of one kind, each of which runs one worker."""

    name: str
    count: int
    #: What a worker may take of each for weights, keys and values, and working space.
    memory_bytes: int
    speed: Speed
    #: From one worker's hands through the broker into the next one's.
    hop_s: float = 0.0
    #: To and from the broker; 0: it does not matter.
    link_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A decoder layer."""

    weight_bytes: int
    #: Against the mean of the model's layers.
    work: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What there is to place."""

    layers: tuple[Layer, ...]
    embedding_bytes: int
    #: The final norm too.
    head_bytes: int
    #: The head is the embedding: a stage that has both holds it once.
    tied: bool = False
    #: Keys and values of one token in one layer.
    kv_layer_token_bytes: int
    #: How many times they have room: once, and once more where a forward copies those of its rows.
    kv_copies: int = 1
    #: Hidden states of one token, as they travel.
    hidden_bytes: int
    #: What a forward takes for itself, beside weights and keys and values.
    working_bytes: int = 0
    #: And more where there is the head.
    head_working_bytes: int = 0
    #: Of the first i layers.
    weight_sums: tuple[int, ...] = field(init=False, repr=False)
    work_sums: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_sums", (0, *accumulate(layer.weight_bytes for layer in self.layers)))
        object.__setattr__(self, "work_sums", (0.0, *accumulate(layer.work for layer in self.layers)))

    @property
    def kv_layer_token_room_bytes(self) -> int:
        """What keys and values of one token in one layer take while they are computed with."""
        return self.kv_layer_token_bytes * self.kv_copies

    def fixed_bytes(self, first: int, end: int) -> int:
        """Weights and working space of a worker with the layers [first, end)."""
        begins, ends = first == 0, end == len(self.layers)
        extra = self.working_bytes + (self.embedding_bytes if begins else 0)
        if ends:
            shared = min(self.embedding_bytes, self.head_bytes) if begins and self.tied else 0
            extra += self.head_bytes - shared + self.head_working_bytes
        return extra + self.weight_sums[end] - self.weight_sums[first]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the pipeline is to carry."""

    #: Positions that each row reaches, its prompt among them.
    context_tokens: int
    #: Of those, the prompt's.
    prompt_tokens: int
    #: Rows in flight.
    concurrency: int
    #: Rows of one microbatch at most.
    microbatch_rows: int = 64
    #: The cache gives a row room in multiples of this.
    kv_round_tokens: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_tokens < self.context_tokens:
            raise SettingsError(
                f"a prompt of {self.prompt_tokens} tokens leaves none of {self.context_tokens} to generate"
            )
        if min(self.concurrency, self.microbatch_rows) < 1:
            raise SettingsError("at least one row must be in flight")

    @property
    def kv_tokens(self) -> int:
        """Positions of each row whose keys and values must have room."""
        return -(-self.context_tokens // self.kv_round_tokens) * self.kv_round_tokens

    @property
    def mean_position(self) -> int:
        """Where a row decodes on average."""
        return (self.prompt_tokens + self.context_tokens) // 2

    @property
    def prompt_share(self) -> float:
        """Tokens of prompts for each token that is generated."""
        return self.prompt_tokens / (self.context_tokens - self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Flight:
    """How rows are spread over microbatches, where so many workers are busy."""

    #: Of a forward.
    rows: float
    #: Microbatches for each worker: where there is but one, a worker waits for it while it travels.
    per_worker: float
    #: Of their rates, what workers bring.
    brought: float


def flight(workers: int, stages: int, load: Load) -> Flight:
    """As the coordinator will spread the rows."""
    limits = Limits(microbatch_rows=load.microbatch_rows, rows=load.concurrency, step_tokens=1, open_trips=1)
    consumers = [1] * (stages - 1) + [workers - stages + 1]
    microbatches = min(microbatch_target(consumers, load.concurrency, limits), load.concurrency)
    return Flight(load.concurrency / microbatches, microbatches / workers, 1.0 if workers == stages else SHARED)


def layer_s(load: Load, speed: Speed, rows: float) -> float:
    """Of a layer of mean work: the rows decode a token each, and their part of the prompts is prefilled."""
    return speed.layer.at(rows) + rows * load.prompt_share * speed.layer_prefill_token_s


def forward_s(model: Model, load: Load, speed: Speed, first: int, end: int, rows: float) -> float:
    """Of the layers [first, end), with what comes before and after them there."""
    work = model.work_sums[end] - model.work_sums[first]
    seconds = speed.forward.at(rows) + work * layer_s(load, speed, rows)
    seconds += speed.embedding.at(rows * (1 + load.prompt_share)) if first == 0 else 0.0
    return seconds + (speed.head.at(rows) if end == len(model.layers) else 0.0)


def worker_rates(
    model: Model, load: Load, machine: Machine, flight: Flight, first: int, end: int, busy_s: Sequence[float]
) -> list[float]:
    """Tokens per second of workers whose forwards take `busy_s`, where their stage bounds the others.

    A forward's period is its own time; or, where few microbatches are under way, that of one on its way here and
    computed; or what its hidden states take over the link: only tokens come to layer 0 and leave the last one.
    """
    ways = ((first > 0) + (end < len(model.layers))) / 2  # the link's speed is that of there and back
    sent_bytes = ways * flight.rows * (1 + load.prompt_share) * model.hidden_bytes
    sent_s = sent_bytes / machine.link_bytes_per_s if machine.link_bytes_per_s else 0.0
    least_s, way_s, brought = max(sent_s, 1e-9), machine.hop_s + sent_s, flight.brought * flight.rows
    return [brought / max(busy, least_s, (busy + way_s) / flight.per_worker) for busy in busy_s]


def rows_held(model: Model, load: Load, machine: Machine, first: int, end: int) -> int:
    """Rows whose keys and values have room beside the layers [first, end); all in flight at most."""
    room_bytes = machine.memory_bytes - model.fixed_bytes(first, end)
    row_bytes = load.kv_tokens * model.kv_layer_token_room_bytes * (end - first)
    if room_bytes < 0:
        return 0
    return min(room_bytes // row_bytes, load.concurrency) if row_bytes else load.concurrency


def stage_rate(rates: Sequence[float], shares: Sequence[float]) -> float:
    """Tokens per second of a stage of such workers: the largest x that is at most the sum of min(rate, x * share).

    `shares`: what part of all rows each has room for; whoever holds a part of the rows does that part of the work at
    most. 0 where together they can't hold all.
    """
    if sum(shares) < 1 - 1e-9:
        return 0.0
    workers = sorted(
        (pair for pair in zip(rates, shares, strict=True) if pair[1] > 0), key=lambda pair: pair[0] / pair[1]
    )
    flat, rest = 0.0, sum(share for _, share in workers)
    for index, (rate, share) in enumerate(workers):  # the first ones do all they can, the others what they hold
        flat, rest = flat + rate, rest - share
        if rest >= 1 - 1e-9:
            continue
        found = flat / (1 - rest)
        if index + 1 == len(workers) or found <= workers[index + 1][0] / workers[index + 1][1]:
            return found
    return flat
