"""A fleet of processes that are not `mqinfer`'s own commands, and the producer that gives it work."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from local_fleet import ROOT, Fleet, end

from benchmarks.side import Side, side

#: Of every process, beside what a case sets.
ENVIRONMENT: Mapping[str, str] = {"PYTHONPATH": str(ROOT / "scripts"), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Running:
    """A fleet that takes jobs."""

    producer: Side
    #: Of each process, by its name.
    pids: Mapping[str, int]


@contextmanager
def running(
    fleet: Fleet, commands: Mapping[str, Sequence[str]], plan: Path, url: str, workers: Sequence[int]
) -> Iterator[Running]:
    """Start the commands; ready when a coordinator and so many workers of each stage answer; end them in order.

    `commands`: by the names of their logs; each is given the plan and the broker's URL. Raises: FleetBroken.
    """
    at = ("--pipeline", str(plan), "--broker", url)
    try:
        for name, command in commands.items():
            fleet.start(name, *command, *at)
        with side("ours_side", str(plan), "--broker", url, environment={}, meanwhile=fleet.check) as producer:
            producer.ask(op="wait-for", workers=list(workers))
            yield Running(producer, {name: process.pid for name, process in fleet.members.items()})
    finally:
        for process in fleet.members.values():  # one after another: workers should not replay what is over
            end([process], signal.SIGTERM)
