"""What `mqinfer worker` does: a stage chosen or given, loaded, served; and the device left and taken again.

What the other commands do is in commands.py. torch is imported when a stage is loaded, and not before: a worker that is
paused has none.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from mqinfer import checkpoint, systemd
from mqinfer.commands import check_room, connecting, linked, measured, read_plan, traced
from mqinfer.errors import SettingsError
from mqinfer.gpu_guests import guests_on
from mqinfer.hours import Hours
from mqinfer.joining import joining, until_better
from mqinfer.link import Connect, reopen
from mqinfer.paused import BY_GUEST, BY_HOURS, TO_MOVE, PausedWorker, is_time
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
    called = False
    if reason := _reason(settings):
        number = NO_STAGE if stage is None else stage
        waiting = PausedWorker(plan, number, reason, settings, _connecting(settings, "paused worker"))
        async with systemd.kept_informed(systemd.loop_turns, stop):
            if not await waiting.run(stop):
                return 0
        called = waiting.called
    try:
        import mqinfer.stage_worker  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"a worker needs mqinfer[worker] ({error})") from error
    await unless_stopped(stop, _reach(settings))
    folder = await unless_stopped(stop, asyncio.to_thread(_folder, plan, model))
    if stage is None:
        await _help(plan, folder, settings, stop, called=called)
    else:
        async with systemd.kept_informed(systemd.loop_turns, stop):  # its watchdog runs since it was paused
            serving = await _loaded(plan, stage, folder, settings, stop)
        _leave(await _run(plan, serving, settings, stop, called=called), stop)
    return 0


def _reason(settings: WorkerSettings) -> str:
    """Why it is not to load now; "": it is."""
    if settings.paused:
        return settings.paused
    if not is_time(Hours.parse(settings.hours)):
        return BY_HOURS
    return BY_GUEST if settings.yield_gpu and guests_on(settings.device)() else ""


def _connecting(settings: WorkerSettings, actor: str) -> Connect:
    """As others connect; but who left its device must not vanish because the broker is away just then."""
    connect = connecting(settings, actor)
    return (lambda: reopen(connect)) if settings.paused else connect


async def _help(plan: Plan, folder: Path, settings: WorkerSettings, stop: asyncio.Event, *, called: bool) -> None:
    """Serve the stage that is the slowest, and move if it is to and another one stays slower."""
    costs = [cost.share for cost in checkpoint.stage_table(plan, checkpoint.facts(str(folder)))]
    possible = await asyncio.to_thread(_possible, plan, folder, settings)
    async with (
        systemd.kept_informed(systemd.loop_turns, stop),
        linked(settings, "joining") as link,
        joining(link, plan, costs, possible, instance=settings.instance) as stage,
    ):
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
        # Others that would choose or move wait until this one has drained, for `move` has its turn.
        _leave(await _run(plan, serving, settings, stop, called=called), stop)
        for task in watching:
            task.cancel()


def _leave(reason: str, stop: asyncio.Event) -> None:
    """Begin anew where the device was left for a reason, and nobody wants it to end."""
    if reason and not stop.is_set():
        begin_anew(MQINFER_PAUSED="" if reason == TO_MOVE else reason)


async def _run(plan: Plan, serving: StageWorker, settings: WorkerSettings, stop: asyncio.Event, *, called: bool) -> str:
    """Until it is stopped (""), or why it has left its device."""
    with measured(settings, plan, serving.stage) as attach, traced("worker", plan):
        attach(lambda: serving.values(), actor_facts(plan, serving.facts))
        async with systemd.kept_informed(serving.pulse, stop):
            await serving.run(stop, called=called)
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
    from mqinfer.stage_compute import load_aside
    from mqinfer.stage_worker import StageWorker

    await asyncio.to_thread(check_room, plan, [stage], folder, settings)
    compute = await unless_stopped(stop, load_aside(plan, stage, folder, settings))
    return StageWorker(plan, stage, compute, settings, connecting(settings, f"worker {stage}"))
