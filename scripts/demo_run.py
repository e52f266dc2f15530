"""Runs the demo: every step is a command that a person could type, and the answers are shown in the end.

Nothing of mqinfer is imported here. All processes that it starts are gone when it ends, however it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from demo_model import FOLDER

ROOT = Path(__file__).resolve().parent.parent
MQINFER = str(Path(sys.executable).with_name("mqinfer"))
PROMPTS = ROOT / "examples" / "prompts.jsonl"

STAGES = 3
#: One worker for each stage, and another on the last: besides layers it has the output head and draws the tokens.
WORKERS = (0, 1, 2, 2)
#: A worker may take so long to finish what it holds.
STOP_TIMEOUT_S = 60
#: How many lines of each log are shown when something failed.
LOG_TAIL = 15

ENVIRONMENT = {
    # Big buffers come and go with every step; without these two each one is made of fresh pages.
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MQINFER_THREADS": "1",  # the workers share this machine
    "PYTHON": sys.executable,  # what scripts/broker runs with
}


def main() -> int:
    """Exit code: as `mqinfer batch`; 1 if the fleet broke, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="SmolLM2 in three stages answers a few questions."
    )
    parser.add_argument("--rabbitmq", action="store_true", help="as separate processes over a private RabbitMQ")
    parser.add_argument("-o", "--results", type=Path, default=ROOT / "demo-results.jsonl", help="default: %(default)s")
    options = parser.parse_args()
    for left_over in (options.results, options.results.with_name(options.results.name + ".job")):
        left_over.unlink(missing_ok=True)  # `mqinfer batch` would take it for a job to resume
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        code = over_rabbitmq(options.results) if options.rabbitmq else in_one_process(options.results)
    except KeyboardInterrupt:
        return 130
    except FleetBroken as broken:
        print(broken, file=sys.stderr)
        return 1
    show(PROMPTS, options.results)
    return code


def in_one_process(results: Path) -> int:
    """Coordinator and all stages inside `mqinfer batch`."""
    command = ["batch", str(PROMPTS), "-o", str(results), "--model", str(FOLDER), "--stages", str(STAGES)]
    with process(MQINFER, *command, stop=signal.SIGINT) as job:
        return job.wait()


def over_rabbitmq(results: Path) -> int:
    """A broker, the fleet, and a batch job that knows nothing of either but the broker's address."""
    with tempfile.TemporaryDirectory(prefix="mqinfer-demo-") as folder:
        pipeline = str(Path(folder, "pipeline.toml"))
        plan = ["plan", str(FOLDER), "--stages", str(STAGES), "--name", "demo", "-o", pipeline]
        if subprocess.run([MQINFER, *plan], check=False).returncode:
            raise FleetBroken("the plan could not be made")
        fleet = Fleet(Path(folder))
        with fleet.broker() as url, fleet.actors(url, pipeline):
            batch = ["batch", str(PROMPTS), "-o", str(results), "--pipeline", pipeline, "--broker", url]
            with process(MQINFER, *batch, stop=signal.SIGINT) as job:
                return fleet.wait_for(job)


class FleetBroken(Exception):
    """The fleet could not do the job; the message has the ends of the logs."""


class Fleet:
    """The processes that serve the job, each with its log in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.members: dict[int, str] = {}

    @contextmanager
    def broker(self) -> Iterator[str]:
        """A private RabbitMQ; its URL is the first line that scripts/broker says."""
        with (
            self.log("broker") as log,
            process(
                str(ROOT / "scripts" / "broker"), stop=signal.SIGTERM, stdout=subprocess.PIPE, stderr=log
            ) as broker,
        ):
            self.members[broker.pid] = "the broker"
            url = (broker.stdout.readline() if broker.stdout else b"").decode().strip()
            if not url:
                raise FleetBroken(self.report("the broker did not start"))
            print(f"a private RabbitMQ listens at {url}", flush=True)
            yield url

    @contextmanager
    def actors(self, url: str, pipeline: str) -> Iterator[None]:
        """One coordinator and the workers, all told to stop at the same time."""
        commands = {"coordinator": ["coordinator"]}
        for number, stage in enumerate(WORKERS):
            commands[f"worker-{number}"] = ["worker", "--stage", str(stage)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for name, command in commands.items():
                started.append(self.start(name, *command, "--pipeline", pipeline, "--broker", url))
            print(f"1 coordinator and {len(WORKERS)} workers on stages {WORKERS} are starting", flush=True)
            yield
        finally:
            end(started, signal.SIGTERM)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start an actor."""
        with self.log(name) as log:
            actor = spawn(MQINFER, *command, stdout=log, stderr=log)
        self.members[actor.pid] = name
        return actor

    def wait_for(self, job: subprocess.Popen[bytes]) -> int:
        """The job's exit code. Raises: FleetBroken if a member of the fleet ends first."""
        first = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        if first is not None and first.si_pid != job.pid:
            name = self.members.get(first.si_pid, "a process")
            raise FleetBroken(self.report(f"{name} ended early, with {first.si_status}"))
        code = job.wait()
        if code not in (0, 3):
            raise FleetBroken(self.report(f"the batch job ended with {code}"))
        return code

    def log(self, name: str) -> IO[bytes]:
        """The log of a process, open for writing."""
        return (self.folder / f"{name}.log").open("ab")

    def report(self, what: str) -> str:
        """`what` and the end of every log that has something in it."""
        parts = [what]
        for path in sorted(self.folder.glob("*.log")):
            if lines := path.read_text(errors="replace").splitlines()[-LOG_TAIL:]:
                parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n\n".join(parts)


def spawn(
    *command: str, stdout: IO[bytes] | int | None = None, stderr: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: a Ctrl-C of the terminal reaches us alone, and we stop it in order."""
    environment = {**ENVIRONMENT, **os.environ}
    return subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True)


@contextmanager
def process(
    *command: str, stop: signal.Signals, stdout: IO[bytes] | int | None = None, stderr: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that gets the signal `stop` if it still runs in the end."""
    started = spawn(*command, stdout=stdout, stderr=stderr)
    try:
        yield started
    finally:
        end([started], stop)


def end(processes: list[subprocess.Popen[bytes]], stop: signal.Signals) -> None:
    """Stop all of them, and return when they are gone."""
    for running in processes:
        if running.poll() is None:
            running.send_signal(stop)
    for running in processes:
        try:
            running.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def show(prompts: Path, results: Path) -> None:
    """Print each question with its answer, in the order of the questions."""
    rows = {row["custom_id"]: row for row in read(results)}
    for line in read(prompts):
        question, answer = asked(line), answered(rows.get(line["custom_id"]))
        print(f"\n{indented('  ', question)}\n{indented('      ', answer)}")
    print(f"\nThe results are in {results}")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; none where the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def asked(line: dict[str, Any]) -> str:
    """The question of a batch line, whichever form it has."""
    body = line.get("body", line)
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"] + " ...")


def answered(row: dict[str, Any] | None) -> str:
    """The answer of a result row, or why there is none."""
    if row is None:
        return "(no result)"
    if row["error"]:
        return f"(error: {row['error']['message']})"
    choice = row["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else "... " + choice["text"].strip())


def indented(margin: str, text: str) -> str:
    """`text` wrapped for a terminal, each line after `margin`."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 100) or [""]]
    return textwrap.indent("\n".join(lines), margin)


if __name__ == "__main__":
    sys.exit(main())
