"""How far queues and coordinator carry: stages that sleep, more and more of them, over a real RabbitMQ.

All processes share this machine, as they would not in a fleet: the notes say what part of a core each kind takes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from local_fleet import MQINFER, Fleet
from private_broker import PrivateBroker

from benchmarks.custom_fleet import ENVIRONMENT, Running, running
from benchmarks.measure import SMALL, Case, Contender, Notes
from benchmarks.ours import make_plan
from benchmarks.rabbit import Rabbit, tree_cpu_s
from benchmarks.side import Side
from benchmarks.workload import WrongWork
from mqinfer.batching import busy_target

#: How long a stage sleeps over each step of a microbatch of so many rows.
STEP_S = 0.02
ROWS = 16
#: About how long a round takes where nothing but the stages binds.
RUN_S = 1.0 if SMALL else 8.0
#: Long enough for the coordinator to see how many consumers there are.
WARM_S = 2.0
PROMPT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A pipeline whose stages have as many consumers each."""

    stages: int
    consumers: int

    @property
    def name(self) -> str:
        """In the report."""
        return f"{_many(self.stages, 'stage')} × {_many(self.consumers, 'consumer')}"

    @property
    def workers(self) -> tuple[int, ...]:
        """The stage of each."""
        return tuple(stage for stage in range(self.stages) for _ in range(self.consumers))

    @property
    def rows(self) -> int:
        """In flight: a full microbatch for each that the coordinator makes."""
        return ROWS * busy_target([self.consumers] * self.stages)

    @property
    def most_rows_s(self) -> float:
        """Where every consumer always has a full microbatch to sleep over."""
        return ROWS * self.consumers / STEP_S

    def tokens(self, seconds: float) -> int:
        """Of each row, so that the job takes so long at its best."""
        return max(round(seconds * self.most_rows_s / self.rows), 2)


BY_STAGES = tuple(Shape(stages, 1) for stages in ((1, 2) if SMALL else (1, 2, 4, 8, 16)))
BY_CONSUMERS = tuple(Shape(2, consumers) for consumers in ((1, 2) if SMALL else (1, 2, 4, 8)))


def cases(name: str) -> list[Case]:  # noqa: ARG001
    """Two."""
    return [_case("scale stages", BY_STAGES), _case("scale consumers", BY_CONSUMERS)]


def _case(name: str, shapes: tuple[Shape, ...]) -> Case:
    rabbit, notes = Rabbit(), Notes()
    return Case(
        name,
        f"Real coordinator, workers and RabbitMQ, but each stage sleeps {1e3 * STEP_S:.0f} ms over a step of a "
        f"microbatch of {ROWS} rows instead of computing; hidden states have SmolLM2's size in bfloat16, `lossless`.",
        "rows/s",
        [Contender(shape.name, partial(_ready, rabbit, notes, shape)) for shape in shapes],
        warmups=0,
        notes=notes,
    )


@contextmanager
def _ready(rabbit: Rabbit, notes: Notes, shape: Shape) -> Iterator[Callable[[], float]]:
    """Its processes run only while it has its turn: all shapes together are dozens of them."""
    with rabbit.running() as broker:
        yield lambda: _run(broker, notes, shape)


def _run(broker: PrivateBroker, notes: Notes, shape: Shape) -> float:
    with tempfile.TemporaryDirectory(prefix="mqinfer-bench-") as name, _fleet(Path(name), broker, shape) as fleet:
        members = {"broker": broker.pid, **fleet.pids}
        _job(fleet.producer, shape, WARM_S)
        before = {who: tree_cpu_s(pid) for who, pid in members.items()}
        rate, seconds = _job(fleet.producer, shape, RUN_S)
        shares = {who: (tree_cpu_s(pid) - before[who]) / seconds for who, pid in members.items()}
    used = ", ".join(f"{who} {share:.0%}" for who, share in shares.items())
    notes.put(
        shape.name,
        f"{rate / shape.most_rows_s:.0%} of the {shape.most_rows_s:,.0f} rows/s that sleep alone allows, "
        f"{rate / ROWS * (shape.stages + 1):,.0f} hops/s; of one core: {used}",
    )
    return rate


def _job(producer: Side, shape: Shape, seconds: float) -> tuple[float, float]:
    """Rows/s and seconds of a job that should take so long. Raises: WrongWork."""
    tokens = shape.tokens(seconds)
    row = {"prompt": list(range(100, 100 + PROMPT_TOKENS)), "max_tokens": tokens}
    answer = producer.ask(op="run", jobs=[{"rows": [row] * shape.rows}])
    if [len(output) for output in answer["outputs"][0]] != [tokens] * shape.rows:
        raise WrongWork(f"{shape.name}: not every row has {tokens} tokens")
    return shape.rows * tokens / answer["seconds"], answer["seconds"]


@contextmanager
def _fleet(folder: Path, broker: PrivateBroker, shape: Shape) -> Iterator[Running]:
    plan = make_plan(folder, shape.stages, "bfloat16")
    settings = {
        "MQINFER_ROWS": str(shape.rows),
        "MQINFER_MICROBATCH_ROWS": str(ROWS),
        "MQINFER_MERGE_TOKENS": "1",  # one microbatch in each sleep
    }
    stages = ",".join(map(str, shape.workers))
    sleeping = ("-m", "benchmarks.sleeping_stage", "--stages", stages, "--step-s", str(STEP_S))
    commands = {"coordinator": [MQINFER, "coordinator"], "all workers": [sys.executable, *sleeping]}
    fleet = Fleet(folder, {**ENVIRONMENT, **settings})
    with running(fleet, commands, plan, broker.url, [shape.consumers] * shape.stages) as serving:
        yield serving


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
