"""How many positions a step may have so that rows which decode hardly wait for those which prefill. Pure, no clock.

What a position costs beside what a forward costs anyway is learnt from the forwards themselves: on a GPU hundreds of
positions ride along for nothing, on a CPU a few dozen double the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import linear_regression

from mqinfer.batching import Pending
from mqinfer.forecast import Speed

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
class _Mean:
    """Of forwards that were about as large."""

    tokens: float
    seconds: float
    #: The number of the note that saw one last.
    seen: int = 0


@dataclass(slots=True)
class Pace:
    """A line through what the slowest stage's forwards took: seconds = fixed_s + token_s x positions."""

    #: By the power of two of their positions: so that hundreds alike don't drive out what a few others have shown.
    _means: dict[int, _Mean] = field(default_factory=dict)
    _notes: int = 0

    def note(self, tokens: int, seconds: float) -> None:
        """A forward over so many positions took so long."""
        if seconds <= 0 or tokens < 1:
            return
        self._notes += 1
        seconds = min(seconds, MOST_S)
        mean = self._means.setdefault(tokens.bit_length(), _Mean(tokens, seconds))
        mean.tokens += FRESH * (tokens - mean.tokens)
        mean.seconds += FRESH * (seconds - mean.seconds)
        mean.seen = self._notes
        for stale in [size for size, mean in self._means.items() if mean.seen < self._notes - STALE_NOTES]:
            del self._means[stale]

    def step_tokens(self, pending: Sequence[Pending], most: int) -> int:
        """New positions that the next step of these rows may have, `most` at most."""
        decoding = sum(1 for row in pending if row.known - row.cached == 1)
        prefilling = len(pending) - decoding
        if not decoding or not prefilling or (speed := self._speed()) is None:
            return most
        slack = SLACK * max(1.0, PATIENT_ROWS * prefilling / decoding)
        beside = slack * speed.seconds(decoding) / speed.token_s
        return min(most, decoding + int(min(max(beside, LEAST_TOKENS), most)))

    def worth_tokens(self) -> float:
        """See Speed, of the slowest stage. Infinite: it is not known yet."""
        speed = self._speed()
        return inf if speed is None else speed.worth_tokens

    def _speed(self) -> Speed | None:
        """By the least squares; None while forwards were all alike, or longer ones no slower."""
        if len(self._means) < 2:
            return None
        means = self._means.values()
        token_s, fixed_s = linear_regression([mean.tokens for mean in means], [mean.seconds for mean in means])
        return Speed(max(fixed_s, 0.0), token_s) if token_s > 0 else None
