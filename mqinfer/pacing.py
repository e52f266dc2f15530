"""How many positions a step may have so that rows which decode hardly wait for those which prefill. Pure, no clock.

What a position costs beside what a forward costs anyway is learnt from the forwards themselves: on a GPU hundreds of
positions ride along for nothing, on a CPU a few dozen double the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import linear_regression

from mqinfer.batching import Pending

#: What a new observation counts against the mean of those before it.
FRESH = 0.2
#: A prefill beside as many decoding rows as the next number says, or more, may make the step so much longer: they keep
#: two thirds of their rate.
SLACK = 0.5
#: Where more rows prefill, the decoding ones wait longer: rows that don't decode yet are worth nothing.
PATIENT_ROWS = 8
#: However slow it is, a prefill goes on.
LEAST_TOKENS = 16
#: Sizes that were not seen for so many forwards are forgotten, so that one that stalled does not count for ever; a step
#: is full then, and shows anew what it takes.
STALE_NOTES = 1000
#: No forward that helps here takes longer; a worker may say what it likes.
MOST_S = 3600.0


@dataclass(slots=True)
class Pace:
    """A line through what the slowest stage's forwards took: seconds = fixed_s + token_s x positions."""

    #: Mean positions and seconds of forwards that were about as large, by the power of two: so that hundreds alike
    #: don't drive out what a few others have shown.
    _means: dict[int, tuple[float, float]] = field(default_factory=dict)
    #: By the same: the number of the note that saw one last.
    _seen: dict[int, int] = field(default_factory=dict)
    _notes: int = 0

    def note(self, tokens: int, seconds: float) -> None:
        """A forward over so many positions took so long."""
        if seconds <= 0 or tokens < 1:
            return
        self._notes += 1
        size, seconds = tokens.bit_length(), min(seconds, MOST_S)
        mean_tokens, mean_s = self._means.get(size, (tokens, seconds))
        self._means[size] = (mean_tokens + FRESH * (tokens - mean_tokens), mean_s + FRESH * (seconds - mean_s))
        self._seen[size] = self._notes
        for stale in [size for size, at in self._seen.items() if at < self._notes - STALE_NOTES]:
            del self._seen[stale], self._means[stale]

    def step_tokens(self, pending: Sequence[Pending], most: int) -> int:
        """New positions that the next step of these rows may have, `most` at most."""
        decoding = sum(1 for row in pending if row.known - row.cached == 1)
        prefilling = len(pending) - decoding
        line = self._line()
        if not decoding or not prefilling or line is None:
            return most
        fixed_s, token_s = line
        slack = SLACK * max(1.0, PATIENT_ROWS * prefilling / decoding)
        beside = slack * (fixed_s + token_s * decoding) / token_s
        return min(most, decoding + int(min(max(beside, LEAST_TOKENS), most)))

    def _line(self) -> tuple[float, float] | None:
        """(fixed_s, token_s) of the least squares; None while forwards were all alike, or longer ones no slower."""
        if len(self._means) < 2:
            return None
        token_s, fixed_s = linear_regression(*zip(*self._means.values(), strict=True))
        return (max(fixed_s, 0.0), token_s) if token_s > 0 else None
