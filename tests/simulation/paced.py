"""A pipeline whose forwards take a stated time, on a virtual clock; nothing goes wrong: its rates are plain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from unittest import mock

from mqinfer.messages import Step
from simulation import world as worlds
from simulation.actor import Actor
from simulation.network import Weather
from simulation.run import _events_told, _graveyard, _seeded, _sessions_told
from simulation.scenario import Job, Prompt, Scenario
from simulation.virtual import PROCESS, VirtualLoop

T = TypeVar("T")
World = TypeVar("World", bound="PacedWorld")
#: Seconds of a forward over these steps.
Pace = Callable[[Sequence[Step]], float]


class PacedLoop(VirtualLoop):
    """A process that has a `pace` takes that for a forward, and no time for anything else."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        process = PROCESS.get()
        pace: Pace | None = getattr(process, "pace", None)
        if pace is not None:
            seconds = pace(args[0]) if getattr(func, "__name__", "") == "run" else 0.0
            process.call_s = lambda work: seconds
        return super().run_in_executor(executor, func, *args)


class PacedWorld(worlds.World):
    """Workers with paces, by name."""

    def __init__(self, scenario: Scenario, paces: Mapping[str, Pace]) -> None:
        self._paces = paces
        with mock.patch.object(worlds, "VirtualLoop", PacedLoop):
            super().__init__(scenario)

    def _worker(self, name: str, stage: int, forward_s: float) -> Actor:
        actor = super()._worker(name, stage, forward_s)
        run = actor.run

        async def paced(actor: Actor) -> None:
            PROCESS.get().pace = self._paces[name]  # type: ignore[attr-defined]
            await run(actor)

        actor.run = paced
        return actor

    def begin(self, begin_s: float, absent: Sequence[Actor] = ()) -> None:
        """Start all actors but the `absent`; the job comes after `begin_s`, when every worker has been seen."""
        for actor in (*self.actors["worker"], *self.actors["coordinator"]):
            if actor not in absent:
                self.start_later(actor, 0.1)
        self.start_later(self.actors["producer"][0], begin_s)
        self._tick()

    async def end(self) -> None:
        """In order, or what is left complains when it is collected."""
        await self._until(lambda: self.actors["producer"][0].retired, 3600.0, "the job is not done")
        actors = [*self.actors["coordinator"], *self.actors["worker"]]
        for actor in actors:
            actor.retired = True
            actor.stop.set()
        await self._until(lambda: not any(actor.lives for actor in actors), worlds.DRAIN_PATIENCE_S, "no end")


def quiet(
    workers: Sequence[Sequence[float]],
    prompts: Sequence[Prompt],
    *,
    begin_s: float,
    latency_s: float,
    budget_tokens: int,
    rows: int,
    microbatch_rows: int,
    step_tokens: int,
    probe_s: float,
    drain_s: float,
) -> Scenario:
    """One job and one coordinator; nothing goes wrong."""
    return Scenario(
        seed=1,
        workers=workers,
        coordinators=1,
        jobs=[Job(prompts, begin_s, len(prompts), None)],
        weather=Weather(latency_s=latency_s),
        faults=[],
        healed_s=0.0,
        budget_tokens=budget_tokens,
        rows=rows,
        microbatch_rows=microbatch_rows,
        step_tokens=step_tokens,
        open_trips=256,
        checkpoint_s=1000.0,
        lease_s=3000.0,
        probe_s=probe_s,
        step_timeout_s=180.0,
        idle_s=3000.0,
        drain_s=drain_s,
        codec="raw",
    )


def played(make: Callable[[], World], scene: Callable[[World], Coroutine[Any, Any, T]]) -> T:
    """What the scene shows in the world; the oracle must have nothing to complain of."""
    with _seeded(1):
        world = make()
        _graveyard.append(world)
        with _sessions_told(world), _events_told(world):
            shown = world.loop.run_until_complete(scene(world))
    assert world.oracle.complaints == []
    return shown
