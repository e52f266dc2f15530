"""A pipeline whose workers come and go while a job of `mqinfer batch` runs, and what its actors report meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from local_fleet import MQINFER, Fleet, end

from benchmarks.measure import SMALL
from benchmarks.rabbit import Rabbit, machine_cpu_s, tree_cpu_s
from benchmarks.side import Side, side
from benchmarks.workload import WrongWork
from mqinfer import survey
from mqinfer.plan import Plan, read
from mqinfer.survey import Survey
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

#: How long answers are waited for: a worker reads a question between two forwards.
ANSWER_S = 1.0
#: Surveys in a row that may lack an answer.
SURVEYS = 15
#: A window's length, and how many of them show a rate.
WINDOW_S, WINDOWS = (2.0, 2) if SMALL else (5.0, 3)
#: How long a fleet may take to start or a worker to leave.
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What windows have shown."""

    #: Positions per second of the last stage, window by window.
    rates: Sequence[float]
    #: Share of all cores: that our processes used, and that all used.
    ours: float
    machine: float

    @property
    def rate(self) -> float:
        """The middle one."""
        return median(self.rates)

    def told(self) -> str:
        """For the notes."""
        windows = ", ".join(f"{rate:.0f}" for rate in self.rates)
        return f"windows {windows}; our processes took {self.ours:.0%} of the cores, all together {self.machine:.0%}"


@dataclass(slots=True)
class Live:
    """A pipeline of one coordinator; workers are in `serving` from their start to their end."""

    fleet: Fleet
    plan: Plan
    at: tuple[str, ...]
    link: Transport
    #: See `sleeping_workers`; None: workers compute.
    sleeping: Side | None
    #: Process ids.
    serving: list[int] = field(default_factory=list)

    # -- workers -------------------------------------------------------------------------------

    def start(self, stage: int | None, position_s: Sequence[float] = ()) -> int:
        """A worker's process id; None: it chooses its stage. `position_s`: by stage, where it sleeps."""
        number = len(list(self.fleet.folder.glob("worker-*.log")))
        at = "auto" if stage is None else str(stage)
        arguments = ["--stage", at, "--kv-bytes", "256MiB", "--threads", "1", *self.at]
        log = self.fleet.folder / f"worker-{number}.log"
        if self.sleeping is None:
            pid = self.fleet.start(log.stem, MQINFER, "worker", *arguments).pid
        else:
            answer = self.sleeping.ask(op="start", arguments=arguments, position_s=list(position_s), log=str(log))
            pid = answer["pid"]
        self.serving.append(pid)
        return pid

    async def stop(self, pid: int) -> None:
        """As systemd stops a worker: SIGTERM, and it ends by itself. Raises: WrongWork where it does not end well."""
        self.serving.remove(pid)
        if self.sleeping is None:
            raise NotImplementedError("only sleeping workers are taken away")
        self.sleeping.ask(op="stop", pid=pid)
        async with asyncio.timeout(PATIENCE_S):
            while (code := self.sleeping.ask(op="ended", pid=pid)["code"]) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        if code:
            raise WrongWork(self.fleet.report(f"a worker that was stopped ended with {code}"))

    async def until(self, workers: Sequence[int]) -> None:
        """Returns when a coordinator and so many workers of each stage answer. Raises: WrongWork, FleetBroken."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            seen = await self._take()
            if seen.coordinators() and served(seen) == list(workers):
                return
        raise WrongWork(self.fleet.report(f"workers should be {list(workers)} and are {served(seen)}"))

    # -- what it does --------------------------------------------------------------------------

    async def look(self) -> Survey:
        """What all report. Raises: WrongWork where some don't answer."""
        for _ in range(SURVEYS):
            seen = await self._take()
            if seen.coordinators() and len(seen.in_role("worker")) == len(self.serving):
                return seen
        raise WrongWork(self.fleet.report(f"{len(self.serving)} workers, but they answer so: {served(seen)}"))

    async def _take(self) -> Survey:
        self.fleet.check()
        return await survey.take(self.link, self.plan, wait_s=ANSWER_S)

    def rate(self, then: Survey, now: Survey) -> float:
        """Positions per second of the last stage between both."""
        return now.rates(then, len(self.plan.stages) - 1).tokens_per_s

    async def windows(self, count: int = WINDOWS) -> Seen:
        """So many, one after the other. Raises: WrongWork where the pipeline has not work enough for all of them."""
        began_s, mine, everybody = time.monotonic(), tree_cpu_s(os.getpid()), machine_cpu_s()
        seen = [await self.look()]
        for _ in range(count):
            await asyncio.sleep(WINDOW_S - ANSWER_S)
            seen.append(await self.look())
        core_s = (time.monotonic() - began_s) * len(os.sched_getaffinity(0))
        if not (seen[-1].requests and seen[-1].requests.ready):
            raise WrongWork("the job was too short: nothing waits for the coordinator any more")
        rates = [self.rate(then, now) for then, now in pairwise(seen)]
        return Seen(rates, (tree_cpu_s(os.getpid()) - mine) / core_s, (machine_cpu_s() - everybody) / core_s)

    # -- its job -------------------------------------------------------------------------------

    async def begin(self, rows: Sequence[dict[str, Any]]) -> Job:
        """`mqinfer batch` over these rows; returns when the first are under way."""
        number = len(list(self.fleet.folder.glob("prompts-*")))
        prompts = self.fleet.folder / f"prompts-{number}.jsonl"
        output = prompts.with_name(f"results-{number}.jsonl")
        lines = [{"custom_id": f"row-{index}", "ignore_eos": True, **row} for index, row in enumerate(rows)]
        prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        process = self.fleet.start("batch", MQINFER, "batch", str(prompts), "-o", str(output), *self.at)
        del self.fleet.members["batch"]  # it may end
        while process.poll() is None and not (await self._take()).in_flight():
            pass
        return Job(process, output, [row["max_tokens"] for row in rows])


@dataclass(frozen=True, slots=True)
class Job:
    """A job that runs."""

    process: subprocess.Popen[bytes]
    output: Path
    #: Of each row.
    wanted_tokens: Sequence[int]

    async def ended(self) -> Results:
        """Its results, once it has them all."""
        async with asyncio.timeout(4 * PATIENCE_S):
            while self.process.poll() is None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        if self.process.returncode:
            raise WrongWork(f"the job ended with {self.process.returncode}")
        return read_results(self.output.read_text().splitlines(), self.wanted_tokens)


@dataclass(frozen=True, slots=True)
class Results:
    """What became of a job's rows."""

    #: By the row's number.
    texts: dict[int, str]
    #: Rows without a result, results beyond the first of a row, and results that are errors or of a wrong length.
    lost: int
    repeated: int
    wrong: int


def read_results(lines: Sequence[str], wanted_tokens: Sequence[int]) -> Results:
    """Of the output file of a job whose rows are called row-0 and so on."""
    texts: dict[int, str] = {}
    wrong = 0
    for line in map(json.loads, lines):
        number = int(line["custom_id"].removeprefix("row-"))
        body = (line["response"] or {}).get("body", {})
        wrong += body.get("usage", {}).get("completion_tokens") != wanted_tokens[number]
        texts[number] = body["choices"][0]["text"] if body else ""
    return Results(texts, len(wanted_tokens) - len(texts), len(lines) - len(texts), wrong)


def served(seen: Survey) -> list[int]:
    """Workers of each stage that answered."""
    return [len(seen.workers(stage)) for stage in range(len(seen.stages))]


def counted(seen: Survey, name: str) -> float:
    """Of all coordinators."""
    return sum(report.values.get(name, 0.0) for report in seen.coordinators())


def play(
    scene: Callable[[Live], Coroutine[Any, Any, None]], make: Callable[[Path], Path], *, sleeping: bool, **settings: str
) -> None:
    """The scene, with a broker of its own. `make`: the plan's file in a folder; `settings`: MQINFER_* of all processes.

    Raises: Unavailable, WrongWork, FleetBroken, SideFailed.
    """

    async def played(folder: Path, url: str) -> None:
        async with live(folder, url, make(folder), sleeping=sleeping, **settings) as running:
            await scene(running)

    with Rabbit().running() as broker, tempfile.TemporaryDirectory(prefix="mqinfer-bench-") as name:
        asyncio.run(played(Path(name), broker.url))


def between(then: Survey, now: Survey, name: str) -> float:
    """What the coordinators' counter has grown by."""
    return counted(now, name) - counted(then, name)


@asynccontextmanager
async def live(folder: Path, url: str, plan: Path, *, sleeping: bool, **settings: str) -> AsyncIterator[Live]:
    """A coordinator and no worker yet; what runs in the end is killed."""
    at = ("--pipeline", str(plan), "--broker", url)
    environment = {f"MQINFER_{name.upper()}": value for name, value in settings.items()} | {"OMP_NUM_THREADS": "1"}
    fleet = Fleet(folder, environment)
    with ExitStack() as stack:
        stack.enter_context(_ended(fleet))
        fleet.start("coordinator", MQINFER, "coordinator", *at)
        workers = (
            stack.enter_context(side("sleeping_workers", environment=environment, meanwhile=fleet.check))
            if sleeping
            else None
        )
        if workers is not None:
            workers.ask(op="ready")  # while it imports, for seconds, a link of ours would not be served
        link = await open_transport(url, name="mqinfer bench")
        try:
            yield Live(fleet, read(plan), at, link, workers)
        finally:
            await link.close()


@contextmanager
def _ended(fleet: Fleet) -> Iterator[None]:
    try:
        yield
    finally:
        end(list(fleet.members.values()), signal.SIGKILL)
