"""What a worker did, counted for reports and told as events. No queues and no compute here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mqinfer.messages import Miss, Step
from mqinfer.observe import ROW_MISSED, STEP_COMPUTED, emit


class StageCounts:
    """Counters of one session; they only grow."""

    def __init__(self, stage: int) -> None:
        self._stage = stage
        #: By name, units in the name: what `Report.values` carries.
        self.values: Counter[str] = Counter()
        #: Of the latest forward: its seconds, its positions.
        self.latest = (0.0, 0)

    def computed(self, steps: Sequence[Step], seconds: float) -> None:
        """One forward over these steps took so long."""
        rows = sum(len(step.rows) for step in steps)
        tokens = sum(row.count for step in steps for row in step.rows)
        self.latest = (seconds, tokens)
        self.values.update({"forwards": 1, "steps": len(steps), "rows": rows, "tokens": tokens, "busy_s": seconds})
        # From these two and the sums above follows what of a forward's time grows with its positions (forecast.fit).
        self.values.update({"tokens_squared": tokens**2, "token_busy_s": tokens * seconds})
        emit(STEP_COMPUTED, stage=self._stage, microbatches=len(steps), rows=rows, tokens=tokens, seconds=seconds)

    @staticmethod
    def missed(misses: Sequence[Miss]) -> None:
        """These rows were given up here."""
        for miss in misses:
            emit(
                ROW_MISSED,
                row=miss.row,
                epoch=miss.epoch,
                stage=miss.stage,
                reason=miss.reason.value,
                detail=miss.detail,
            )
