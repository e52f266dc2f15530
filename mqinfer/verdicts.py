"""What becomes of a row or a message that failed: two pure tables, a test for every cell.

`FATES` says it of what met an error, `decide` of a row that a stage gave up. Where a thing is done on the spot (a
queue that is gone is declared again, what nobody waits for is dropped) the code that does it says why.

No clock, no I/O, no logging: the caller does what the verdict says.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from mqinfer.errors import (
    CacheMiss,
    ComputeError,
    Disconnected,
    Forbidden,
    MqinferError,
    OutOfMemory,
    OutputError,
    PlanError,
    PlanMismatch,
    Refused,
    RequestError,
    SettingsError,
    TransportError,
    Unroutable,
    WireError,
)
from mqinfer.messages import MissReason

#: A row is computed at most so often without progress before it becomes a failure row.
MAX_FAILURES = 3


class Fate(StrEnum):
    """What becomes of what met an error."""

    TELL = "tell"  #: the person who started the command is told in a sentence; exit code 2
    DEAD = "dead"  #: the message goes to the dead-letter queue, with the reason
    FAIL = "fail"  #: the request ends in a failure row that says why
    MISS = "miss"  #: the row is missed, and its coordinator decides, see `decide`
    RETRY = "retry"  #: a new link, over which all that is unsettled comes again


FATES: Mapping[type[MqinferError], Fate] = {
    SettingsError: Fate.TELL,
    PlanError: Fate.TELL,
    OutputError: Fate.TELL,
    WireError: Fate.DEAD,
    PlanMismatch: Fate.DEAD,
    RequestError: Fate.FAIL,
    CacheMiss: Fate.MISS,
    ComputeError: Fate.MISS,
    OutOfMemory: Fate.MISS,
    TransportError: Fate.RETRY,
    Refused: Fate.TELL,
    Forbidden: Fate.TELL,
    Unroutable: Fate.MISS,
    Disconnected: Fate.RETRY,
}

#: For `except`: what sends a message to the dead letters, and what makes a failure row of a request.
DEAD_LETTERS = tuple(kind for kind, fate in FATES.items() if fate is Fate.DEAD)
FAILURE_ROWS = tuple(kind for kind, fate in FATES.items() if fate is Fate.FAIL)

#: The reason of a row that is missed for an error of this class, and of a step's rows where the step itself is dead.
MISS_REASONS: Mapping[type[MqinferError], MissReason] = {
    CacheMiss: MissReason.CACHE,
    ComputeError: MissReason.COMPUTE,
    OutOfMemory: MissReason.MEMORY,
    Unroutable: MissReason.GONE,
    PlanMismatch: MissReason.PLAN,
}


class Verdict(StrEnum):
    """What the coordinator does with a row that a stage gave up."""

    REPLAY = "replay"  #: from its token ids, in any microbatch
    REPLAY_FRESH = "replay-fresh"  #: in a new microbatch, which goes to whoever has room
    REPLAY_ALONE = "replay-alone"  #: in a microbatch of its own, so that it can harm nobody
    FAIL = "fail"  #: a failure row


#: Reasons that may be the row's own doing. Any progress clears them.
BLAMED = frozenset({MissReason.NEVER, MissReason.LOST, MissReason.COMPUTE, MissReason.MEMORY, MissReason.PLAN})


def decide(reason: MissReason, failures: int) -> Verdict:
    """The verdict on a row that was given up for `reason`, blamed `failures` times since its last progress.

    `failures` counts this one too, where the reason is in BLAMED. A row is retried among others
    once (most blame is bad luck: its worker was killed), then alone, then it fails.
    """
    if reason in BLAMED:
        if failures >= MAX_FAILURES:
            return Verdict.FAIL
        return Verdict.REPLAY_ALONE if failures == MAX_FAILURES - 1 else Verdict.REPLAY
    return Verdict.REPLAY_FRESH if reason in (MissReason.ROOM, MissReason.GONE) else Verdict.REPLAY


def explain(reason: MissReason, detail: str) -> str:
    """The sentence a failure row gives to people."""
    words = {
        MissReason.NEVER: "the row needs more memory for keys and values than any worker that tried it has",
        MissReason.LOST: f"{MAX_FAILURES} workers in a row died computing it",
        MissReason.COMPUTE: "the forward pass failed",
        MissReason.MEMORY: "the device ran out of memory",
        MissReason.PLAN: "workers serve another plan: make the plan file of all actors the same",
    }
    sentence = words.get(reason, f"gave up: {reason.value}")
    return f"{sentence} ({detail})" if detail else sentence
