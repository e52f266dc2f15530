"""What `fleet_plan` predicts against what coordinator and workers do, on a virtual clock: no machine's noise is in it.

The actors, their queues and their batching are real; a forward takes what the machine's curve says for its rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from random import Random

import pytest

from mqinfer.fleet_costs import Curve, Layer, Load, Machine, Model, Speed, forward_s
from mqinfer.fleet_plan import FleetPlan, plan_fleet
from mqinfer.messages import Step
from simulation.paced import PacedWorld, played, quiet
from simulation.scenario import Prompt, Scenario

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: When the coordinator has seen every worker.
BEGIN_S = 20.0
PROMPT_TOKENS = 2
LATENCY_S = 0.0005


class Steady(PacedWorld):
    """Whose rate is taken while nothing fills up or runs dry."""

    async def steady_rate(self) -> float:
        """Tokens per virtual second between the first and the last fifth of the rows: nothing fills up or runs dry."""
        self.begin(BEGIN_S)
        lengths = [prompt.max_tokens for prompt in self.scenario.jobs[0].prompts]
        first, last = len(lengths) // 5, len(lengths) * 4 // 5
        times_s = []
        for rows in (first, last):
            await self._until(lambda rows=rows: len(self.disks[0].rows) >= rows, 3600.0, "the rows do not come")
            times_s.append((self.loop.time(), self._tokens()))
        await self.end()
        (begun_s, before), (ended_s, after) = times_s
        return (after - before) / (ended_s - begun_s)

    def _tokens(self) -> int:
        """Of all rows that are done."""
        rows = (json.loads(row) for row in self.disks[0].rows)
        return sum(len(row["response"]["body"]["choices"][0]["text"]) for row in rows)


def scenario(workers: Sequence[Sequence[float]], load: Load) -> Scenario:
    """One job of many times the rows that are to be in flight, unlike ones; nothing goes wrong."""
    rng = Random(1)
    prompts = [Prompt(PROMPT_TOKENS, rng.randint(10, 30)) for _ in range(6 * load.concurrency)]
    return quiet(
        workers,
        prompts,
        begin_s=BEGIN_S,
        latency_s=LATENCY_S,
        budget_tokens=10**6,
        rows=load.concurrency,
        microbatch_rows=load.microbatch_rows,
        step_tokens=1024,
        probe_s=1000.0,
        drain_s=1.0,
    )


def by_rows(curve: Curve, steps: Sequence[Step]) -> float:
    return curve.at(sum(len(step.rows) for step in steps))


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
    workers, paces = [], {}
    for number, stage in enumerate(plan.stages):
        kinds = [serving.machine for serving in stage.serving for _ in range(serving.count)]
        workers.append([1.0] * len(kinds))
        for at, kind in enumerate(kinds):
            points = (
                (rows, forward_s(shape, load, machines[kind].speed, stage.first, stage.end, rows)) for rows in ROWS
            )
            paces[f"worker {number}.{at}"] = partial(by_rows, Curve(tuple(points)))
    return played(lambda: Steady(scenario(workers, load), paces), Steady.steady_rate)


@pytest.mark.parametrize("seed", [1, 2, 4, 5, 6, 8, 10])  # in 4, 6, 8 and 10 machines share a stage
def test_the_predicted_rate_is_within_15_percent_of_what_the_actors_do(seed: int) -> None:
    shape, load, machines = fleet(seed)
    plan = plan_fleet(shape, load, machines)
    assert isinstance(plan, FleetPlan)
    rate = measured(shape, load, machines, plan)
    assert rate == pytest.approx(plan.tokens_per_s, rel=0.15)
