"""Where one more worker helps a pipeline most, and whether one that serves a stage had better move. Pure: no clock.

A pipeline is as fast as its slowest stage, and a stage as fast as its workers together. Who they are is not known here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

#: What moving must bring, for the rows that are cached are computed anew where a worker has no time to end them.
MARGIN = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One stage and who serves it."""

    #: Those that are about to join it included.
    workers: int
    #: What it costs beside the other stages, in any unit: by the model's own numbers.
    cost: float
    #: Rows that one worker computes in a second of computing, as measured; None where nothing was computed.
    rows_per_s: float | None = None


def best_stage(stages: Sequence[Served], possible: Collection[int]) -> int:
    """The slowest of the possible stages, of which there is at least one, for that bounds the rest.

    Taken again and again by workers that are alike, it makes the best distribution there is. Of equally slow ones, such
    as those that nobody serves, the costliest.
    """
    rates = _rates(stages)
    return min(possible, key=lambda stage: (rates[stage], -stages[stage].cost, stage))


def better_stage(stages: Sequence[Served], mine: int, possible: Collection[int]) -> int | None:
    """Where a worker of stage `mine` had better be; None: where it is. No stage is left without a worker."""
    elsewhere = [stage for stage in possible if stage != mine]
    if stages[mine].workers < 2 or not elsewhere:
        return None
    without = [
        replace(stage, workers=stage.workers - 1) if index == mine else stage for index, stage in enumerate(stages)
    ]
    best = best_stage(without, elsewhere)
    moved = [
        replace(stage, workers=stage.workers + 1) if index == best else stage for index, stage in enumerate(without)
    ]
    before, after = _rates(stages), _rates(moved)
    if min(before) == 0:
        return best if after.count(0) < before.count(0) else None
    return best if min(after) >= MARGIN * min(before) else None


def _rates(stages: Sequence[Served]) -> list[float]:
    """Of each stage, all in one unit: measured where all that are served were, and otherwise by the model's numbers."""
    measured = all(stage.rows_per_s for stage in stages if stage.workers)
    return [stage.workers * ((stage.rows_per_s or 0.0) if measured else 1 / max(stage.cost, 1e-9)) for stage in stages]
