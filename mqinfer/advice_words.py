"""Scaling advice for people: one or two sentences; and for machines: one object. How it is found is scaling.py's."""

from __future__ import annotations

from typing import Any

from mqinfer.scaling import Advice, Change, Why, Window

#: Where nothing helps: why. What is in braces is filled in by `sentences`.
_NOTHING = {
    Why.BLOCKED: "The broker blocks publishers: memory or disk alarm ({blocked}). Nothing can be said until it ends.",
    Why.NO_COORDINATOR: "No coordinator answers, so nothing is computed: start one with `mqinfer coordinator`.",
    Why.IDLE: "Nothing is under way: no stage needs a consumer.",
    Why.UNSEEN: "Some stage computed nothing in this time, so nobody knows how long it takes: look again later, "
    "or for longer (--window).",
    Why.COORDINATOR: "The coordinator binds: it computes {coordinator:.0%} of the time. Start another one; "
    "consumers do not help.",
    Why.ELSEWHERE: "No stage binds: even the busiest, stage {stage}, computes only {busy:.0%} of the time. "
    "Trips spend theirs on links, in the broker or in the coordinator.",
    Why.LITTLE_WORK: "There is too little work to keep a stage busy: even the busiest, stage {stage}, computes only "
    "{busy:.0%} of the time, with {rows:.0f} requests in flight.",
    Why.AT_MOST: "Stage {stage} is bound: its consumers computed {busy:.0%} of the time, and one more would bring "
    "{gain:+.0%}. But it has as many as it may have.",
    Why.BALANCED: "The stages are balanced: stage {stage} is the busiest ({busy:.0%} of the time), but one more "
    "consumer, wherever it is, brings {gain:+.0%} at most.",
}


def sentences(advice: Advice, window: Window) -> str:
    """What to do and why, with its numbers."""
    if advice.change is Change.NONE or advice.stage is None:
        stage = advice.stage or 0
        return _NOTHING[advice.why].format(
            stage=stage,
            busy=advice.busy[stage] if advice.busy else 0.0,
            gain=advice.gain,
            blocked=window.blocked,
            coordinator=window.coordinator_busy,
            rows=window.rows,
        )
    stage, seen = advice.stage, window.stages[advice.stage]
    if advice.why is Why.UNSERVED:
        return f"No worker serves stage {stage}: start one there (mqinfer worker --stage {stage})."
    if advice.why is Why.BELOW_LEAST:
        return f"Stage {stage} has {_consumers(seen.consumers)}, fewer than it should: start one there."
    after = f"{advice.rows_per_s:.1f} → {advice.rows_per_s * (1 + advice.gain):.1f} rows/s"
    if advice.change is Change.UP:
        return (
            f"Stage {stage} is bound: it has {_consumers(seen.consumers)} that computed {seen.busy:.0%} of the time"
            f"{_others(advice)}. One more there brings {advice.gain:+.0%} ({after})."
        )
    return (
        f"Stage {stage} has a consumer too many: of {seen.consumers}, each computed {seen.busy:.0%} of the time. "
        f"Without one the throughput changes by {advice.gain:+.1%} ({after})."
    )


def as_object(advice: Advice, window: Window) -> dict[str, Any]:
    """For --json."""
    return {
        "change": advice.change.value,
        "why": advice.why.value,
        "stage": advice.stage,
        "gain": advice.gain,
        "rows_per_s": advice.rows_per_s,
        "consumers": [stage.consumers for stage in window.stages],
        "ready": [stage.ready for stage in window.stages],
        "unacknowledged": [stage.unacknowledged for stage in window.stages],
        "busy": list(advice.busy),
        "gains": {str(stage): gain for stage, gain in advice.gains.items()},
        "requests": window.requests,
        "rows": window.rows,
        "microbatches": window.microbatches,
        "coordinator_busy": window.coordinator_busy,
        "blocked": window.blocked,
        "words": sentences(advice, window),
    }


def _consumers(count: int) -> str:
    return "1 consumer" if count == 1 else f"{count} consumers"


def _others(advice: Advice) -> str:
    others = [busy for stage, busy in enumerate(advice.busy) if stage != advice.stage]
    if not others:
        return ""
    least, most = f"{min(others):.0%}", f"{max(others):.0%}"
    return f", those of the other stages {least}" + ("" if least == most else f" to {most}")
