"""One stream of events for logs, metrics and traces: `emit(event, **fields)`; sinks register.

Events are constants named `noun.past_verb`, listed here with their fields. Never a prompt, a token or a secret.
Nothing of mqinfer but words may be imported here; structlog is at home here and nowhere else.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import structlog

# Links
LINK_OPENED = "link.opened"  #: actor
LINK_LOST = "link.lost"  #: actor, error
LINK_BLOCKED = "link.blocked"  #: link, reason (the broker has a memory or disk alarm)
LINK_UNBLOCKED = "link.unblocked"  #: link, seconds

# Workers
STAGE_LOADED = "stage.loaded"  #: stage, layers, weight_bytes, peak_bytes, seconds, kv_bytes
WORKER_DRAINED = "worker.drained"  #: given_back
STAGE_CHOSEN = "stage.chosen"  #: stage, workers (of each stage, before)
WORKER_PAUSED = "worker.paused"  #: stage, reason; its device is free for others
WORKER_RESUMED = "worker.resumed"  #: stage
#: stage, microbatches, rows, tokens, seconds; waits_s (of each step, in this worker's hands); in_bytes, out_bytes (of
#: bodies); hidden_bytes, packed_bytes (of the hidden states in them, before and after the codec); traceparents (of each
#: step) (debug)
STEP_COMPUTED = "step.computed"
ROW_MISSED = "row.missed"  #: row, epoch, stage, reason, detail
COMPUTE_FAILED = "compute.failed"  #: stage, error
BODY_REFUSED = "body.refused"  #: queue, reason, bytes

# Coordinators
ROW_REPLAYED = "row.replayed"  #: request, reason, detail, lost_tokens
REQUEST_LEASED = "request.leased"  #: request, row (its number) (debug)
STEP_RETURNED = "step.returned"  #: microbatch, number (debug)
REQUEST_ENDED = "request.ended"  #: request, finish_reason, prompt_tokens, output_tokens
REQUEST_REFUSED = "request.refused"  #: request, error
RESULT_UNCLAIMED = "result.unclaimed"  #: request, job
CHECKPOINT_KEPT = "checkpoint.kept"  #: request, output_tokens (debug)
CHECKPOINT_LATE = "checkpoint.late"  #: request
WORKER_GONE = "worker.gone"  #: queue
STAGE_SEEN = "stage.seen"  #: stage, ready, consumers: its shared queue, at each probe (debug)
REQUESTS_SEEN = "requests.seen"  #: ready: what waits for any coordinator, at each probe (debug)
COORDINATOR_DRAINED = "coordinator.drained"  #: given_back

# Autoscalers
SCALE_DECIDED = "scale.decided"  #: change, stage, why, gain, acts, dry_run, and the numbers it rests on (debug: no act)
SCALE_ACTED = "scale.acted"  #: change, stage, instance, host, seconds; the command is through
SCALE_SETTLED = "scale.settled"  #: change, stage, instance, host, seconds; the consumer came or went
SCALE_FAILED = "scale.failed"  #: change, stage, error, retry_s

# Anything
ACTOR_READY = "actor.ready"  #: actor (its queue); it takes work
ACTOR_STALLED = "actor.stalled"  #: seconds; compute, or whatever shows that it lives, does not answer
ACTOR_FAILED = "actor.failed"  #: actor, error
TRACING_FAILED = "tracing.failed"  #: error; spans are lost or late

_DEBUG = frozenset(
    {STEP_COMPUTED, CHECKPOINT_KEPT, REQUEST_LEASED, STEP_RETURNED, REQUEST_ENDED, STAGE_SEEN, REQUESTS_SEEN}
)
_WARNING = frozenset(
    {
        LINK_LOST,
        LINK_BLOCKED,
        ROW_MISSED,
        BODY_REFUSED,
        RESULT_UNCLAIMED,
        CHECKPOINT_LATE,
        WORKER_GONE,
        REQUEST_REFUSED,
        SCALE_FAILED,
        TRACING_FAILED,
    }
)
_ERROR = frozenset({COMPUTE_FAILED, ACTOR_STALLED, ACTOR_FAILED})
#: Reasons of a missed row that are no fault: a worker leaves, is full, or does not hold it any more (the cache is one).
_ORDINARY_MISSES = frozenset({"gone", "room", "cache"})

Sink = Callable[[str, Mapping[str, Any]], None]

_sinks: list[Sink] = []


def emit(event: str, **fields: Any) -> None:
    """Tell every sink; a sink must be quick and must not raise."""
    for sink in _sinks:
        sink(event, fields)


def add_sink(sink: Sink) -> Callable[[], None]:
    """Register; the returned function takes it away again."""
    _sinks.append(sink)
    return lambda: _sinks.remove(sink)


def log_to_stderr(*, level: str = "info", as_json: bool = False) -> None:
    """Events become log lines on standard error, for people, or as JSON for machines."""
    form = [structlog.processors.JSONRenderer()] if as_json else [_for_people, _console_renderer()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *form,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_level(level)),
        # Looked up for each line: a progress bar puts itself in the place of sys.stderr while it is drawn.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    _quiet_libraries()
    logger = structlog.get_logger()
    lowest = _level(level)

    def tell(event: str, fields: Mapping[str, Any]) -> None:
        severity = _severity(event, fields)
        if severity >= lowest:  # the logger looks too, but after it is bound anew, and steps are many
            logger.log(severity, event, **fields)

    add_sink(tell)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _console_renderer() -> Any:
    return structlog.dev.ConsoleRenderer(colors=False, sort_keys=False)


def _for_people(_logger: object, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Sizes with their units, and no more digits than can be read."""
    for name, value in fields.items():
        if name.endswith("_bytes") and isinstance(value, int):
            fields[name] = size(value)
        elif isinstance(value, float):
            fields[name] = round(value, 3)
    return fields


def _quiet_libraries() -> None:
    """What the RabbitMQ clients log of a lost connection is raised too, and told by us as link.lost or link.refused."""
    for name in ("aio_pika", "aiormq"):
        library = logging.getLogger(name)
        library.handlers = [logging.NullHandler()]
        library.propagate = False


def _level(name: str) -> int:
    levels = logging.getLevelNamesMapping()
    return levels.get(name.upper(), logging.INFO)


def _severity(event: str, fields: Mapping[str, Any]) -> int:
    if event in _DEBUG or (event == SCALE_DECIDED and not fields.get("acts")):
        return logging.DEBUG
    if event == ROW_MISSED and fields.get("reason") in _ORDINARY_MISSES:
        return logging.INFO
    if event in _WARNING:
        return logging.WARNING
    return logging.ERROR if event in _ERROR else logging.INFO
