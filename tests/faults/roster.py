"""The fleet that faults happen to: two coordinators and two workers on each of three stages, and the jobs it serves.

Each actor may go to the broker through a proxy of its own. `heal` makes it whole again after a test.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import workload
from counts import Counts, Report, count, text
from private_broker import PrivateBroker
from processes import PATIENCE_S, Actor, Fleet, rows, wait_until
from proxy import Proxy, ProxyThread
from workload import Question

from mqinfer import survey
from mqinfer.queues import Topology
from mqinfer.survey import Survey
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

#: Small and short, so that what a fault does shows within seconds.
HEARTBEAT_S = 2
SETTINGS = {
    "MQINFER_LOG_JSON": "1",
    "MQINFER_LOG_LEVEL": "debug",
    "MQINFER_HEARTBEAT_S": str(HEARTBEAT_S),
    "MQINFER_ROWS": "24",
    "MQINFER_MICROBATCH_ROWS": "12",
    "MQINFER_CHECKPOINT_S": "1",
    "MQINFER_STEP_TIMEOUT_S": "20",
    "MQINFER_KV_BYTES": "64MiB",
    "MQINFER_DRAIN_S": "3",
}
#: The issue's bounds are for machines on which each process has a core. Here nine of them share two with the tests.
ALLOWANCE = 2.0
#: How long a dead link may go unnoticed, by docs/operations.md.
NOTICED_S = 3 * (HEARTBEAT_S + 1)
#: Until a process has imported torch and read its weights, on a machine that is busy.
START_S = 240.0

STAGES = 3
LAUNCHER = (str(Path(__file__).with_name("sabotage.py")),)


class Job:
    """One `mqinfer batch` and what its file must hold in the end."""

    def __init__(self, fleet: Fleet, actor: Actor, output: Path, asked: Mapping[str, Question]) -> None:
        self.fleet = fleet
        self.actor = actor
        self.output = output
        self.asked = asked

    @property
    def lines(self) -> int:
        """Rows in the file."""
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def reach(self, share: float) -> None:
        """Wait until that share of the lines has its row."""
        wanted = int(len(self.asked) * share)
        wait_until(lambda: self.lines >= wanted or not self.actor.lives, self.fleet, why=f"{wanted} rows")
        assert self.actor.lives, f"it ended too early\n{self.actor.said()[-2000:]}"

    def advance(self, rows: int, *, since: int) -> None:
        """Wait until it has so many rows more than `since`, or has ended."""
        wait_until(lambda: self.lines >= since + rows or not self.actor.lives, self.fleet, why=f"{rows} rows more")

    def flows(self, within_s: float = PATIENCE_S) -> float:
        """Wait for the next row, or the job's end; how long it took."""
        before = self.lines
        return wait_until(lambda: self.lines > before or not self.actor.lives, self.fleet, within_s, "no row came")

    def finish(
        self, answers: Mapping[str, str], report: Report, *, failing: frozenset[str] = frozenset(), code: int = 0
    ) -> Counts:
        """Wait for the end, count, and demand that all is right."""
        assert self.actor.wait(300) == code, self.fleet.logs()
        counts = count(self.output, self.asked, answers, failing)
        report.count(counts)
        assert counts.good, f"{counts}\n{self.fleet.logs()}"
        return counts


class Roster:
    """The fleet's actors by name, and the proxies in front of them."""

    def __init__(self, folder: Path, model: Path, broker: PrivateBroker, settings: Mapping[str, str]) -> None:
        self.broker = broker
        self.fleet = Fleet(folder, model, broker.url, SETTINGS | settings)
        self.plan = self.fleet.plan
        self.topology = Topology(self.plan.name)
        self.proxies = ProxyThread()
        self.through: dict[str, Proxy] = {}
        self.actors: dict[str, Actor] = {}
        self._jobs = 0

    def coordinator(self, name: str, **how: object) -> Actor:
        """Start a coordinator."""
        return self._start(name, ("coordinator",), **how)

    def worker(self, name: str, stage: int, **how: object) -> Actor:
        """Start a worker."""
        return self._start(name, ("worker", "--stage", str(stage)), **how)

    def whole(self) -> None:
        """Start the usual fleet and wait until it serves; one of each kind goes through a proxy."""
        for number in range(2):
            self.coordinator(f"coordinator-{number}", proxied=number == 0)
        for stage in range(STAGES):
            for number in range(2):
                self.worker(f"worker-{stage}-{number}", stage, proxied=(stage, number) == (1, 0))
        self.ready()

    def workers(self, stage: int) -> list[Actor]:
        """The workers of a stage."""
        return [actor for name, actor in self.actors.items() if name.startswith(f"worker-{stage}-")]

    def coordinators(self) -> list[Actor]:
        """All coordinators."""
        return [actor for name, actor in self.actors.items() if name.startswith("coordinator-")]

    def job(self, asked: Mapping[str, Question], folder: Path, **how: object) -> Job:
        """Start `mqinfer batch` on these questions."""
        self._jobs += 1
        prompts, output = folder / f"job{self._jobs}.prompts", folder / f"job{self._jobs}.jsonl"
        workload.write(dict(asked), prompts, ignore_eos=bool(how.pop("ignore_eos", False)))
        return self.run(prompts, output, asked, **how)

    def run(self, prompts: Path, output: Path, asked: Mapping[str, Question], **how: object) -> Job:
        """Start `mqinfer batch` on a file, or go on with it."""
        name = f"batch-{self._jobs}-{len(self.fleet.actors)}"
        actor = self._launch(name, ("batch", str(prompts), "-o", str(output)), **how)
        return Job(self.fleet, actor, output, asked)

    def stranger(self, name: str, pipeline: Path, stage: int) -> Actor:
        """Start a worker of another plan; returns when it listens."""
        ours, self.fleet.pipeline = self.fleet.pipeline, pipeline
        try:
            actor = self._launch(name, ("worker", "--stage", str(stage)))
        finally:
            self.fleet.pipeline = ours
        wait_until(lambda: bool(actor.events("link.opened")), self.fleet, START_S, "it does not serve")
        return actor

    def proxy(self, name: str) -> Proxy:
        """The proxy in front of an actor."""
        return self.through[name]

    def do(self, what: Callable[[], object]) -> None:
        """Do something to a proxy."""
        self.proxies.do(what)

    def survey(self) -> Survey:
        """What every actor and the broker say of themselves."""
        return self.ask(lambda link: survey.take(link, self.plan, wait_s=1.0))

    def ask(self, what: Callable[[Transport], object]) -> object:
        """Do something over a link of our own."""

        async def run() -> object:
            link = await open_transport(self.broker.url, name="tests")
            try:
                return await what(link)  # type: ignore[misc]
            finally:
                await link.close()

        return asyncio.run(run())

    def ready(self, timeout_s: float = START_S) -> None:
        """Wait until every actor answers."""

        def serves() -> bool:
            seen = self.survey()
            return len(seen.coordinators()) == len(self.coordinators()) and all(
                len(seen.workers(stage)) == len(self.workers(stage)) for stage in range(STAGES)
            )

        wait_until(serves, self.fleet, timeout_s, "the fleet is not complete")

    def heal(self) -> None:
        """Everything runs and flows again; no job of an earlier test is left."""
        self.unbreak()
        for actor in self.fleet.actors:
            if actor.name.startswith("batch-") and actor.lives:
                actor.kill()
        self.ready()

    def unbreak(self) -> None:
        """End every fault that lasts, and start what is dead."""
        for proxy in self.through.values():
            self.do(proxy.heal)
        for actor in self.fleet.actors:
            if actor.lives:
                actor.signal(signal.SIGCONT)
        for actor in self.actors.values():
            if not actor.lives:
                actor.restart()

    def replaced(self, names: tuple[str, ...], start: Callable[[], object]) -> None:
        """Take these actors out of the fleet in order, and put others in."""
        for name in names:
            actor = self.actors.pop(name)
            if actor.lives:
                actor.signal(signal.SIGTERM)
                actor.wait()
            self.fleet.actors.remove(actor)
        start()
        self.ready()

    def quiet(self) -> None:
        """Wait until no request is left, in no queue and in nobody's hands."""

        def idle() -> bool:
            seen = self.survey()
            return not seen.in_flight() and seen.requests is not None and not seen.requests.ready

        wait_until(idle, self.fleet, PATIENCE_S, "it does not come to rest")

    def end(self) -> None:
        """Kill all."""
        self.fleet.end()
        self.proxies.close()

    def _start(self, name: str, command: tuple[str, ...], **how: object) -> Actor:
        self.actors[name] = self._launch(name, command, **how)
        return self.actors[name]

    def _launch(
        self,
        name: str,
        command: tuple[str, ...],
        *,
        proxied: bool = False,
        sabotage: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Actor:
        url = None
        if proxied:
            self.through[name] = self.proxies.open(self.broker.url)
            url = self.through[name].url
        program = LAUNCHER if sabotage else ("-m", "mqinfer")
        more = dict(environment or {}) | ({"SABOTAGE": sabotage} if sabotage else {})
        return self.fleet.start(name, *command, url=url, program=program, environment=more)


def fault_free(roster: Roster, asked: dict[str, Question], folder: Path, **how: object) -> dict[str, str]:
    """Run a job on a fleet that nothing happens to."""
    began_s = time.monotonic()
    job = roster.job(asked, folder, **how)
    assert job.actor.wait() == 0, roster.fleet.logs()
    found = {row["custom_id"]: text(row) for row in rows(job.output)}
    assert found.keys() == asked.keys()
    print(f"fault-free: {len(asked)} rows in {time.monotonic() - began_s:.1f} s")
    return found
