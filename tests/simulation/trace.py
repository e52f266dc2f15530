"""What a run says while it happens: every event with its virtual time and process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mqinfer.observe import add_sink
from simulation.virtual import PROCESS


@contextmanager
def tracing(wanted: bool) -> Iterator[None]:
    """Print events, if wanted."""
    remove = add_sink(_print) if wanted else lambda: None
    yield
    remove()


def _print(event: str, fields: Mapping[str, Any]) -> None:
    process = PROCESS.get(None)
    told = " ".join(f"{name}={value}" for name, value in fields.items())
    print(f"{asyncio.get_running_loop().time():9.3f} {process.name if process else '-':18} {event} {told}")
