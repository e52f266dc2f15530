"""Which rows form a microbatch and what each does in its next step: pure functions of what is there.

No clock, no I/O. The constants' reasons are in docs/architecture.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

#: Microbatches to each worker, where not even so many make forwards too small (docs/decisions/0010).
MOST_TO_EACH = 2.5

#: Routes are drawn anew while at least this share of the rows is on old ones, whose workers have no part in the new
#: ones' first trips while they compute: in so many turns, and a first trip that takes longer holds up no other.
MANY_ENDING = 0.25
TURNS = 8
LONG_FIRST_TRIP_S = 10.0

#: Routes that keep a worker busy which shares its stage, one microbatch in its hands while another is elsewhere: so
#: many are seen to where there are three microbatches for each worker of the stage, for routes are never drawn evenly.
LEAST_ROUTES, PLENTY = 2, 3

#: How many times larger or smaller than others a microbatch's speed makes it at most.
MOST_UNLIKE = 4.0


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


def microbatch_target(consumers: Sequence[int], rows: int, limits: Limits, worth_rows: float = inf) -> int:
    """How many microbatches keep every worker busy, and hold all `rows`.

    `consumers` as in `busy_target`; so many rows (`worth_rows`) are worth a forward of their own.
    """
    held = min(rows, limits.rows)
    return max(busy_target(consumers, held / worth_rows), -(-held // limits.microbatch_rows))


def busy_target(consumers: Sequence[int], worth: float = 0.0) -> int:
    """How many microbatches keep every worker busy with as large forwards as can be.

    In a chain of single workers that is one in each one's hands: a forward costs much the same for a few rows more, so
    that another microbatch on the way costs more than waiting for a message now and then. Where workers share a stage,
    half as many again even out which of them serves which; or more, up to `worth`, if so many are worth a forward each.
    `consumers`: workers that serve each stage, 0 where none is known yet.
    """
    workers = sum(max(count, 1) for count in consumers)
    if workers == len(consumers):
        return workers
    return max(workers + (workers + 1) // 2, int(min(worth, MOST_TO_EACH * workers)))


def share(limits: Limits, target: int) -> int:
    """Rows a microbatch may have so that `target` of them hold all rows allowed in flight."""
    return max(1, min(limits.microbatch_rows, -(-limits.rows // target)))


def fair(rows: int, limits: Limits, target: int, speed: float = 1.0) -> int:
    """Rows that a microbatch may be joined up to, so that all `rows` there are spread over `target` of them.

    `speed`: how fast its trips are beside the mean of all. Where workers share a stage, seven microbatches may keep to
    one of them and five to the other, or one of them is slower: fewer rows in each of those that wait there, and more
    in the others, give each worker as much to do as it can.
    """
    even = min(share(limits, target), -(-rows // target))
    # What slow ones are denied others must be able to take, or it waits.
    most = min(MOST_UNLIKE, limits.microbatch_rows / even) if even else 1.0
    return max(1, min(limits.microbatch_rows, round(even * min(max(speed * speed, 1 / most), most))))


def first_trips(target: int) -> int:
    """How many of the `target` microbatches may be on their first trips at once while routes are drawn anew."""
    return max(target // TURNS, 1)


def extra_microbatches(routes: Sequence[Sequence[str]], consumers: Sequence[int], target: int) -> int:
    """How many more than `target` there may be for the sake of a worker that waits while its few routes are elsewhere.

    The quicker a worker that shares its stage, the sooner its routes end, and the slower ones may draw all of the next.
    `routes`: of microbatches that may be joined. `consumers`: workers of each stage that take first trips.
    Returns as many as take them at the largest stage where one is short of routes; 0 where none is.
    """
    extra = 0
    for stage, count in enumerate(consumers):
        drawn = Counter(route[stage] for route in routes if len(route) > stage)
        least = LEAST_ROUTES if target >= PLENTY * count else 1
        if count > 1 and sum(1 for times in drawn.values() if times >= least) < count:
            extra = max(extra, count)
    return extra


def sizes(waiting: int, slots: int, most: int) -> list[int]:
    """Sizes of the microbatches to form now from `waiting` rows, `slots` at most, with `most` rows each at most."""
    if waiting <= 0 or slots <= 0:
        return []
    each = min(-(-waiting // slots), most)
    full, rest = divmod(min(waiting, each * slots), each)
    return [each] * full + ([rest] if rest else [])


def handed(own: int, others: Sequence[int]) -> list[int]:
    """How many of its `own` rows a microbatch gives to each of the `others`, so that none has two more than another.

    Or as near to it as it can alone: what others have too many of they give themselves.
    """
    have = list(others)
    while have and own - min(have) > 1:
        have[have.index(min(have))] += 1
        own -= 1
    return [after - before for after, before in zip(have, others, strict=True)]


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
