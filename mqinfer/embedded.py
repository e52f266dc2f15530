"""A whole pipeline in this process over `memory://`: one coordinator and one worker for each stage.

The same actors as in a fleet, the same messages as bytes; only the broker is a Python object. Needs torch.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from mqinfer.coordinator import Coordinator
from mqinfer.link import Connect
from mqinfer.plan import Plan
from mqinfer.queues import new_id
from mqinfer.settings import CoordinatorSettings, WorkerSettings
from mqinfer.stage_worker import StageWorker, load_compute
from mqinfer.tokenizer import Tokenizer
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport


@asynccontextmanager
async def pipeline(
    plan: Plan, folder: Path, tokenizer: Tokenizer, settings: WorkerSettings, tell: Callable[[str], None]
) -> AsyncIterator[Connect]:
    """Load all stages, run all actors; what it gives connects a producer to them.

    `settings.kv_bytes` and the threads are for all stages together. Raises: PlanError, OutOfMemory.
    """
    url = f"memory://{new_id('embedded')}"
    stages = len(plan.stages)
    each = settings.model_copy(
        update={
            "kv_bytes": max(settings.kv_bytes // stages, 1),
            "threads": settings.threads or max((os.cpu_count() or 1) // stages, 1),
            "drain_s": 0.0,
        }
    )

    async def connect() -> Transport:
        return await open_transport(url)

    workers = []
    for stage in range(stages):
        compute = await asyncio.to_thread(load_compute, plan, stage, folder, each, tell)
        workers.append(StageWorker(plan, stage, compute, each, connect))
    coordinator = Coordinator(plan, tokenizer, CoordinatorSettings(), connect)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for run in (coordinator.run, *(worker.run for worker in workers)):
            tasks.create_task(run(stop))
        try:
            yield connect
        finally:
            stop.set()
