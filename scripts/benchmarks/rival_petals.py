"""The rival Petals 2.2: a swarm of two servers on loopback and a client, in an environment of their own.

MQINFER_PETALS names the python of that environment; docs/performance.md has the commands that make it. Everything of
Petals is in `petals_side`, which runs there; here is what starts it, gives it the work in its best order and checks
the answers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from demo_model import FOLDER, HOME
from local_fleet import LOG_TAIL, spawn

from benchmarks.measure import Contender, Unavailable
from benchmarks.shared import Shared
from benchmarks.side import Side, SideFailed
from benchmarks.workload import WARM_ROWS, WARM_TOKENS, Agreement, Row, Workload, in_order

VARIABLE = "MQINFER_PETALS"
#: Converted checkpoints, and what else Petals keeps.
CACHE = HOME / "petals"

#: Beyond this it counts as stuck: its client could wait for itself for ever (see petals_side.Client). Its longest run
#: took less than a third of this.
PATIENCE_S = 600.0

#: Nothing fetched, nothing of this environment found there.
ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HIVEMIND_LOGLEVEL": "WARNING",
    "PYTHONPATH": "",
    "PYTHONSAFEPATH": "1",  # this folder's profile.py is not the standard library's
    "PYTHONWARNINGS": "ignore",
    "PETALS_CACHE": str(CACHE),
}


def contender(work: Workload, agreement: Agreement, name: str = "Petals", *, batch: int, sessions: int) -> Contender:
    """Does `work` in sessions of up to `batch` rows, the longest first, `sessions` of them at once.

    With one session only one of the two servers ever has work: it then has all cores, otherwise one thread. Several
    jobs: each of its one row in a session of its own, all at once, as users who know nothing of each other have them.
    Prompts that are scored: plain forwards, which Petals cuts and sends at once by itself.
    """
    rows = work.rows
    alone = len(work.jobs) > 1
    if alone and any(len(job) != 1 for job in work.jobs):
        raise ValueError("users of Petals have one row each")
    size, at_once = (1, len(rows)) if alone else (min(batch, len(rows)), sessions)
    threads = len(os.sched_getaffinity(0)) if at_once == 1 else 1
    lengths = [(row.output_tokens, len(row.prompt)) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
    question = partial(_question, scored=work.counted == "prompt", batch=size, sessions=at_once)

    def run(petals: Side) -> float:
        answer = _asked(petals, question([rows[index] for index in order]))
        return agreement.rate(work, in_order(order, answer["outputs"]), answer["seconds"], name)

    @contextmanager
    def ready() -> Iterator[Callable[[], float]]:
        with _swarm(work.dtype, threads).held() as petals:
            _asked(petals, question(work.beginning(WARM_ROWS, WARM_TOKENS).rows))
            yield lambda: run(petals)

    return Contender(name, ready)


def _asked(petals: Side, question: dict[str, Any]) -> dict[str, Any]:
    """The answer. Raises: Unavailable: a rival that breaks is left out."""
    try:
        return petals.ask(PATIENCE_S, **question)
    except SideFailed as error:
        raise Unavailable(str(error)) from error


def _question(rows: Sequence[Row], *, scored: bool, batch: int, sessions: int) -> dict[str, Any]:
    prompts = [row.prompt for row in rows]
    if scored:
        return {"op": "score", "prompts": prompts}
    return {
        "op": "generate",
        "prompts": prompts,
        "output_tokens": [row.output_tokens for row in rows],
        "batch": batch,
        "sessions": sessions,
    }


@cache
def _swarm(dtype: str, threads: int) -> Shared[Side]:
    """One for all contenders of a case that compute in this dtype, with so many threads in each server."""
    return Shared(lambda: _started(dtype, threads))


@contextmanager
def _started(dtype: str, threads: int) -> Iterator[Side]:
    """Raises: Unavailable."""
    command = [python(), str(Path(__file__).with_name("petals_side.py")), "client", str(converted(FOLDER)), dtype]
    with tempfile.TemporaryDirectory(prefix="mqinfer-petals-") as folder:
        log = Path(folder, "petals.log")
        with log.open("wb") as errors:
            running = spawn(
                *command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                environment={"TMPDIR": folder, "OMP_NUM_THREADS": str(threads), **ENVIRONMENT},
            )
        try:
            petals = Side("petals_side", running, log, lambda: _check(running, log))
            _asked(petals, {"op": "start"})
            yield petals
        finally:
            _kill(running)


def _check(running: subprocess.Popen[bytes], log: Path) -> None:
    """What it leaves behind may hold its pipe open: the end of the pipe alone does not tell. Raises: SideFailed."""
    if running.poll() is not None:
        end = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        raise SideFailed("\n".join([f"petals_side ended with {running.returncode}:", *end]))


def _kill(running: subprocess.Popen[bytes]) -> None:
    """The whole group: Petals' own way down takes long and leaves processes behind."""
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def python() -> str:
    """Of Petals' environment. Raises: Unavailable."""
    named = os.environ.get(VARIABLE)
    if not named:
        raise Unavailable(f"{VARIABLE} does not name the python of an environment that has Petals")
    if not shutil.which(named):
        raise Unavailable(f"{VARIABLE}={named} is no program")
    return named


def converted(model: Path) -> Path:
    """The checkpoint with a config that transformers 4.34 reads; the weights are links to the model's own.

    transformers 5 writes the rotary base into `rope_parameters`; 4.34 would take its default of 10,000 without a word.
    Raises: Unavailable where that is not all that is new.
    """
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    rotary = config.pop("rope_parameters", None)
    if rotary:
        if rotary.get("rope_type", "default") != "default":
            raise Unavailable(f"transformers 4.34 has no rotary embeddings of the type {rotary['rope_type']}")
        config |= {"rope_theta": rotary["rope_theta"], "rope_scaling": None}
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    folder = CACHE / model.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for weights in model.glob("*.safetensors*"):
        link = folder / weights.name
        link.unlink(missing_ok=True)
        link.symlink_to(weights.resolve())
    return folder
