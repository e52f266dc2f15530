"""What a coordinator did, counted for reports and told as events or traces; and what bounds it. No queues here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from mqinfer.messages import FinishReason, Result, Step
from mqinfer.observe import REQUEST_ENDED, ROW_REPLAYED, emit
from mqinfer.rows import Replayed
from mqinfer.scheduler import Scheduler
from mqinfer.settings import CoordinatorSettings

#: A trip begins with this step: the same with its `traceparent`, to be sent.
Trace = Callable[[Step], Step]

NAMES = ("results", "failures", "prompt_tokens", "output_tokens", "replays", "replayed_tokens", "dead_letters")


def untraced(step: Step) -> Step:
    """The Trace of who traces nothing."""
    return step


class CoordinatorCounts:
    """Counters of one session; they only grow. May be read from any thread."""

    def __init__(self) -> None:
        #: By name, units in the name: what `Report.values` carries.
        self.values: Counter[str] = Counter(dict.fromkeys(NAMES, 0))

    def ended(self, result: Result) -> None:
        """This result is published."""
        failed = result.finish_reason is FinishReason.ERROR
        output_tokens = len(result.output)
        self.values["failures" if failed else "results"] += 1
        self.values.update({"prompt_tokens": result.prompt_tokens, "output_tokens": output_tokens})
        emit(
            REQUEST_ENDED,
            request=result.id,
            finish_reason=result.finish_reason.value,
            prompt_tokens=result.prompt_tokens,
            output_tokens=output_tokens,
        )

    def replayed(self, decision: Replayed) -> None:
        """This row goes back to waiting."""
        self.values.update({"replays": 1, "replayed_tokens": decision.lost_tokens})
        emit(
            ROW_REPLAYED,
            request=decision.row.request.id,
            reason=decision.reason.value,
            detail=decision.detail,
            lost_tokens=decision.lost_tokens,
        )

    def now(self, scheduler: Scheduler) -> dict[str, float]:
        """The counters, and what is the case just now."""
        return {
            "rows": len(scheduler.rows),
            "waiting": len(scheduler.waiting),
            "microbatches": len(scheduler.microbatches),
            **self.values,
        }


def load_of(settings: CoordinatorSettings) -> dict[str, float]:
    """Its process's own computing, and its limits: by name, units in the name, what `Report.values` carries."""
    return {"cpu_s": time.process_time(), "microbatch_rows": settings.microbatch_rows}
