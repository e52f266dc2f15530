"""A worker that chooses its stage: where it helps the pipeline most, of those that its device has room for.

Who chooses holds a queue that only one at a time can have, and is seen as `joining` before the next one chooses, so
that workers which start together spread. How a stage is served is not known here; torch may not be imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import fmean

from mqinfer import survey
from mqinfer.errors import Refused, TransportError
from mqinfer.link import Connect, now_s
from mqinfer.messages import Report
from mqinfer.observe import STAGE_CHOSEN, emit
from mqinfer.placement import Served, best_stage, better_stage
from mqinfer.plan import Plan
from mqinfer.presence import Presence
from mqinfer.queues import Topology
from mqinfer.survey import Survey
from mqinfer.transports.base import Transport, cancelling

#: Between two tries to be the one that chooses, at most.
TURN_S = 1.0
#: Nobody needs longer to choose, or to move on: what is refused so long is refused for another reason.
TURNS_S = 600.0
#: A worker in a long forward is waited for so long: without its speed none counts, and the model's costs do instead.
HEARD_S = 10.0
#: How often a worker looks whether another stage needs it more, and how many times in a row it must.
LOOK_S, LOOKS = 20.0, 3


async def take_turn(transport: Transport, plan: Plan) -> None:
    """From here on nobody else chooses, until `end_turn` or the link's end. Raises: Refused after TURNS_S."""
    deadline_s = now_s() + TURNS_S
    while True:
        try:
            await transport.declare(Topology(plan.name).choosing)
            return
        except Refused:  # somebody else's
            if now_s() > deadline_s:
                raise
        await asyncio.sleep(random.uniform(TURN_S / 10, TURN_S))


async def end_turn(transport: Transport, plan: Plan) -> None:
    """The next one may choose."""
    await transport.delete(Topology(plan.name).choosing.name)


@asynccontextmanager
async def joining(
    transport: Transport, plan: Plan, costs: Sequence[float], possible: Collection[int], *, instance: str = ""
) -> AsyncIterator[int]:
    """The stage to serve, of those `possible`, at least one; within, others see us coming.

    `costs`: of each stage, in any unit.
    """
    await take_turn(transport, plan)
    # Nobody tells of an alarm's end.
    while (seen := await survey.take(transport, plan, patience_s=HEARD_S)).blocked:  # noqa: ASYNC110
        await asyncio.sleep(TURN_S)
    stages = served(seen, costs)
    stage = best_stage(stages, possible)
    emit(STAGE_CHOSEN, stage=stage, workers=[each.workers for each in stages])
    presence = Presence(plan, stage, "joining", lambda: {"instance": instance})
    await presence.open(transport)
    await end_turn(transport, plan)
    serving = asyncio.ensure_future(presence.serve(transport))
    try:
        yield stage
    finally:
        serving.cancel()
        await asyncio.wait({serving})


async def until_better(
    connect: Connect, plan: Plan, mine: int, costs: Sequence[float], possible: Collection[int]
) -> Transport:
    """Returns when a worker of stage `mine` had better be elsewhere, with the link that holds its turn to choose.

    Nobody else chooses or moves until that link is closed.
    """
    wanted: list[int] = []
    before = cancelling()
    while True:
        if cancelling() > before:  # a cancellation that met the link's loss came out as the loss alone
            raise asyncio.CancelledError
        await asyncio.sleep(LOOK_S)
        try:
            transport = await connect()
        except TransportError:
            continue
        async with AsyncExitStack() as unless_better:
            unless_better.push_async_callback(transport.close)
            with contextlib.suppress(TransportError):
                await take_turn(transport, plan)
                seen = await survey.take(transport, plan, patience_s=HEARD_S)
                better = better_stage(served(seen, costs), mine, possible) if seen.in_flight() else None
                wanted = [] if better is None else [*wanted[-LOOKS:], better]
                if wanted[-LOOKS:] == [better] * LOOKS:
                    unless_better.pop_all()
                    return transport


def served(seen: Survey, costs: Sequence[float]) -> list[Served]:
    """Who serves each stage or will soon, and how fast they were."""
    coming = [report.stage for report in seen.in_role("joining")]
    return [
        Served(
            workers=seen.consumers(stage) + coming.count(stage),
            cost=cost,
            rows_per_s=_speed(seen.workers(stage)),
        )
        for stage, cost in enumerate(costs)
    ]


def _speed(workers: Sequence[Report]) -> float | None:
    speeds = [
        report.values["rows"] / report.values["busy_s"]
        for report in workers
        if report.values.get("rows") and report.values.get("busy_s")
    ]
    return fmean(speeds) if speeds else None
