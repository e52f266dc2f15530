"""What `fleet_plan` predicts against what coordinator and workers do, on a virtual clock: no machine's noise is in it.

The actors, their queues and their batching are real; a forward takes what the machine's curve says for its rows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any
from unittest import mock

import pytest

from mqinfer.fleet_costs import Curve, Layer, Load, Machine, Model, Speed, forward_s
from mqinfer.fleet_plan import FleetPlan, plan_fleet
from simulation import world as worlds
from simulation.actor import Actor
from simulation.network import Weather
from simulation.run import _events_told, _graveyard, _seeded, _sessions_told
from simulation.scenario import Job, Prompt, Scenario
from simulation.virtual import PROCESS, VirtualLoop

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: When the coordinator has seen every worker.
BEGIN_S = 20.0
PROMPT_TOKENS = 2
LATENCY_S = 0.0005


class PacedLoop(VirtualLoop):
    """A process with a curve takes for a forward what that says for its rows."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        process = PROCESS.get()
        curve = getattr(process, "curve", None)
        if curve is not None and getattr(func, "__name__", "") == "run":
            rows = sum(len(step.rows) for step in args[0])
            process.call_s = lambda work: curve.at(rows)
        elif curve is not None:
            process.call_s = lambda work: 0.0
        return super().run_in_executor(executor, func, *args)


class PacedWorld(worlds.World):
    """Workers with curves, by name."""

    def __init__(self, scenario: Scenario, curves: Mapping[str, Curve]) -> None:
        self._curves = curves
        with mock.patch.object(worlds, "VirtualLoop", PacedLoop):
            super().__init__(scenario)

    def _worker(self, name: str, stage: int, forward_s: float) -> Actor:
        actor = super()._worker(name, stage, forward_s)
        run = actor.run

        async def paced(actor: Actor) -> None:
            PROCESS.get().curve = self._curves[name]  # type: ignore[attr-defined]
            await run(actor)

        actor.run = paced
        return actor

    async def steady_rate(self) -> float:
        """Tokens per virtual second between the first and the last fifth of the rows: nothing fills up or runs dry."""
        for actor in (*self.actors["worker"], *self.actors["coordinator"]):
            self.start_later(actor, 0.1)
        self.start_later(self.actors["producer"][0], BEGIN_S)
        self._tick()
        lengths = [prompt.max_tokens for prompt in self.scenario.jobs[0].prompts]
        first, last = len(lengths) // 5, len(lengths) * 4 // 5
        times_s = []
        for rows in (first, last):
            await self._until(lambda rows=rows: len(self.disks[0].rows) >= rows, 3600.0, "the rows do not come")
            times_s.append((self.loop.time(), self._tokens()))
        await self._end()
        (begun_s, before), (ended_s, after) = times_s
        return (after - before) / (ended_s - begun_s)

    async def _end(self) -> None:
        """In order, or what is left complains when it is collected."""
        await self._until(lambda: self.actors["producer"][0].retired, 3600.0, "the job is not done")
        actors = [*self.actors["coordinator"], *self.actors["worker"]]
        for actor in actors:
            actor.retired = True
            actor.stop.set()
        await self._until(lambda: not any(actor.lives for actor in actors), worlds.DRAIN_PATIENCE_S, "no end")

    def _tokens(self) -> int:
        """Of all rows that are done."""
        rows = (json.loads(row) for row in self.disks[0].rows)
        return sum(len(row["response"]["body"]["choices"][0]["text"]) for row in rows)


def scenario(workers: Sequence[Sequence[float]], load: Load) -> Scenario:
    """One job of many times the rows that are to be in flight, unlike ones; nothing goes wrong."""
    rng = Random(1)
    prompts = [Prompt(PROMPT_TOKENS, rng.randint(10, 30)) for _ in range(6 * load.concurrency)]
    return Scenario(
        seed=1,
        workers=workers,
        coordinators=1,
        jobs=[Job(prompts, BEGIN_S, len(prompts), None)],
        weather=Weather(latency_s=LATENCY_S),
        faults=[],
        healed_s=0.0,
        budget_tokens=10**6,
        rows=load.concurrency,
        microbatch_rows=load.microbatch_rows,
        step_tokens=1024,
        open_trips=256,
        checkpoint_s=1000.0,
        lease_s=3000.0,
        probe_s=1000.0,
        step_timeout_s=180.0,
        idle_s=3000.0,
        drain_s=1.0,
        codec="raw",
    )


def machine(rng: Random, name: str, count: int, fixed: float, head_layers: int) -> Machine:
    layer_s = rng.choice((0.01, 0.02, 0.04)) * rng.uniform(0.8, 1.2)
    layer = tuple((rows, layer_s * (fixed + rows / 32)) for rows in (1, 8, 32))
    return Machine(
        name=name,
        count=count,
        memory_bytes=100 * rng.randint(8, 20) + 400,
        speed=Speed(
            forward=Curve(((1, 0.01),)),
            layer=Curve(layer),
            head=Curve(tuple((rows, head_layers * seconds) for rows, seconds in layer)),
            embedding=Curve(((1, 0.0),)),
            layer_prefill_token_s=0.0,
        ),
        hop_s=4 * LATENCY_S,
    )


def fleet(seed: int) -> tuple[Model, Load, list[Machine]]:
    rng = Random(seed)
    shape = Model(
        layers=(Layer(weight_bytes=100),) * 24,
        embedding_bytes=400,
        head_bytes=400,
        kv_layer_token_bytes=0,
        hidden_bytes=0,
    )
    fixed = rng.choice((0.05, 0.3))
    head_layers = 4 if seed % 2 else 24  # then several machines share the last stage
    machines = [machine(rng, f"m{kind}", rng.randint(1, 2), fixed, head_layers) for kind in range(3)]
    return shape, Load(context_tokens=1, prompt_tokens=0, concurrency=32), machines


def measured(shape: Model, load: Load, machines: Sequence[Machine], plan: FleetPlan) -> float:
    """Tokens per second of the plan's fleet."""
    workers, curves = [], {}
    for number, stage in enumerate(plan.stages):
        kinds = [serving.machine for serving in stage.serving for _ in range(serving.count)]
        workers.append([1.0] * len(kinds))
        for at, kind in enumerate(kinds):
            points = (
                (rows, forward_s(shape, load, machines[kind].speed, stage.first, stage.end, rows)) for rows in ROWS
            )
            curves[f"worker {number}.{at}"] = Curve(tuple(points))
    with _seeded(1):
        world = PacedWorld(scenario(workers, load), curves)
        _graveyard.append(world)
        with _sessions_told(world), _events_told(world):
            rate = world.loop.run_until_complete(world.steady_rate())
    assert world.oracle.complaints == []
    return rate


@pytest.mark.parametrize("seed", [1, 2, 4, 5, 6, 8, 10])  # in 4, 6, 8 and 10 machines share a stage
def test_the_predicted_rate_is_within_15_percent_of_what_the_actors_do(seed: int) -> None:
    shape, load, machines = fleet(seed)
    plan = plan_fleet(shape, load, machines)
    assert isinstance(plan, FleetPlan)
    rate = measured(shape, load, machines, plan)
    assert rate == pytest.approx(plan.tokens_per_s, rel=0.15)
