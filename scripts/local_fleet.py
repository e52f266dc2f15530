"""A pipeline's processes on this machine: broker, coordinator, workers, each with its log; all end with us.

For scripts/demo and scripts/bench. Nothing of mqinfer is imported here: every process is a command that a person could
type.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
MQINFER = str(Path(sys.executable).with_name("mqinfer"))

#: A worker may take so long to finish what it holds.
STOP_TIMEOUT_S = 60
#: How many lines of each log are shown when something failed.
LOG_TAIL = 15

#: What the user's own environment does not say.
DEFAULTS: Mapping[str, str] = {
    # Big buffers come and go with every step; without the first two each one is made of fresh pages.
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_ARENA_MAX": "2",
    "MQINFER_THREADS": "1",  # the workers share this machine
    "PYTHON": sys.executable,  # what scripts/broker runs with
}

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class FleetBroken(Exception):
    """The fleet could not do the job; the message has the ends of the logs."""


class Fleet:
    """The processes that serve a pipeline, each with its log in `folder`."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: for all of them, beside and before what is there."""
        self.folder = folder
        self.members: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = dict(environment or {})

    @contextmanager
    def broker(self) -> Iterator[str]:
        """A private RabbitMQ; its URL is the first line that scripts/broker says."""
        with (
            self.log("broker") as log,
            process(
                str(ROOT / "scripts" / "broker"), stop=signal.SIGTERM, stdout=subprocess.PIPE, stderr=log
            ) as broker,
        ):
            self.members["the broker"] = broker
            url = (broker.stdout.readline() if broker.stdout else b"").decode().strip()
            if not url:
                raise FleetBroken(self.report("the broker did not start"))
            yield url

    @contextmanager
    def actors(self, url: str, pipeline: str, stages: Sequence[int], *options: str) -> Iterator[None]:
        """One coordinator and a worker with `options` for each of the `stages`, all told to stop at the same time.

        The logs are coordinator.log, worker-0.log and so on.
        """
        commands = {"coordinator": ["coordinator"]}
        for number, stage in enumerate(stages):
            commands[f"worker-{number}"] = ["worker", "--stage", str(stage), *options]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for name, command in commands.items():
                started.append(self.start(name, MQINFER, *command, "--pipeline", pipeline, "--broker", url))
            yield
        finally:
            end(started, signal.SIGTERM)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a process whose log is called `name`; whoever starts it ends it."""
        with self.log(name) as log:
            started = spawn(*command, stdout=log, stderr=log, environment=self._environment)
        self.members[name] = started
        return started

    def wait_for(self, job: subprocess.Popen[bytes]) -> int:
        """The job's exit code. Raises: FleetBroken if a member of the fleet ends first."""
        first = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        if first is not None and first.si_pid != job.pid:
            name = next((name for name, member in self.members.items() if member.pid == first.si_pid), "a process")
            raise FleetBroken(self.report(f"{name} ended early, with {first.si_status}"))
        code = job.wait()
        if code not in (0, 3):
            raise FleetBroken(self.report(f"the batch job ended with {code}"))
        return code

    def check(self) -> None:
        """Raises: FleetBroken if a member of the fleet has ended."""
        for name, member in self.members.items():
            if (code := member.poll()) is not None:
                raise FleetBroken(self.report(f"{name} ended early, with {code}"))

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
    *command: str,
    stdin: int | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: a Ctrl-C of the terminal reaches us alone, and we stop it in order.

    Should we be killed outright, it is told to stop by the kernel (Linux).
    """
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env={**DEFAULTS, **os.environ, **(environment or {})},
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )


def end_with_parent() -> None:
    """Ask the kernel to tell this process to stop when its parent is gone (Linux)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def process(
    *command: str,
    stop: signal.Signals,
    stdin: int | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that gets the signal `stop` if it still runs in the end."""
    started = spawn(*command, stdin=stdin, stdout=stdout, stderr=stderr, environment=environment)
    try:
        yield started
    finally:
        end([started], stop)


def end(processes: Sequence[subprocess.Popen[bytes]], stop: signal.Signals) -> None:
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
