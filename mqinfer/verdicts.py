"""What becomes of a row or a message that failed: one pure table, a test for every cell.

No clock, no I/O, no logging: the caller does what the verdict says.
"""

from __future__ import annotations

from enum import StrEnum

from mqinfer.messages import MissReason

#: A row is computed at most so often without progress before it becomes a failure row.
MAX_FAILURES = 3


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
        return Verdict.REPLAY_ALONE if failures == MAX_FAILURES - 1 else Verdict.REPLAY_FRESH
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
