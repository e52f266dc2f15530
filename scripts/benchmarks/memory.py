"""The case `memory`: the most that a worker, a coordinator and a producer ever take (VmHWM), each where it is largest.

Every round starts its processes afresh: what is asked for is a peak.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

from demo_model import FOLDER, is_older
from local_fleet import MQINFER, Fleet, end, process

from benchmarks import workload
from benchmarks.measure import SMALL, Case, Contender, Limit
from benchmarks.ours import Layout, as_lines, make_plan, pipeline, serving
from benchmarks.rabbit import Rabbit
from benchmarks.side import side
from benchmarks.workload import Row, WrongWork, check
from mqinfer.batch_files import count_lines

MIB = 2**20
#: What a worker may keep of keys and values.
KV_BYTES = (32 if SMALL else 512) * MIB
#: So much of that must have been in use, or its peak says nothing.
FILLED = 0.8
WAITING_ROWS = 200 if SMALL else 10_000
LINES = 2_000 if SMALL else 1_000_000
#: Of a job that goes on: lines that have no row yet. Those that have one cost the producer more than those.
LINES_LEFT = 200 if SMALL else 20_000

WORKER = "worker of the whole model, float32, its KV budget filled"
COORDINATOR = f"coordinator that holds {WAITING_ROWS:,} rows"
PRODUCER = f"`mqinfer batch` over RabbitMQ that goes on with {LINES:,} lines"
PRODUCER_AFRESH = f"the same job of {LINES:,} lines from its beginning, over memory://"

#: How often a process is looked at until it ends.
LOOK_S = 0.1


def cases(name: str) -> list[Case]:
    """See benchmarks.__main__."""
    rabbit = Rabbit()
    return [
        _case(f"{name} worker", _worker_work(), [_contender(WORKER, rabbit, worker_mib)], _worker_limit_mib()),
        _case(f"{name} coordinator", _COORDINATOR_WORK, [_contender(COORDINATOR, rabbit, coordinator_mib)], 300),
        _case(
            f"{name} producer",
            _PRODUCER_WORK,
            [_contender(PRODUCER, rabbit, producer_mib), Contender(PRODUCER_AFRESH, _afresh)],
            200,
        ),
    ]


def _case(name: str, work: str, contenders: list[Contender], limit_mib: float) -> Case:
    goals = [Limit(contender.name, round(limit_mib), at_most=True) for contender in contenders]
    return Case(name, work, "MiB", contenders, goals, rounds=1, warmups=0)


def _contender(name: str, rabbit: Rabbit, measure: Callable[[Rabbit], float]) -> Contender:
    @contextmanager
    def ready() -> Iterator[Callable[[], float]]:
        with rabbit.running():
            yield lambda: measure(rabbit)

    return Contender(name, ready)


# -- worker ----------------------------------------------------------------------------------------


def _worker_work() -> str:
    return (
        f"A worker with --kv-bytes {KV_BYTES // MIB}MiB prefills and decodes more rows than fit; the limit is 1.15 × "
        f"(the {_weight_bytes() / MIB:.0f} MiB of weights in float32 + that) + 400 MiB of libraries."
    )


def _worker_limit_mib() -> float:
    return 1.15 * (_weight_bytes() + KV_BYTES) / MIB + 400


def _weight_bytes() -> int:
    """In float32, as the plan says; the checkpoint is of bfloat16, if it is not an older one."""
    return (1 if is_older() else 2) * sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))


def worker_mib(rabbit: Rabbit) -> float:
    """Its peak. Raises: WrongWork where the keys and values did not fill their budget."""
    layout = Layout("memory", 1, (0,), threads=2, options=("--kv-bytes", str(KV_BYTES)))
    work = workload.crowd()
    with pipeline(layout, work.dtype, rabbit) as running:
        answer = running.run(work.jobs, op="run-watched")
        check(work, [output for job in answer["outputs"] for output in job], WORKER)
        if answer["kv_used_bytes"] < FILLED * KV_BYTES:
            raise WrongWork(f"keys and values took {answer['kv_used_bytes'] / MIB:.0f} MiB only")
        return _peak_mib(running.pid("worker-0"))


# -- coordinator -----------------------------------------------------------------------------------

_COORDINATOR_WORK = (
    f"A coordinator with MQINFER_ROWS={WAITING_ROWS} takes as many requests of 16 to 200 tokens; no worker is there."
)


def coordinator_mib(rabbit: Rabbit) -> float:
    """Its peak when it holds all requests."""
    with tempfile.TemporaryDirectory(prefix="mqinfer-bench-") as name, rabbit.running() as broker:
        folder = Path(name)
        fleet = Fleet(folder, {"MQINFER_ROWS": str(WAITING_ROWS)})
        plan = make_plan(folder, 2, "float32")
        rows: tuple[Row, ...] = workload.mixed("float32").rows
        with serving(fleet, broker.url, plan, Layout("memory", 2)) as producer:
            producer.ask(op="fill", rows=as_lines(rows), count=WAITING_ROWS)
            peak = _peak_mib(fleet.members["coordinator"].pid)
            fleet.members["coordinator"].kill()  # or it would give all of them back
            return peak


# -- producer --------------------------------------------------------------------------------------

_PRODUCER_WORK = (
    f"A batch file of {LINES:,} lines. What answers is no fleet: it answers at once. The job that goes on finds all "
    f"but {LINES_LEFT:,} rows in its output file: beside the ids of lines that it has read it knows those of the rows."
)


def producer_mib(rabbit: Rabbit) -> float:
    """The peak of the command. Raises: WrongWork where not every line has its row in the end."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mqinfer-bench-")))
        url = stack.enter_context(rabbit.running()).url
        plan, prompts, output = make_plan(folder, 1, "float32"), folder / "prompts.jsonl", folder / "results.jsonl"
        _write_prompts(prompts)
        _write_rows(output, LINES - LINES_LEFT)
        fleet = Fleet(folder)
        options = ("--pipeline", str(plan), "--broker", url)
        python = (sys.executable, "-m", "benchmarks.stand_in", str(plan), "--broker", url)
        stack.callback(end, [fleet.start("stand-in", *python)], signal.SIGTERM)
        with fleet.log("batch") as log:
            command = (MQINFER, "batch", str(prompts), "-o", str(output), *options)
            with process(*command, stop=signal.SIGTERM, stdout=log, stderr=log) as job:
                peak = _peak_until_end(job, fleet)
        if job.returncode or count_lines(output) != LINES:
            raise WrongWork(fleet.report(f"the job ended with {job.returncode}, {count_lines(output)} rows"))
        return peak


@contextmanager
def _afresh() -> Iterator[Callable[[], float]]:
    yield producer_afresh_mib


def producer_afresh_mib() -> float:
    """The peak of a process in which the job and what answers it are together. Raises: WrongWork as above."""
    with tempfile.TemporaryDirectory(prefix="mqinfer-bench-") as name:
        folder = Path(name)
        plan, prompts, output = make_plan(folder, 1, "float32"), folder / "prompts.jsonl", folder / "results.jsonl"
        _write_prompts(prompts)
        with side("stand_in", str(plan), environment={}) as job:
            answered = job.ask(prompts=str(prompts), output=str(output))["answered"]
            if answered != LINES or count_lines(output) != LINES:
                raise WrongWork(f"{answered} rows were answered, {count_lines(output)} written")
            return _peak_mib(job.pid)


def _write_prompts(path: Path) -> None:
    with path.open("w") as file:
        for number, text in enumerate(workload.texts(LINES)):
            file.write(json.dumps({"custom_id": f"line-{number}", "prompt": text, "max_tokens": 16}) + "\n")


def _write_rows(path: Path, count: int) -> None:
    """As far as they are looked at by who goes on."""
    with path.open("w") as file:
        for number in range(count):
            row: dict[str, Any] = {
                "id": f"batch_req_old.{number}",
                "custom_id": f"line-{number}",
                "response": {},
                "error": None,
            }
            file.write(json.dumps(row) + "\n")


# -- processes -------------------------------------------------------------------------------------


def _peak_mib(pid: int) -> float:
    """The most that the process has had in memory."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    if found is None:
        raise WrongWork(f"process {pid} has no memory: it has ended")
    return int(found[1]) / 1024


def _peak_until_end(job: Popen[bytes], fleet: Fleet) -> float:
    peak = 0.0
    while job.poll() is None:
        try:
            peak = _peak_mib(job.pid)
        except (OSError, WrongWork):  # it ends just now
            continue
        fleet.check()
        time.sleep(LOOK_S)
    return peak
