"""Where the time of a decode step goes: one trip around two stages over RabbitMQ, part after part.

The actors run with clocks in them (`profiled_actor`). The parts follow each other and add up to the trip: what is done
beside it, such as waiting for a confirm, is none of them.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo_model import HOME
from local_fleet import Fleet

from benchmarks import workload
from benchmarks.custom_fleet import ENVIRONMENT, Running, running
from benchmarks.measure import SMALL, Case, Contender, Notes, Unavailable
from benchmarks.ours import as_lines, make_plan
from benchmarks.rabbit import Rabbit
from benchmarks.shared import Shared
from benchmarks.workload import Workload
from mqinfer.batching import busy_target

STAGES = 2
ROWS = 2 if SMALL else 32
#: Of each row, in and out.
TOKENS = 32

#: Where flame graphs go.
FOLDER = HOME / "bench"

COORDINATOR = "coordinator"
TRIP = "the whole trip"

#: Parts of a forward as the actor names them -> in the report. What is left of the forward is Python and the rest.
COMPUTED: Mapping[str, str] = {
    "unpack": "unpack",
    "attention": "attention, row by row",
    "kernel": "attention, kernel",
    "gemm": "GEMM",
    "head": "GEMM of the head",
    "sampling": "sampling",
    "pack": "pack",
}
REST = "the rest (norms, rotary, Python)"
#: Not on every stage.
LAST_ONLY = ("head", "sampling")


def cases(name: str) -> list[Case]:  # noqa: ARG001
    """One, whose contenders are the parts of a trip."""
    notes = Notes()
    profile = Profile(notes)
    return [
        Case(
            "profile",
            f"A decode step of SmolLM2 in float32: one trip of a microbatch of {ROWS} rows around {STAGES} stages of a "
            "thread each over RabbitMQ, another microbatch being computed meanwhile. Means over a job's full trips.",
            "ms",
            [Contender(part, profile.part(part)) for part in parts()],
            warmups=0,
            notes=notes,
        )
    ]


def parts() -> list[str]:
    """In the order of a trip."""
    names = [f"{COORDINATOR}: turn", f"{COORDINATOR}: publish"]
    for stage in range(STAGES):
        is_last = stage == STAGES - 1
        computed = [name for part, name in COMPUTED.items() if part != "pack" and (is_last or part not in LAST_ONLY)]
        waits = ["queue wait", *computed, REST, "pack", "publish"]
        names += [f"stage {stage}: {what}" for what in waits]
    return [*names, TRIP]


# -- rounds ------------------------------------------------------------------------------------------


class Profile:
    """Each round is one job; every part looks at the same one."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._fleet = Shared(lambda: profiled(notes))
        self._absent: Unavailable | None = None
        self._rounds: list[Mapping[str, float]] = []

    def part(self, name: str) -> Callable[[], Any]:
        """How that part is made ready."""

        @contextmanager
        def ready() -> Iterator[Callable[[], float]]:
            with self._held() as fleet:
                seen = iter(range(sys.maxsize))
                yield lambda: self._round(fleet, next(seen))[name]

        return ready

    @contextmanager
    def _held(self) -> Iterator[Profiled]:
        """What is missing for one part is missing for all: it is not tried again."""
        if self._absent is not None:
            raise self._absent
        with ExitStack() as stack:
            try:
                fleet = stack.enter_context(self._fleet.held())
            except Unavailable as why:
                self._absent = why
                raise
            yield fleet

    def _round(self, fleet: Profiled, number: int) -> Mapping[str, float]:
        if number == len(self._rounds):
            trips = fleet.trips()
            self._rounds.append({part: 1e3 * statistics.fmean(trip[part] for trip in trips) for part in trips[0]})
            self._notes.put("trips", f"{len(trips)} in the last round")
        return self._rounds[number]


# -- the fleet ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Profiled:
    """A fleet whose actors write down what they do."""

    running: Running
    files: Mapping[str, Path]
    work: Workload

    def trips(self) -> Sequence[Mapping[str, float]]:
        """Of one job: the parts of each trip, in seconds, that had all rows. Raises: RuntimeError where none had."""
        ends = {path: path.stat().st_size for path in self.files.values()}
        self.run()
        events = [event for path, end in ends.items() for event in _events(path, end)]
        found = [trip.parts() for trip in _trips(events) if trip.is_full]
        if not found:
            raise RuntimeError(f"no trip had {ROWS} rows that decode")
        return found

    def run(self) -> None:
        """The job. Raises: WrongWork."""
        answer = self.running.producer.ask(op="run", jobs=[{"rows": as_lines(self.work.rows)}])
        workload.check(self.work, answer["outputs"][0], "profile")


@contextmanager
def profiled(notes: Notes) -> Iterator[Profiled]:
    """Ready; a first job has warmed it up, looked at by py-spy. Raises: Unavailable, FleetBroken."""
    microbatches = busy_target([1] * STAGES)
    settings = {
        "MQINFER_THREADS": "1",
        "MQINFER_ROWS": str(ROWS * microbatches),
        "MQINFER_MICROBATCH_ROWS": str(ROWS),
        "MQINFER_MERGE_TOKENS": str(ROWS),  # one microbatch in each forward
    }
    with tempfile.TemporaryDirectory(prefix="mqinfer-bench-") as name, Rabbit().running() as broker:
        folder = Path(name)
        plan = make_plan(folder, STAGES, "float32")
        actors = {COORDINATOR: [COORDINATOR]}
        actors |= {f"worker-{stage}": ["worker", "--stage", str(stage)] for stage in range(STAGES)}
        files = {actor: folder / f"{actor}.jsonl" for actor in actors}
        program = (sys.executable, "-m", "benchmarks.profiled_actor")
        commands = {actor: [*program, str(files[actor]), *options] for actor, options in actors.items()}
        fleet = Fleet(folder, {**ENVIRONMENT, **settings})
        with running(fleet, commands, plan, broker.url, [1] * STAGES) as serving:
            work = workload.equal(ROWS * microbatches, "float32", TOKENS)
            made = Profiled(serving, files, work)
            with _flames({actor: pid for actor, pid in serving.pids.items() if actor != COORDINATOR}, notes):
                made.run()
            yield made


@contextmanager
def _flames(pids: Mapping[str, int], notes: Notes) -> Iterator[None]:
    """Flame graphs of what these processes do meanwhile, where py-spy is installed."""
    spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if spy is None:
        notes.put("flame graphs", "none, since py-spy is not installed (pip install py-spy)")
        yield
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = {actor: FOLDER / f"flames-{actor}.svg" for actor in pids}
    for file in files.values():
        file.unlink(missing_ok=True)
    spies = [_spy(spy, pid, files[actor]) for actor, pid in pids.items()]
    try:
        yield
    finally:
        said = [_end(one) for one in spies]
    made = [str(file).replace(str(Path.home()), "~", 1) for file in files.values() if file.exists()]
    notes.put("flame graphs", ", ".join(made) if made else f"none: py-spy said {' '.join(said)}")


def _spy(spy: str, pid: int, file: Path) -> subprocess.Popen[bytes]:
    command = [spy, "record", "--output", str(file), "--pid", str(pid)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def _end(spy: subprocess.Popen[bytes]) -> str:
    """It writes its file when it is interrupted; what it said."""
    spy.send_signal(signal.SIGINT)
    try:
        return spy.communicate(timeout=60)[0].decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        spy.kill()
        spy.wait()
        return "nothing"


# -- trips -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Trip:
    """What was written down of one trip; stages are numbers, -1 is the coordinator."""

    received: dict[int, dict[str, Any]] = field(default_factory=dict)
    sent_at_s: dict[int, float] = field(default_factory=dict)
    computed: dict[int, dict[str, Any]] = field(default_factory=dict)
    #: When the microbatch's next trip began.
    next_at_s: float | None = None

    @property
    def is_full(self) -> bool:
        """Whether all of it is known, and ROWS rows decoded by themselves in every stage."""
        everywhere = {*range(STAGES), -1}
        is_whole = self.next_at_s is not None and self.received.keys() == self.sent_at_s.keys() == everywhere
        alike = [(c["rows"], c["tokens"], c["steps"]) for c in self.computed.values()]
        return is_whole and alike == [(ROWS, ROWS, 1)] * STAGES

    def parts(self) -> dict[str, float]:
        """Seconds, by the names of the report."""
        home_s = self.received[-1]["arrived_s"]
        found = {
            f"{COORDINATOR}: turn": (self.next_at_s or home_s) - home_s,
            f"{COORDINATOR}: publish": self.received[0]["arrived_s"] - self.sent_at_s[0],
        }
        for stage in range(STAGES):
            after = stage + 1 if stage + 1 < STAGES else -1
            onward_s = self.received[after]["arrived_s"]
            found |= {f"stage {stage}: {what}": s for what, s in self._stage(stage, onward_s).items()}
        found[TRIP] = sum(found.values())
        return found

    def _stage(self, stage: int, onward_s: float) -> dict[str, float]:
        received, computed = self.received[stage], self.computed[stage]
        spent_s = defaultdict(float, computed["spent_s"])
        forward_s = computed["ended_s"] - computed["began_s"]
        spent_s["attention"] -= spent_s["kernel"]
        rest_s = forward_s - sum(spent_s.values())
        spent_s["unpack"] += received["decoding_s"]
        return {
            "queue wait": computed["began_s"] - received["arrived_s"] - received["decoding_s"],
            **{name: spent_s[part] for part, name in COMPUTED.items()},
            REST: rest_s,
            "publish": onward_s - computed["ended_s"],
        }


def _events(path: Path, after: int) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        file.seek(after)
        return [json.loads(line) for line in file]


def _trips(events: Sequence[dict[str, Any]]) -> list[Trip]:
    trips: defaultdict[tuple[int, int], Trip] = defaultdict(Trip)
    for event in events:
        trip = trips[event["microbatch"], event["number"]]
        match event["what"]:
            case "received":
                trip.received[event["to"]] = event
            case "sent":
                trip.sent_at_s[event["to"]] = event["at_s"]
            case _:
                trip.computed[event["to"]] = event
    for (microbatch, number), trip in trips.items():
        following = trips.get((microbatch, number + 1))
        trip.next_at_s = following.sent_at_s.get(0) if following else None
    return list(trips.values())
