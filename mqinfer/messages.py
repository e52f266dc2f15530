"""What travels between producer, coordinator and stage workers: frozen dataclasses, nothing else.

How they become bytes is `wire.py`; which queue they go to is `queues.py`. docs/protocol.md is the
normative text. No torch, no RabbitMQ and no policy may live here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class MissReason(StrEnum):
    """Why a worker did not compute a row."""

    CACHE = "cache"  #: it does not hold the row's earlier positions
    ROOM = "room"  #: its KV budget is taken by other rows just now
    NEVER = "never"  #: the row is larger than its whole KV budget
    GONE = "gone"  #: the next worker of the route no longer exists
    LOST = "lost"  #: a worker died holding the step
    PLAN = "plan"  #: the worker serves another plan
    COMPUTE = "compute"  #: the forward pass raised for this row alone
    MEMORY = "memory"  #: the device ran out of memory for this row alone


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  #: an end-of-sequence token or a stop string
    LENGTH = "length"  #: max_tokens reached
    ERROR = "error"  #: a failure row; `Result.error` says why


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the last stage draws a row's next token."""

    #: 0 means greedy: the most likely token.
    temperature: float = 0.0
    #: Only the k most likely tokens; 0 means all.
    top_k: int = 0
    #: Only the smallest set of tokens whose probability reaches this; 1 means all.
    top_p: float = 1.0
    #: With the position it decides the draw, so that a replay draws the same token; < 2**63.
    seed: int = 0
    #: How many alternatives' log-probabilities to report; -1 means none at all, 0 the drawn token's only.
    logprobs: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The log-probability of a drawn token and of its likeliest alternatives."""

    token: int
    logprob: float
    #: (token, logprob), most likely first.
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be continued, with the tokens it has so far: a lease is the holding of its delivery."""

    #: Unique over all jobs; repeats of it are the same request.
    id: str
    #: The job whose results queue gets the answer.
    job: str
    #: Digest of the plan that it was made for.
    plan: str
    #: Echoed in the result; the fleet does not look at it.
    tag: str = ""
    prompt: tuple[int, ...]
    #: Tokens generated so far: empty at first, more in a checkpoint.
    output: tuple[int, ...] = ()
    #: One for each token of `output` where log-probabilities were asked for.
    logprobs: tuple[TokenLogprob, ...] = ()
    max_tokens: int
    #: Texts that end the answer; not part of it.
    stop: tuple[str, ...] = ()
    #: Go on to max_tokens whatever is drawn (benchmarks).
    ignore_eos: bool = False
    sampling: Sampling = Sampling()
    #: How often computing it failed without any progress, over all leases.
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence's part in a step: the positions [start, start + count)."""

    #: Number of the row, unique for its owner (the coordinator).
    row: int
    #: Which replay; a worker drops what is older than what it has seen.
    epoch: int
    #: Position of the first new token.
    start: int
    #: How many new tokens.
    count: int
    #: Positions the row is expected to reach: what a worker sets aside when the row is new.
    reserve: int
    #: Given where a token is wanted after the last new position; None in the middle of a prefill.
    sampling: Sampling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A row that a stage could not compute."""

    row: int
    epoch: int
    stage: int
    reason: MissReason
    #: For people and logs; never prompt text.
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A tensor as bytes: what `tensor_codec` makes and reads."""

    codec: str
    #: The tensor's dtype, by torch's name ("float32", "bfloat16").
    dtype: str
    shape: tuple[int, ...]
    #: Contiguous pieces; what each means is the codec's business.
    blobs: tuple[bytes | memoryview, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One trip of a microbatch around the ring, on its way to stage `stage`."""

    plan: str
    #: The coordinator's queue: where the step's end goes. With `Row.row` it names a cache entry.
    owner: str
    #: Number of the microbatch, unique for its owner.
    microbatch: int
    #: Number of the trip, counted from 0.
    number: int
    stage: int
    #: Queues of the workers that serve this microbatch, by stage; grows on the first trip.
    route: tuple[str, ...] = ()
    rows: tuple[Row, ...]
    #: Rows given up by earlier stages on this trip.
    misses: tuple[Miss, ...] = ()
    #: (row, epoch) pairs of this owner whose keys and values may be forgotten.
    release: tuple[tuple[int, int], ...] = ()
    #: How long it may wait in a stage's shared queue; after that it has been replayed. 0: for ever.
    ttl_s: float = 0.0
    #: To be computed by itself: it is suspected of killing workers.
    alone: bool = False
    #: A worker of the route is about to leave: no row may join.
    closing: bool = False
    #: What a forward over this step's positions takes at the slowest of the stages passed; 0: unknown.
    slowest_s: float = 0.0
    #: How many positions those were.
    slowest_tokens: int = 0
    #: What one position more takes, at that of the stages passed where it takes the longest; 0: unknown.
    slowest_token_s: float = 0.0
    #: The trip's span, as W3C Trace Context writes it; "" where it is not traced.
    traceparent: str = ""
    #: Stage 0 only: the new tokens of all rows, row after row.
    tokens: tuple[int, ...] = ()
    #: Later stages: [sum of counts, hidden_size], rows in order.
    hidden: Packed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTaken:
    """A worker has taken a step on its first trip, or begins with one that travels alone, or is through with that.

    Should the worker die meanwhile, the step's owner knows of what.
    """

    plan: str
    microbatch: int
    number: int
    #: The worker's queue.
    worker: str
    #: Of a step that travels alone: it is computed and on its way.
    passed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The token drawn for a row."""

    row: int
    epoch: int
    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """The end of a trip. Every row of the step that is not in `misses` has advanced by its count."""

    plan: str
    microbatch: int
    number: int
    route: tuple[str, ...]
    sampled: tuple[Sampled, ...] = ()
    misses: tuple[Miss, ...] = ()
    #: As in the step.
    closing: bool = False
    #: As in the step, the last stage included.
    slowest_s: float = 0.0
    slowest_tokens: int = 0
    slowest_token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """The keys and values of these (row, epoch) pairs of this owner, and of their earlier epochs, may be forgotten."""

    plan: str
    owner: str
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Asks nothing: that it can be routed shows that its receiver lives."""

    plan: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A request's one answer, or its failure."""

    id: str
    job: str
    tag: str = ""
    finish_reason: FinishReason
    prompt_tokens: int
    #: Generated tokens, the end-of-sequence token included.
    output: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    #: Where finish_reason is "error": a short code and a sentence for people.
    error_code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTotal:
    """How many results a detached job has in all: waits in its results queue beside them."""

    job: str
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """`mqinfer status` asks every actor of the pipeline to send a Report."""

    plan: str
    reply_to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """A worker is to leave its device to others, or, not `paused`, to return to it."""

    plan: str
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an actor says of itself; counters grow from its start."""

    #: "worker", "coordinator"; of a worker that has left its device "paused", of one that loads its stage "joining".
    role: str
    id: str
    host: str
    #: -1 for a coordinator.
    stage: int
    #: Clock of the actor when it made the report; only differences mean something.
    clock_s: float
    #: Counters and gauges by name, units in the name.
    values: Mapping[str, float] = field(default_factory=dict)
    #: Facts by name, such as the device or the version.
    facts: Mapping[str, str] = field(default_factory=dict)


Message = Request | Step | StepTaken | StepDone | Release | Probe | Result | JobTotal | Ask | Pause | Report

#: Kind on the wire -> class. A kind is never given another meaning.
KINDS: Mapping[str, type[Any]] = {
    "request": Request,
    "step": Step,
    "step-taken": StepTaken,
    "step-done": StepDone,
    "release": Release,
    "probe": Probe,
    "result": Result,
    "job-total": JobTotal,
    "ask": Ask,
    "pause": Pause,
    "report": Report,
}
