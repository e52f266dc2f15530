"""Workers that choose their stage, in tasks of the test, over both transports."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from fakes import make_plan
from fleet import PATIENCE_S, Fleet
from test_actors import Job

from mqinfer import joining, survey
from mqinfer.errors import Disconnected
from mqinfer.joining import take_turn, until_better
from mqinfer.plan import Plan
from mqinfer.queues import Topology, new_id
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

COSTS = (1.0, 2.0, 1.0)


@pytest.fixture
def plan() -> Plan:
    return make_plan(new_id("joining"), stages=3)


@pytest.fixture
async def link(transport_url: str, plan: Plan) -> AsyncIterator[Transport]:
    link = await open_transport(transport_url)
    for spec in Topology(plan.name).shared(len(plan.stages)):
        await link.declare(spec)
    yield link
    for spec in Topology(plan.name).shared(len(plan.stages)):
        await link.delete(spec.name)
    await link.close()


async def choose(url: str, plan: Plan, seen: asyncio.Queue[int], go: asyncio.Event) -> None:
    """As `mqinfer worker --stage auto` does until its weights are loaded."""
    link = await open_transport(url)
    async with joining.joining(link, plan, COSTS, range(len(COSTS))) as stage:
        seen.put_nowait(stage)
        await go.wait()
    await link.close()


async def test_workers_that_start_together_do_not_choose_the_same_place_twice_over(
    transport_url: str, plan: Plan, link: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "TURN_S", 0.05)
    seen: asyncio.Queue[int] = asyncio.Queue()
    go = asyncio.Event()
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        for _ in range(8):
            tasks.create_task(choose(transport_url, plan, seen, go))
        chosen = Counter([await seen.get() for _ in range(8)])
        coming = await survey.take(link, plan)
        go.set()
    assert chosen == {0: 2, 1: 4, 2: 2}
    assert [report.role for report in coming.reports.values()] == ["joining"] * 8
    assert not (await survey.take(link, plan, wait_s=0.1)).reports


async def test_who_dies_while_it_chooses_keeps_nobody_from_it(
    transport_url: str, plan: Plan, link: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "TURN_S", 0.05)
    dying = await open_transport(transport_url)
    await take_turn(dying, plan)
    waiting = asyncio.create_task(take_turn(link, plan))
    done, _ = await asyncio.wait({waiting}, timeout=0.3)
    assert not done
    await dying.close()
    await asyncio.wait_for(waiting, PATIENCE_S)


@pytest.fixture
async def busy(
    transport_url: str, plan: Plan, link: Transport, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Fleet]:
    """Stage 1 takes long and has one worker, stage 0 has three."""
    monkeypatch.setattr(joining, "LOOK_S", 0.05)
    fleet = Fleet(transport_url, plan)
    fleet.coordinator()
    for stage, seconds in ((0, 0.0), (0, 0.0), (0, 0.0), (1, 0.05), (2, 0.0)):
        fleet.worker(stage, seconds_per_forward=seconds)
    job = Job(fleet, link)
    await job.ask(300, max_tokens=20)
    await job.gather(30)
    yield fleet
    await fleet.close()


async def test_a_worker_is_told_to_move_where_the_others_wait_and_holds_its_turn(
    transport_url: str, plan: Plan, busy: Fleet, link: Transport
) -> None:
    held = await asyncio.wait_for(
        until_better(lambda: open_transport(transport_url), plan, 0, COSTS, range(3)), PATIENCE_S
    )
    waiting = asyncio.create_task(take_turn(link, plan))
    done, _ = await asyncio.wait({waiting}, timeout=0.3)
    assert not done
    await held.close()
    await asyncio.wait_for(waiting, PATIENCE_S)


@pytest.mark.parametrize(("mine", "possible"), [(1, range(3)), (0, [0, 2])])
async def test_who_is_where_the_others_wait_or_can_go_only_where_they_do_not_stays(
    transport_url: str, plan: Plan, busy: Fleet, mine: int, possible: list[int]
) -> None:
    looking = asyncio.ensure_future(until_better(lambda: open_transport(transport_url), plan, mine, COSTS, possible))
    done, _ = await asyncio.wait({looking}, timeout=5)
    looking.cancel()
    await asyncio.wait({looking})
    assert not done


async def test_a_worker_that_is_stopped_while_it_looks_gives_its_turn_back(
    transport_url: str, plan: Plan, link: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = asyncio.Event()

    async def look_for_ever(*_: object, **__: object) -> None:
        looks.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(joining, "LOOK_S", 0.05)
    monkeypatch.setattr(survey, "take", look_for_ever)
    looking = asyncio.create_task(until_better(lambda: open_transport(transport_url), plan, 0, COSTS, range(3)))
    await asyncio.wait_for(looks.wait(), PATIENCE_S)
    looking.cancel()
    await asyncio.wait({looking})
    await asyncio.wait_for(take_turn(link, plan), PATIENCE_S)


async def test_a_worker_is_stopped_although_its_link_is_lost_at_the_same_moment(
    transport_url: str, plan: Plan, link: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = asyncio.Event()

    async def look_until_the_link_is_lost(*_: object, **__: object) -> None:
        first = not looks.is_set()
        looks.set()
        try:
            await asyncio.Event().wait()
        finally:
            if first:  # as where what was declared can't be deleted any more
                raise Disconnected("the link was lost")

    monkeypatch.setattr(joining, "LOOK_S", 0.05)
    monkeypatch.setattr(survey, "take", look_until_the_link_is_lost)
    looking = asyncio.create_task(until_better(lambda: open_transport(transport_url), plan, 0, COSTS, range(3)))
    await asyncio.wait_for(looks.wait(), PATIENCE_S)
    looking.cancel()
    await asyncio.wait({looking}, timeout=PATIENCE_S)
    assert looking.cancelled()
