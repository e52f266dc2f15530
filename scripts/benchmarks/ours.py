"""mqinfer's own contenders, as a user runs them: the pipeline in one process, and fleets over a private RabbitMQ.

Jobs go the way of `mqinfer batch` (`ours_side`); a run is timed from the job's beginning to its last row on disk, with
everything started and connected before.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo_model import FOLDER
from local_fleet import MQINFER, Fleet

from benchmarks.measure import Contender
from benchmarks.rabbit import Rabbit
from benchmarks.shared import Shared
from benchmarks.side import Side, SideFailed, side
from benchmarks.workload import WARM_ROWS, WARM_TOKENS, Agreement, Row, Workload


@dataclass(frozen=True, slots=True)
class Layout:
    """A pipeline's processes."""

    name: str
    stages: int
    #: The stage of each worker; none: all stages in the producer's own process, over memory://.
    workers: tuple[int, ...] = ()
    #: Of each worker, or of each stage.
    threads: int = 1
    #: Where it is cut; nowhere named: into stages of equal cost when rows decode.
    cuts: tuple[int, ...] = ()
    #: Further options of each worker.
    options: tuple[str, ...] = ()
    #: Further environment of all processes.
    environment: Mapping[str, str] = field(default_factory=dict)


ONE_PROCESS = Layout("mqinfer, one process, 2 threads", 1, threads=2)
ONE_PROCESS_2_STAGES = Layout("mqinfer, one process, 2 stages × 1 thread", 2)
TWO_WORKERS = Layout("mqinfer over RabbitMQ, 1 stage × 2 workers", 1, (0, 0))
TWO_STAGES = Layout("mqinfer over RabbitMQ, 2 stages", 2, (0, 1))
THREE_STAGES = Layout("mqinfer over RabbitMQ, 3 stages", 3, (0, 1, 2))
TWO_BY_TWO = Layout("mqinfer over RabbitMQ, 2 stages × 2 workers", 2, (0, 0, 1, 1))
#: For one row only one stage computes at a time: it may as well have both cores.
ONE_WORKER_2_THREADS = Layout("mqinfer over RabbitMQ, 1 worker, 2 threads", 1, (0,), threads=2)
TWO_STAGES_2_THREADS = Layout("mqinfer over RabbitMQ, 2 stages × 2 threads", 2, (0, 1), threads=2)
#: Of a prompt only the last position goes through the head: for prompts alone, layers are all that there is to share.
TWO_HALVES = Layout("mqinfer over RabbitMQ, 2 stages of 15 layers", 2, (0, 1), cuts=(15,))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A layout that runs."""

    side: Side
    #: Where its logs are: NAME.log of each process of a fleet.
    folder: Path
    #: None where all is in the side's process.
    fleet: Fleet | None

    def run(
        self, jobs: Sequence[Sequence[Row]], *, op: str = "run", after_s: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """All jobs, at once or each `after_s` after the start; the answer of `ours_side.Jobs.run`."""
        delays_s = after_s or [0.0] * len(jobs)
        asked = [{"rows": as_lines(rows), "after_s": delay} for rows, delay in zip(jobs, delays_s, strict=True)]
        return self.side.ask(op=op, jobs=asked)

    def pid(self, name: str) -> int:
        """Of a process of the fleet."""
        return self.fleet.members[name].pid if self.fleet else self.side.pid

    def logs(self, stage: int, layout: Layout) -> list[Path]:
        """Of the processes that serve the stage."""
        if self.fleet is None:
            return [self.side.log]
        return [self.folder / f"worker-{number}.log" for number, at in enumerate(layout.workers) if at == stage]


class Mqinfer:
    """Its contenders for one dtype; those of the same layout share its processes, all fleets share a broker."""

    def __init__(self, dtype: str, agreement: Agreement) -> None:
        self._dtype = dtype
        self._agreement = agreement
        self._rabbit = Rabbit()
        self._pipelines: dict[str, Shared[Pipeline]] = {}

    def shared(self, layout: Layout) -> Shared[Pipeline]:
        """The layout's processes."""
        made = Shared(lambda: pipeline(layout, self._dtype, self._rabbit))
        return self._pipelines.setdefault(layout.name, made)

    def contender(self, layout: Layout, work: Workload, name: str = "") -> Contender:
        """The layout does the work; called `name` where more than one piece of work is compared."""
        who = name or layout.name

        def run(running: Pipeline) -> float:
            answer = running.run(work.jobs)
            outputs = [output for job in answer["outputs"] for output in job]
            return self._agreement.rate(work, outputs, answer["seconds"], who, ours=True)

        @contextmanager
        def ready() -> Iterator[Callable[[], float]]:
            with self.shared(layout).held() as running:
                running.run(work.beginning(WARM_ROWS, WARM_TOKENS).jobs)
                yield lambda: run(running)

        return Contender(who, ready)


@contextmanager
def pipeline(layout: Layout, dtype: str, rabbit: Rabbit) -> Iterator[Pipeline]:
    """The layout's processes, ready. Raises: Unavailable where there is no RabbitMQ; FleetBroken, SideFailed."""
    with tempfile.TemporaryDirectory(prefix="mqinfer-bench-") as name:
        folder = Path(name)
        plan = make_plan(folder, layout.stages, dtype, layout.cuts)
        environment = {"OMP_NUM_THREADS": str(layout.threads), **layout.environment}
        if not layout.workers:
            threads = ("--threads", str(layout.threads))
            with side("ours_side", str(plan), *threads, environment=environment) as process:
                yield Pipeline(process, folder, None)
            return
        fleet = Fleet(folder, environment)
        with rabbit.running() as broker, serving(fleet, broker.url, plan, layout) as process:
            counts = Counter(layout.workers)
            process.ask(op="wait-for", workers=[counts[stage] for stage in range(layout.stages)])
            yield Pipeline(process, folder, fleet)


@contextmanager
def serving(fleet: Fleet, url: str, plan: Path, layout: Layout) -> Iterator[Side]:
    """The fleet's actors are starting; the side is their producer."""
    options = ("--threads", str(layout.threads), *layout.options)
    with (
        fleet.actors(url, str(plan), layout.workers, *options),
        side("ours_side", str(plan), "--broker", url, environment=layout.environment, meanwhile=fleet.check) as process,
    ):
        yield process


def make_plan(folder: Path, stages: int, dtype: str, cuts: Sequence[int] = ()) -> Path:
    """The file of a plan of the demo model, by `mqinfer plan`; where no `cuts` are given, in stages of equal cost."""
    path = folder / "pipeline.toml"
    cut = ["--cut", ",".join(map(str, cuts))] if cuts else ["--stages", str(stages)]
    options = [*cut, "--dtype", dtype, "--name", folder.name.lower().strip("_-"), "-o", str(path)]
    made = subprocess.run([MQINFER, "plan", str(FOLDER), *options], capture_output=True, text=True, check=False)
    if made.returncode:
        raise SideFailed(f"the plan could not be made: {made.stderr}")
    return path


def as_lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As `ours_side` takes them: lines of a batch file, but for their ids."""
    return [{"prompt": row.prompt, "max_tokens": row.output_tokens} for row in rows]
