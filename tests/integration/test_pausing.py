"""A worker's way out of its device and back, in tasks of the test, over both transports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import time

import pytest
from fakes import FakeEngine, make_plan
from fleet import PATIENCE_S

from mqinfer import paused, survey
from mqinfer.messages import Pause, Report
from mqinfer.paused import BY_GUEST, BY_HAND, BY_HOURS, PausedWorker
from mqinfer.plan import Plan
from mqinfer.queues import Topology, new_id
from mqinfer.settings import WorkerSettings, load
from mqinfer.stage_compute import StageCompute
from mqinfer.stage_worker import StageWorker
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport
from mqinfer.wire import encode

ALWAYS, NEVER = "", "03:00-03:00:01"


@pytest.fixture
def plan() -> Plan:
    return make_plan(new_id("pausing"))


@pytest.fixture
async def link(transport_url: str, plan: Plan) -> AsyncIterator[Transport]:
    link = await open_transport(transport_url)
    yield link
    for spec in Topology(plan.name).shared(len(plan.stages)):
        await link.delete(spec.name)
    await link.close()


@pytest.fixture
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noon, and looked at often."""
    monkeypatch.setattr(paused, "LOOK_S", 0.01)
    monkeypatch.setattr(paused, "is_time", lambda hours: hours.covers(time(12)))


def working(plan: Plan, url: str, hours: str = ALWAYS) -> StageWorker:
    compute = StageCompute(plan, 0, FakeEngine(plan, 0), codec="raw", threads=1)  # type: ignore[arg-type]
    return StageWorker(plan, 0, compute, load(WorkerSettings, hours=hours), lambda: open_transport(url))


def pausing(plan: Plan, url: str, reason: str, hours: str = ALWAYS) -> PausedWorker:
    return PausedWorker(plan, 0, reason, load(WorkerSettings, hours=hours), lambda: open_transport(url))


async def only(link: Transport, plan: Plan, role: str) -> Report:
    """The one actor's report, as soon as it has that role."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = list((await survey.take(link, plan, wait_s=0.1)).reports.values())
            if [report.role for report in found] == [role]:
                return found[0]


async def tell(link: Transport, plan: Plan, report: Report, *, paused: bool) -> None:
    await link.publish(Topology(plan.name).worker(report.id).name, encode(Pause(plan=plan.digest, paused=paused)))


async def test_a_worker_leaves_when_told_waits_and_returns_when_told(
    transport_url: str, plan: Plan, link: Transport
) -> None:
    stop = asyncio.Event()
    worker = working(plan, transport_url)
    works = asyncio.create_task(worker.run(stop))
    await tell(link, plan, await only(link, plan, "worker"), paused=True)
    await asyncio.wait_for(works, PATIENCE_S)
    assert worker.left == BY_HAND
    waits = asyncio.create_task(pausing(plan, transport_url, BY_HAND).run(stop))
    report = await only(link, plan, "paused")
    assert (report.stage, report.facts["reason"]) == (0, BY_HAND)
    await tell(link, plan, report, paused=True)  # once more changes nothing
    assert (await only(link, plan, "paused")).id == report.id
    await tell(link, plan, report, paused=False)
    assert await asyncio.wait_for(waits, PATIENCE_S)
    assert not (await survey.take(link, plan, wait_s=0.1)).reports


async def test_stopped_it_ends_whether_it_works_or_is_paused(transport_url: str, plan: Plan, link: Transport) -> None:
    stop = asyncio.Event()
    worker = working(plan, transport_url)
    works = asyncio.create_task(worker.run(stop))
    await only(link, plan, "worker")
    stop.set()
    await asyncio.wait_for(works, PATIENCE_S)
    assert worker.left == ""
    again = asyncio.Event()
    waits = asyncio.create_task(pausing(plan, transport_url, BY_HAND).run(again))
    await only(link, plan, "paused")
    again.set()
    assert not await asyncio.wait_for(waits, PATIENCE_S)


@pytest.mark.usefixtures("noon")
async def test_hours_that_end_send_it_away_and_hours_that_begin_call_it_back(
    transport_url: str, plan: Plan, link: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, hours = asyncio.Event(), "11:00-13:00"
    worker = working(plan, transport_url, hours)
    works = asyncio.create_task(worker.run(stop))
    await only(link, plan, "worker")
    monkeypatch.setattr(paused, "is_time", lambda hours: hours.covers(time(13)))
    await asyncio.wait_for(works, PATIENCE_S)
    assert worker.left == BY_HOURS
    waits = asyncio.create_task(pausing(plan, transport_url, BY_HOURS, hours).run(stop))
    await only(link, plan, "paused")
    monkeypatch.setattr(paused, "is_time", lambda hours: hours.covers(time(11)))
    assert await asyncio.wait_for(waits, PATIENCE_S)


@pytest.mark.usefixtures("noon")
async def test_called_by_hand_outside_of_its_hours_it_works_and_sent_by_hand_hours_do_not_call_it(
    transport_url: str, plan: Plan, link: Transport
) -> None:
    stop = asyncio.Event()
    works = asyncio.create_task(working(plan, transport_url, NEVER).run(stop, called=True))
    report = await only(link, plan, "worker")
    assert (await only(link, plan, "worker")).id == report.id
    stop.set()
    await asyncio.wait_for(works, PATIENCE_S)
    again = asyncio.Event()
    waits = asyncio.create_task(pausing(plan, transport_url, BY_HAND, "11:00-13:00").run(again))
    await only(link, plan, "paused")
    assert not waits.done()
    again.set()
    assert not await asyncio.wait_for(waits, PATIENCE_S)


async def test_it_makes_way_for_who_else_uses_the_device_and_returns_when_alone_for_a_while(
    transport_url: str, plan: Plan, link: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    guests: list[str] = []
    monkeypatch.setattr(paused, "LOOK_S", 0.01)
    monkeypatch.setattr(paused, "ALONE_S", 0.1)
    monkeypatch.setattr(paused, "guests_on", lambda device: lambda: bool(guests))
    stop, settings = asyncio.Event(), load(WorkerSettings, yield_gpu=True)
    compute = StageCompute(plan, 0, FakeEngine(plan, 0), codec="raw", threads=1)  # type: ignore[arg-type]
    worker = StageWorker(plan, 0, compute, settings, lambda: open_transport(transport_url))
    works = asyncio.create_task(worker.run(stop))
    await only(link, plan, "worker")
    guests.append("somebody")
    await asyncio.wait_for(works, PATIENCE_S)
    assert worker.left == BY_GUEST
    again = PausedWorker(plan, 0, BY_GUEST, settings, lambda: open_transport(transport_url))
    waits = asyncio.create_task(again.run(stop))
    await only(link, plan, "paused")
    assert not waits.done()
    guests.clear()
    assert await asyncio.wait_for(waits, PATIENCE_S)


@pytest.mark.usefixtures("noon")
async def test_hours_that_ended_while_it_loaded_send_it_away(transport_url: str, plan: Plan, link: Transport) -> None:
    worker = working(plan, transport_url, NEVER)
    await asyncio.wait_for(worker.run(asyncio.Event()), PATIENCE_S)
    assert worker.left == BY_HOURS


async def test_the_end_goes_before_a_reason_to_pause_and_by_hand_before_all_others(
    transport_url: str, plan: Plan, link: Transport
) -> None:
    leave, stop = paused.Leave(), asyncio.Event()
    async with leave.watching(stop, load(WorkerSettings), called=False):
        leave.pause(paused.TO_MOVE)
        leave.pause(BY_HOURS)
        assert leave.reason == paused.TO_MOVE
        leave.pause(BY_HAND)
        assert leave.reason == BY_HAND
        stop.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert leave.reason == ""
