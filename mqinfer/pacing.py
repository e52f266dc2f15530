"""How many positions a step may have so that rows which decode hardly wait for those which prefill. Pure, no clock.

What a position costs beside what a forward costs anyway is what workers have learnt from their forwards: on a GPU
hundreds of positions ride along for nothing, on a CPU a few dozen double the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from mqinfer.batching import Pending
from mqinfer.forecast import Speed

#: What the latest trip counts against those before it.
LATEST = 0.2
#: A prefill beside as many decoding rows as the next number says, or more, may make the step so much longer: they keep
#: two thirds of their rate.
SLACK = 0.5
#: Where more rows prefill, the decoding ones wait longer: rows that don't decode yet are worth nothing.
PATIENT_ROWS = 8
#: A position that sees so many times hidden_size others takes twice a first one's time. By the number of products it is
#: six times (12 x hidden_size^2 a layer, and two with each position seen); attention reaches two thirds of their rate.
DEEP_HIDDEN_SIZES = 4
#: However slow it is, a prefill goes on.
LEAST_TOKENS = 8
#: No forward that helps here takes longer; a worker may say what it likes.
MOST_S = 3600.0


@dataclass(slots=True)
class Pace:
    """What forwards of the slowest stages take.

    One stage may be the slowest for few positions and another for many: then it is the first one's seconds with the
    other's slope, so that no prefill makes others wait longer than it seems.
    """

    hidden_size: int
    _speed: Speed | None = None

    def note(self, tokens: int, seconds: float, token_s: float) -> None:
        """A trip's slowest worker takes so long for a forward over so many positions, and so long for one more."""
        if seconds <= 0 or tokens < 1:
            return
        seconds = min(seconds, MOST_S)
        token_s = min(token_s, seconds / tokens)
        latest = Speed(seconds - token_s * tokens, token_s)
        before = self._speed or latest
        self._speed = Speed(
            before.fixed_s + LATEST * (latest.fixed_s - before.fixed_s),
            before.token_s + LATEST * (latest.token_s - before.token_s),
        )

    def step_tokens(self, pending: Sequence[Pending], most: int) -> int:
        """New positions that the next step of these rows may have, `most` at most."""
        cached = [row.cached for row in pending if row.known - row.cached > 1]
        prefilling, decoding = len(cached), len(pending) - len(cached)
        if not decoding or not prefilling or self._speed is None or not self._speed.token_s:
            return most
        slack = SLACK * max(1.0, PATIENT_ROWS * prefilling / decoding)
        token_s = self._speed.token_s * (1 + max(cached) / (DEEP_HIDDEN_SIZES * self.hidden_size))
        beside = slack * self._speed.seconds(decoding) / token_s
        return min(most, decoding + int(min(max(beside, LEAST_TOKENS), most)))

    def worth_tokens(self) -> float:
        """See Speed, of the slowest stage. Infinite: it is not known yet."""
        return inf if self._speed is None else self._speed.worth_tokens
