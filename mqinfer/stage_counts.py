"""What a worker did, counted for reports and told as events. No queues and no compute here."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from math import inf

from mqinfer.forecast import Speed, fit
from mqinfer.messages import Miss
from mqinfer.observe import ROW_MISSED, STEP_COMPUTED, emit
from mqinfer.stage_compute import Outgoing
from mqinfer.stage_engine import StageEngine
from mqinfer.stage_inbox import StageInbox, Taken

#: The sums that forwards are fitted by, and what is kept of them with each forward: about 100 count.
FITTED = ("forwards", "tokens", "busy_s", "tokens_squared", "token_busy_s")
KEPT = 0.99
#: What `tokens_per_s` is taken over.
RATE_WINDOW_S = 10.0


class StageCounts:
    """Counters of one session; they only grow. May be read from any thread."""

    def __init__(self, stage: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._stage = stage
        self._clock = clock
        #: By name, units in the name: what `Report.values` carries.
        self.values: Counter[str] = Counter()
        #: Those of FITTED, but of the last forwards only, and without the first one, in which kernels are loaded.
        self._fitted = dict.fromkeys(FITTED, 0.0)
        #: (when, positions) of the forwards of the last RATE_WINDOW_S.
        self._recent: deque[tuple[float, int]] = deque()

    def computed(self, taken: Sequence[Taken], outgoing: Sequence[Outgoing], began_s: float, ended_s: float) -> None:
        """One forward over these steps; what came of each; when, on the event loop's clock."""
        seconds = ended_s - began_s
        counts = {
            "rows": sum(len(item.step.rows) for item in taken),
            "tokens": sum(row.count for item in taken for row in item.step.rows),
            "in_bytes": sum(len(item.delivery.body) for item in taken),
            "out_bytes": sum(len(out.body) for out in outgoing),
            "hidden_bytes": sum(out.hidden_bytes for out in outgoing),
            "packed_bytes": sum(out.packed_bytes for out in outgoing),
        }
        waits_s = [began_s - item.arrived_s for item in taken]
        self._recent.append((self._clock(), counts["tokens"]))
        self._forget_old()
        tokens = counts["tokens"]
        # What of a forward's time grows with its positions follows from the sums of these (forecast.fit).
        fitted = dict(zip(FITTED, (1, tokens, seconds, tokens**2, tokens * seconds), strict=True))
        if self.values["forwards"]:
            self._fitted = {name: KEPT * self._fitted[name] + fitted[name] for name in FITTED}
        self.values.update({**fitted, **counts, "steps": len(taken), "wait_s": sum(waits_s)})
        emit(
            STEP_COMPUTED,
            stage=self._stage,
            microbatches=len(taken),
            seconds=seconds,
            waits_s=waits_s,
            traceparents=[item.step.traceparent for item in taken],
            **counts,
        )

    def missed(self, misses: Sequence[Miss]) -> None:
        """These rows were given up here."""
        self.values["misses"] += len(misses)
        for miss in misses:
            emit(
                ROW_MISSED,
                row=miss.row,
                epoch=miss.epoch,
                stage=miss.stage,
                reason=miss.reason.value,
                detail=miss.detail,
            )

    def now(self, engine: StageEngine, inbox: StageInbox) -> dict[str, float]:
        """The counters, and what is the case just now."""
        return {
            "unacknowledged": len(inbox.own) + len(inbox.shared),
            "kv_used_bytes": engine.kv_used_bytes,
            "kv_budget_bytes": engine.kv_budget_bytes,
            "cached_rows": engine.cached_rows,
            "tokens_per_s": self.tokens_per_s(),
            **self.values,
        }

    def tokens_per_s(self) -> float:
        """New positions computed in a second, over the last RATE_WINDOW_S."""
        oldest_s = self._clock() - RATE_WINDOW_S
        return sum(tokens for at_s, tokens in list(self._recent) if at_s > oldest_s) / RATE_WINDOW_S

    def speed(self) -> Speed | None:
        """Of the last forwards; None where none is known."""
        return fit(**self._fitted)

    def worth_tokens(self) -> float:
        """See forecast.Speed, of the last forwards."""
        speed = self.speed()
        return inf if speed is None else speed.worth_tokens

    def _forget_old(self) -> None:
        while self._recent[0][0] <= self._recent[-1][0] - RATE_WINDOW_S:
            self._recent.popleft()
