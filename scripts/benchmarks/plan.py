"""What `mqinfer plan --fleet` predicts against what happens: fleets of unlike machines that sleep as long as they say.

Coordinator, workers and RabbitMQ are real, and so is every hop; a forward takes what the machine's curve says for its
layers and rows. All processes share this machine, so the sleeps are long beside what they cost.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from local_fleet import MQINFER, Fleet

from benchmarks.custom_fleet import ENVIRONMENT, Running, running
from benchmarks.measure import SMALL, Case, Contender, Goal, Notes
from benchmarks.ours import make_plan
from benchmarks.rabbit import Rabbit
from benchmarks.side import Side
from benchmarks.workload import WrongWork
from mqinfer.fleet_costs import Curve, Layer, Load, Machine, Model, Speed, forward_s
from mqinfer.fleet_plan import FleetPlan, Shortage, plan_fleet

#: As of the demo model; bytes are made up so that some machines hold a third of it.
LAYERS, LAYER_BYTES, END_BYTES = 30, 100, 400
#: Where curves of the sleeping stages have points.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
#: About how long a round takes.
RUN_S = 2.0 if SMALL else 30.0
WARM_S = 2.0
PROMPT_TOKENS = 8
#: A job has so many times the rows that are in flight.
TURNS = 4
#: What is asked of measured against predicted.
WITHIN = 0.15


@dataclass(frozen=True, slots=True)
class Park:
    """Machines to plan for."""

    name: str
    machines: tuple[Machine, ...]
    concurrency: int

    @property
    def load(self) -> Load:
        """Prompts are too short to count."""
        return Load(context_tokens=1, prompt_tokens=0, concurrency=self.concurrency)


def _machine(name: str, count: int, layer_s: float, layers: int, fixed: float, head_layers: int) -> Machine:
    """Holds so many layers. One takes `layer_s` for 32 rows and `fixed` of that anyway, the head as much as several."""
    layer = tuple((rows, layer_s * (fixed + rows / 32)) for rows in (1, 8, 32))
    return Machine(
        name=name,
        count=count,
        memory_bytes=LAYER_BYTES * layers + END_BYTES,
        speed=Speed(
            forward=Curve(((1, 0.01),)),
            layer=Curve(layer),
            head=Curve(tuple((rows, head_layers * seconds) for rows, seconds in layer)),
            embedding=Curve(((1, 0.0),)),
            layer_prefill_token_s=0.0,
        ),
        hop_s=0.004,
    )


PARKS = (
    Park(
        "3 unlike machines, a stage each at most",
        tuple(_machine(*kind, 20, 0.5, 4) for kind in (("fast", 1, 0.01), ("middle", 1, 0.02), ("slow", 1, 0.03))),
        48,
    ),
    Park(
        "6 unlike machines, several at the head",
        tuple(_machine(*kind, 20, 0.05, 25) for kind in (("fast", 1, 0.02), ("middle", 2, 0.04), ("slow", 3, 0.08))),
        128,
    ),
)


def cases(name: str) -> list[Case]:  # noqa: ARG001
    """One."""
    rabbit, notes = Rabbit(), Notes()
    contenders, goals = [], []
    for park in PARKS:
        predicted, measured = f"predicted: {park.name}", f"measured: {park.name}"
        plan = planned(park)
        notes.put(park.name, described(park, plan))
        contenders += [
            Contender(predicted, partial(_ready_prediction, plan)),
            Contender(measured, partial(_ready, rabbit, park, plan)),
        ]
        goals += [
            Goal(measured, predicted, 1 - WITHIN),
            Goal(measured, predicted, 1 + WITHIN, at_most=True),
        ]
    work = (
        "Planned by `mqinfer plan`'s search for machines with made-up speeds; then a real coordinator, RabbitMQ and "
        "workers that sleep as long as their machine would compute. Only decode."
    )
    return [Case("plan", work, "tokens/s", contenders, goals, warmups=0, notes=notes)]


def model() -> Model:
    """What is planned for."""
    return Model(
        layers=(Layer(weight_bytes=LAYER_BYTES),) * LAYERS,
        embedding_bytes=END_BYTES,
        head_bytes=END_BYTES,
        kv_layer_token_bytes=0,
        hidden_bytes=0,
    )


def planned(park: Park) -> FleetPlan:
    """Raises: WrongWork where the machines can't hold it."""
    found = plan_fleet(model(), park.load, park.machines)
    if isinstance(found, Shortage):
        raise WrongWork(f"{park.name}: short by {found.short_bytes} bytes")
    return found


def described(park: Park, plan: FleetPlan) -> str:
    """The assignment in a line."""
    stages = (
        f"[{stage.first}, {stage.end}) "
        + " + ".join(f"{serving.count} × {park.machines[serving.machine].name}" for serving in stage.serving)
        for stage in plan.stages
    )
    return "; ".join(stages) + f"; {plan.flight.rows:.0f} rows in a forward"


@contextmanager
def _ready_prediction(plan: FleetPlan) -> Iterator[Callable[[], float]]:
    yield lambda: plan.tokens_per_s


@contextmanager
def _ready(rabbit: Rabbit, park: Park, plan: FleetPlan) -> Iterator[Callable[[], float]]:
    with (
        rabbit.running() as broker,
        tempfile.TemporaryDirectory(prefix="mqinfer-bench-") as name,
        _fleet(Path(name), broker.url, park, plan) as fleet,
    ):
        _job(fleet.producer, park, plan, WARM_S)
        yield lambda: _job(fleet.producer, park, plan, RUN_S)


@contextmanager
def _fleet(folder: Path, url: str, park: Park, plan: FleetPlan) -> Iterator[Running]:
    path = make_plan(folder, len(plan.stages), "bfloat16", [stage.first for stage in plan.stages[1:]])
    workers = [
        (number, _curve(park.machines[serving.machine], park.load, stage.first, stage.end))
        for number, stage in enumerate(plan.stages)
        for serving in stage.serving
        for _ in range(serving.count)
    ]
    stages = ",".join(str(number) for number, _ in workers)
    curves = json.dumps([curve for _, curve in workers])
    sleeping = ("-m", "benchmarks.sleeping_stage", "--stages", stages, "--curves", curves)
    commands = {"coordinator": [MQINFER, "coordinator"], "all workers": [sys.executable, *sleeping]}
    fleet = Fleet(folder, {**ENVIRONMENT, "MQINFER_ROWS": str(park.concurrency)})
    with running(fleet, commands, path, url, [stage.workers for stage in plan.stages]) as serving:
        yield serving


def _curve(machine: Machine, load: Load, first: int, end: int) -> Sequence[tuple[int, float]]:
    return [(rows, forward_s(model(), load, machine.speed, first, end, rows)) for rows in ROWS]


def _job(producer: Side, park: Park, plan: FleetPlan, seconds: float) -> float:
    """Tokens per second while nothing fills up or runs dry, of a job that should take so long. Raises: WrongWork."""
    rows = TURNS * park.concurrency
    mean = max(seconds * plan.tokens_per_s / rows, 2)
    rng = Random(1)
    lengths = [max(round(mean * rng.uniform(0.5, 1.5)), 1) for _ in range(rows)]
    prompt = list(range(100, 100 + PROMPT_TOKENS))
    answer = producer.ask(op="run", jobs=[{"rows": [{"prompt": prompt, "max_tokens": tokens} for tokens in lengths]}])
    if [len(output) for output in answer["outputs"][0]] != lengths:
        raise WrongWork(f"{park.name}: not every row has its {mean:.0f} tokens")
    done = sorted(zip(answer["times_s"][0], lengths, strict=True))
    middle = done[rows // 5 : rows * 4 // 5]
    return float(sum(tokens for _, tokens in middle[1:]) / (middle[-1][0] - middle[0][0]))
