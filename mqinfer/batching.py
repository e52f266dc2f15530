"""Which rows form a microbatch and what each does in its next step: pure functions of what is there.

No clock, no I/O. The constants' reasons are in docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may be in flight."""

    #: Rows of one microbatch at most.
    microbatch_rows: int
    #: Rows of this coordinator in flight at most.
    rows: int
    #: New positions of one step at most: bounds the body and how long others wait behind a prefill.
    step_tokens: int
    #: Trips after which nobody joins a microbatch any more, so that routes are drawn anew.
    open_trips: int


@dataclass(frozen=True, slots=True)
class Pending:
    """What a row still has to compute before its next token: positions [cached, known)."""

    cached: int
    known: int


def microbatch_target(consumers: Sequence[int], rows: int, limits: Limits) -> int:
    """How many microbatches keep every worker busy, and hold all `rows`. `consumers` as in `busy_target`."""
    return max(busy_target(consumers), -(-min(rows, limits.rows) // limits.microbatch_rows))


def busy_target(consumers: Sequence[int]) -> int:
    """How many microbatches keep every worker busy with as large forwards as can be.

    In a chain of single workers that is one in each one's hands: a forward costs much the same for a few rows more, so
    that another microbatch on the way costs more than waiting for a message now and then. Where workers share a stage,
    half as many again even out which of them serves which. `consumers`: workers that serve each stage, 0 where none is
    known yet.
    """
    workers = sum(max(count, 1) for count in consumers)
    return workers if workers == len(consumers) else workers + (workers + 1) // 2


def share(limits: Limits, target: int) -> int:
    """Rows a microbatch may have so that `target` of them hold all rows allowed in flight."""
    return max(1, min(limits.microbatch_rows, -(-limits.rows // target)))


def fair(rows: int, limits: Limits, target: int) -> int:
    """Rows that a microbatch may be joined up to, so that all `rows` there are spread evenly over `target` of them."""
    return max(1, min(share(limits, target), -(-rows // target)))


def sizes(waiting: int, live: int, limits: Limits, target: int) -> list[int]:
    """Sizes of the microbatches to form now from `waiting` rows beside `live` ones; the rest joins live ones."""
    slots = target - live
    if waiting <= 0 or slots <= 0:
        return []
    each = min(-(-waiting // slots), share(limits, target))
    full, rest = divmod(min(waiting, each * slots), each)
    return [each] * full + ([rest] if rest else [])


def counts(pending: Sequence[Pending], step_tokens: int) -> list[int]:
    """How many new positions each row computes in the next step; 0: it sits this one out.

    Rows that need one position (decode) come first, then prefills in order share what is left of
    `step_tokens` in chunks. At least one row always advances.
    """
    needs = [row.known - row.cached for row in pending]
    left = max(step_tokens, 1)
    taken = [0] * len(needs)
    for index in sorted(range(len(needs)), key=lambda i: needs[i] > 1):
        taken[index] = min(needs[index], left)
        left -= taken[index]
    return taken
