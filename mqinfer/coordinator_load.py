"""What bounds a coordinator, for its reports: its process's own computing, and its limits. No queues here."""

from __future__ import annotations

import time

from mqinfer.settings import CoordinatorSettings


def load_of(settings: CoordinatorSettings) -> dict[str, float]:
    """By name, units in the name: what `Report.values` carries."""
    return {"cpu_s": time.process_time(), "microbatch_rows": settings.microbatch_rows}
