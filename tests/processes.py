"""Actors as real processes: started, signalled, looked at through their logs. For SmolLM2 in three stages.

What is done to them and what must hold afterwards is the tests'.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mqinfer import checkpoint, plan
from mqinfer.queues import new_id

PATIENCE_S = 180.0
#: How often it is looked whether what a test waits for has come.
LOOK_S = 0.05

#: Several processes share the machine.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MQINFER_THREADS": "1"}


def demo_model() -> Path:
    """Where scripts/setup puts the demo model; without it tests fail in CI and are skipped on a laptop."""
    home = Path(os.environ.get("MQINFER_HOME", Path.home() / ".cache" / "mqinfer"))
    found = home / "models" / "SmolLM2-135M-Instruct"
    if not (found / "config.json").exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the demo model is missing: run scripts/setup")
    return found


@dataclass(slots=True)
class Actor:
    """One process of a fleet."""

    name: str
    #: How it was started, to start it alike again.
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def lives(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """To this process alone, by its pid."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Start it again as it was, when it has ended."""
        self.process.wait(PATIENCE_S)
        self.process = self.start()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code."""
        return self.process.wait(timeout_s)

    def mark(self) -> int:
        """Where its log ends now, for `events`."""
        return self.log.stat().st_size

    def said(self, after: int = 0) -> str:
        """What it logged since a mark."""
        with self.log.open("rb") as file:
            file.seek(after)
            return file.read().decode(errors="replace")

    def events(self, event: str, after: int = 0) -> list[dict[str, Any]]:
        """What it told of `event` since a mark; it must log in JSON."""
        lines = [line for line in self.said(after).splitlines() if line.startswith("{") and event in line]
        found = []
        for line in lines:
            try:
                fields = json.loads(line)
            except ValueError:  # being written
                continue
            if fields.get("event") == event:
                found.append(fields)
        return found


class Fleet:
    """A pipeline's processes; `logs` of all of them are shown when a test fails."""

    def __init__(self, folder: Path, model: Path, url: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.url = url
        self.environment = ENVIRONMENT | dict(environment or {})
        self.pipeline = folder / "pipeline.toml"
        self.plan, _ = checkpoint.make_plan(str(model), stages=3, cuts=None, dtype="float32", name=new_id("smol"))
        plan.write(self.plan, self.pipeline)
        self.actors: list[Actor] = []

    def start(
        self,
        name: str,
        *command: str,
        url: str | None = None,
        program: tuple[str, ...] = ("-m", "mqinfer"),
        environment: Mapping[str, str] | None = None,
    ) -> Actor:
        """Start `mqinfer COMMAND …`, through `url` if that is another way to the broker."""
        log = self.folder / f"{name}.log"
        options = ("--pipeline", str(self.pipeline), "--broker", url or self.url)

        def start() -> subprocess.Popen[bytes]:
            with log.open("ab") as file:
                return subprocess.Popen(
                    [sys.executable, *program, *command, *options],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=os.environ | self.environment | dict(environment or {}),
                    start_new_session=True,  # Ctrl-C in the terminal is ours; we end them in order
                )

        actor = Actor(name, start, start(), log)
        self.actors.append(actor)
        return actor

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a short command to its end."""
        options = ("--pipeline", str(self.pipeline), "--broker", self.url)
        return subprocess.run(
            [sys.executable, "-m", "mqinfer", *command, *options],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | self.environment,
            timeout=PATIENCE_S,
        )

    def logs(self) -> str:
        """The end of every log."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs)

    def end(self) -> None:
        """Kill every process."""
        for actor in self.actors:
            actor.process.kill()
        for actor in self.actors:
            actor.process.wait()


def wait_until(what: Callable[[], bool], fleet: Fleet, timeout_s: float = PATIENCE_S, why: str = "") -> float:
    """Look until it is so; how long it took."""
    began_s = time.monotonic()
    while not what():
        took_s = time.monotonic() - began_s
        assert took_s < timeout_s, f"{why or 'it did not come'} within {timeout_s:g} s\n{fleet.logs()}"
        time.sleep(LOOK_S)
    return time.monotonic() - began_s


def rows(output: Path) -> list[dict[str, Any]]:
    """The whole rows of a results file."""
    raw = output.read_bytes() if output.exists() else b""
    return [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]
