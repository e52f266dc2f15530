"""One private RabbitMQ for all contenders of a case, and what processes have used of the processor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

from private_broker import PrivateBroker, find_server

from benchmarks.measure import Unavailable
from benchmarks.shared import Shared

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Rabbit:
    """A node that starts with the first contender that needs it and ends with the last."""

    def __init__(self) -> None:
        self._node = Shared(_node)

    def running(self) -> AbstractContextManager[PrivateBroker]:
        """The node. Raises: Unavailable where RabbitMQ is not installed; BrokerFailed."""
        return self._node.held()


@contextmanager
def _node() -> Iterator[PrivateBroker]:
    if find_server() is None:
        raise Unavailable("rabbitmq-server and epmd are not installed")
    with closing(PrivateBroker()) as broker:
        broker.start()
        yield broker


def tree_cpu_s(root: int) -> float:
    """Processor seconds that a process and all its living descendants have used, in ticks of 10 ms."""
    used, members = _processes(), {root}
    grown = True
    while grown:
        more = {pid for pid, (parent, _) in used.items() if parent in members} - members
        members |= more
        grown = bool(more)
    return sum(ticks for pid, (_, ticks) in used.items() if pid in members) / _TICKS_PER_S


def machine_cpu_s() -> float:
    """Processor seconds that all of the machine has used, whoever it was."""
    user, nice, system, _idle, _wait, *more = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + sum(more)) / _TICKS_PER_S


def _processes() -> dict[int, tuple[int, int]]:
    """Of every process: its parent, and its ticks in user and in system mode."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        found[int(stat.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    return found
