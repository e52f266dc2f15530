"""Runs seeds: one in this process, or many in processes that each run some and go."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

from mqinfer import coordinator, observe, queues, stage_worker
from simulation.scenario import draw
from simulation.virtual import Stalled
from simulation.world import World

#: What earlier runs left unfinished; if it were collected, killed processes would run their `finally`.
_graveyard: list[object] = []


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a seed."""

    seed: int
    complaints: Sequence[str]
    counts: Counter[str]
    #: Stands for every message of the run, in order.
    digest: int
    #: Virtual seconds.
    lasted_s: float


def run_seed(seed: int) -> Verdict:
    """Run one scenario to its judgement."""
    with _seeded(seed):
        world = World(draw(seed))
        _graveyard.append(world)
        with _sessions_told(world), _events_told(world):
            try:
                world.loop.run_until_complete(world.live())
            except Stalled:
                world.oracle.complain("nothing will ever happen again")
            except Exception:
                world.oracle.complain(traceback.format_exc())
    oracle = world.oracle
    return Verdict(seed, oracle.complaints, oracle.counts, oracle.digest, world.loop.time())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Ids and jitter are drawn from the seed."""
    ids = Random(f"ids {seed}")
    state = random.getstate()
    random.seed(seed)
    with mock.patch.object(
        queues, "secrets", SimpleNamespace(token_hex=lambda n: f"{ids.getrandbits(8 * n):0{2 * n}x}")
    ):
        yield
    random.setstate(state)


@contextmanager
def _sessions_told(world: World) -> Iterator[None]:
    """Sessions make themselves known, so that what they hold can be looked at."""
    with ExitStack() as stack:
        for module, name in ((coordinator, "CoordinatorSession"), (stage_worker, "WorkerSession")):
            stack.enter_context(mock.patch.object(module, name, _told(getattr(module, name), world)))
        yield


@contextmanager
def _events_told(world: World) -> Iterator[None]:
    def hear(event: str, fields: Mapping[str, Any]) -> None:
        if event == observe.ROW_REPLAYED and fields["detail"] == "no answer in time":
            world.oracle.overdue[world.name_of(fields["request"])] += 1

    remove = observe.add_sink(hear)
    yield
    remove()


def _told(kind: Any, world: World) -> Any:
    def make(*arguments: Any) -> Any:
        session = kind(*arguments)
        world.adopt(session)
        return session

    return make
