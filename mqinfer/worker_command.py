"""What `mqinfer worker` does: a stage chosen or given, loaded, served; and the device left and taken again.

What the other commands do is in commands.py. torch is imported when a stage is loaded, and not before: a worker that is
paused has none.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mqinfer import checkpoint, systemd
from mqinfer.commands import check_room, connecting, linked, measured, read_plan
from mqinfer.errors import SettingsError
from mqinfer.hours import Hours
from mqinfer.joining import joining, until_better
from mqinfer.paused import BY_HOURS, TO_MOVE, PausedWorker, is_time
from mqinfer.plan import Plan
from mqinfer.presence import NO_STAGE
from mqinfer.reports import actor_facts
from mqinfer.running import begin_anew, unless_stopped
from mqinfer.settings import Settings, WorkerSettings

if TYPE_CHECKING:
    from mqinfer.stage_worker import StageWorker


async def worker(settings: WorkerSettings, stage: int | None, model: str | None, *, stop: asyncio.Event) -> int:
    """Load a stage (None: the one where it helps most) and serve it. The exit code."""
    plan = read_plan(settings)
    if stage is not None and not 0 <= stage < len(plan.stages):
        raise SettingsError(f"the plan has stages 0 to {len(plan.stages) - 1}, not {stage}")
    reason = settings.paused or ("" if is_time(Hours.parse(settings.hours)) else BY_HOURS)
    if reason and not await _paused(plan, stage, reason, settings, stop):
        return 0
    try:
        import mqinfer.stage_worker  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"a worker needs mqinfer[worker] ({error})") from error
    await unless_stopped(stop, _reach(settings))
    folder = await unless_stopped(stop, asyncio.to_thread(_folder, plan, model))
    if stage is None:
        await _help(plan, folder, settings, stop)
    else:
        _leave(await _run(plan, await _loaded(plan, stage, folder, settings, stop), settings, stop))
    return 0


async def _paused(plan: Plan, stage: int | None, reason: str, settings: WorkerSettings, stop: asyncio.Event) -> bool:
    """Wait; whether it may return to its device, or is stopped."""
    number = NO_STAGE if stage is None else stage
    waiting = PausedWorker(plan, number, reason, settings, connecting(settings, "paused worker"))
    async with systemd.kept_informed(partial(asyncio.sleep, 0), stop):
        return await waiting.run(stop)


async def _help(plan: Plan, folder: Path, settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Serve the stage that is the slowest, and move if it is to and another one stays slower."""
    costs = [cost.share for cost in checkpoint.stage_table(plan, checkpoint.facts(str(folder)))]
    possible = await asyncio.to_thread(_possible, plan, folder, settings)
    async with linked(settings, "joining") as link, joining(link, plan, costs, possible) as stage:
        serving = await _loaded(plan, stage, folder, settings, stop)

    async def move() -> None:
        held = await until_better(connecting(settings, "joining"), plan, stage, costs, possible)
        try:
            serving.leave(TO_MOVE)
            await asyncio.Event().wait()
        finally:
            await held.close()

    async with asyncio.TaskGroup() as tasks:
        watching = [tasks.create_task(move())] if settings.rebalance else []
        _leave(
            await _run(plan, serving, settings, stop)
        )  # while `move` holds its turn: nobody chooses before it has moved
        for task in watching:
            task.cancel()


def _leave(reason: str) -> None:
    """Begin anew where the device was left for a reason."""
    if reason:
        begin_anew(MQINFER_PAUSED="" if reason == TO_MOVE else reason)


async def _run(plan: Plan, serving: StageWorker, settings: WorkerSettings, stop: asyncio.Event) -> str:
    """Until it is stopped (""), or why it has left its device."""
    with measured(settings, plan, serving.stage) as attach:
        attach(lambda: serving.values(), actor_facts(plan, serving.facts))
        async with systemd.kept_informed(serving.pulse, stop):
            await serving.run(stop)
    return serving.left


async def _reach(settings: Settings) -> None:
    """A wrong address or password is told before minutes are spent on weights."""
    async with linked(settings, "hello"):
        pass


def _folder(plan: Plan, model: str | None) -> Path:
    folder = checkpoint.resolve(model or plan.model, plan.revision)
    checkpoint.verify(folder, plan)
    return folder


def _possible(plan: Plan, folder: Path, settings: WorkerSettings) -> list[int]:
    """Stages that the device has room for. Raises: SettingsError where there is none, with the reason for the last."""
    fitting = []
    reason = None
    for stage in range(len(plan.stages)):
        try:
            check_room(plan, [stage], folder, settings)
            fitting.append(stage)
        except SettingsError as error:
            reason = error
    if not fitting:
        raise SettingsError(f"no stage fits here; the last, for example: {reason}") from reason
    return fitting


async def _loaded(plan: Plan, stage: int, folder: Path, settings: WorkerSettings, stop: asyncio.Event) -> StageWorker:
    from mqinfer.stage_compute import load_compute
    from mqinfer.stage_worker import StageWorker

    await asyncio.to_thread(check_room, plan, [stage], folder, settings)
    compute = await unless_stopped(stop, asyncio.to_thread(load_compute, plan, stage, folder, settings))
    return StageWorker(plan, stage, compute, settings, connecting(settings, f"worker {stage}"))
