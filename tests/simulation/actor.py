"""An actor of a simulated fleet: the processes that it has had, and what of them can be looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from mqinfer.coordinator import CoordinatorSession
from mqinfer.stage_worker import WorkerSession
from simulation.model import SimEngine
from simulation.virtual import Process, State


@dataclass(slots=True, eq=False)
class Actor:
    """A process that is started again when it ends: by systemd, or by the user of a batch."""

    name: str
    run: Callable[[Actor], Awaitable[None]]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    process: Process | None = None
    engine: SimEngine | None = None
    session: CoordinatorSession | WorkerSession | None = None
    #: Nobody starts it again.
    retired: bool = False
    starts: int = 0
    #: It was killed by a row that it computed.
    poisoned: bool = False

    @property
    def lives(self) -> bool:
        """Whether it has a process that was not killed and has not ended."""
        return self.process is not None and self.process.state is not State.DEAD and not self.process.task.done()
