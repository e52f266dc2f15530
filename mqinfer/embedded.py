"""A whole pipeline in this process over `memory://`: one coordinator and one worker for each stage.

The same actors as in a fleet, the same messages as bytes; only the broker is a Python object. Needs torch.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mqinfer.coordinator import Coordinator
from mqinfer.link import Connect
from mqinfer.plan import Plan
from mqinfer.queues import new_id
from mqinfer.settings import CoordinatorSettings, WorkerSettings
from mqinfer.stage_compute import load_aside
from mqinfer.stage_worker import StageWorker
from mqinfer.tokenizer import Tokenizer
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport


@asynccontextmanager
async def pipeline(plan: Plan, folder: Path, tokenizer: Tokenizer, settings: WorkerSettings) -> AsyncIterator[Connect]:
    """Load all stages, run all actors; what it gives connects a producer to them.

    `settings.kv_bytes` is for all stages together. Raises: PlanError, OutOfMemory.
    """
    url = f"memory://{new_id('embedded')}"

    async def connect() -> Transport:
        return await open_transport(url)

    workers = []
    for stage in range(len(plan.stages)):
        own = _share(settings, plan, stage)
        compute = await load_aside(plan, stage, folder, own)
        workers.append(StageWorker(plan, stage, compute, own, connect))
    coordinator = Coordinator(plan, tokenizer, CoordinatorSettings(), connect)
    first, then = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        coordinating = tasks.create_task(coordinator.run(first))
        for worker in workers:
            tasks.create_task(worker.run(then))
        try:
            yield connect
        finally:  # the coordinator first, so that it does not replay what leaving workers give back
            first.set()
            await asyncio.wait({coordinating})
            then.set()


def _share(settings: WorkerSettings, plan: Plan, stage: int) -> WorkerSettings:
    """The stage's part of the memory, by its layers, and of the cores."""
    spec = plan.stages[stage]
    return settings.model_copy(
        update={
            "kv_bytes": max(settings.kv_bytes * (spec.end - spec.first) // plan.layers, 1),
            "threads": settings.threads or max((os.cpu_count() or 1) // len(plan.stages), 1),
            "drain_s": 0.0,
        }
    )
