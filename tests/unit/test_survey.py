"""What a survey says of the actors that answered: rates, the stage that the others wait for, what is missing."""

from __future__ import annotations

import asyncio

import pytest
from fakes import make_plan
from fleet import Fleet

from mqinfer import survey
from mqinfer.messages import Ask, Probe, Report
from mqinfer.plan import Plan
from mqinfer.queues import Topology, new_id
from mqinfer.survey import Survey
from mqinfer.transports import open_transport
from mqinfer.transports.base import Blockage, Delivery, QueueState, Transport
from mqinfer.transports.memory import MemoryTransport, open_memory
from mqinfer.wire import decode, encode


def worker(name: str, stage: int, clock_s: float, **values: float) -> Report:
    return Report(role="worker", id=name, host="h", stage=stage, clock_s=clock_s, values=values)


def coordinator(rows: float = 0) -> Report:
    return Report(role="coordinator", id="c", host="h", stage=-1, clock_s=0, values={"rows": rows})


def seen(*reports: Report, stages: int = 2) -> Survey:
    return Survey(None, None, (None,) * stages, {report.id: report for report in reports})


def test_rates_are_differences_over_each_worker_s_own_clock() -> None:
    earlier = seen(worker("a", 0, 100.0, rows=10, tokens=20, busy_s=1), worker("b", 0, 7.0, rows=0, tokens=0, busy_s=0))
    later = seen(worker("a", 0, 102.0, rows=30, tokens=60, busy_s=2), worker("b", 0, 8.0, rows=5, tokens=5, busy_s=1))
    rates = later.rates(earlier, 0)
    assert (rates.workers, rates.rows_per_s, rates.tokens_per_s, rates.busy) == (2, 15.0, 25.0, 0.75)


def test_a_worker_that_answered_once_is_present_and_has_no_rate() -> None:
    rates = seen(worker("a", 0, 1.0, rows=9, kv_used_bytes=5, kv_budget_bytes=10)).rates(seen(), 0)
    assert (rates.workers, rates.rows_per_s, rates.busy) == (1, 0.0, 0.0)
    assert (rates.kv_used_bytes, rates.kv_budget_bytes) == (5, 10)


def test_how_busy_a_stage_is_counts_only_workers_that_answered_twice() -> None:
    later = seen(worker("a", 0, 2.0, busy_s=1), worker("b", 0, 9.0, busy_s=5))
    assert later.rates(seen(worker("a", 0, 0.0, busy_s=0)), 0).busy == 0.5


def test_means_are_over_what_happened_between_the_surveys() -> None:
    before = {"rows": 10, "forwards": 10, "steps": 10, "wait_s": 99.0, "hidden_bytes": 5, "packed_bytes": 5}
    after = {"rows": 50, "forwards": 20, "steps": 30, "wait_s": 101.0, "hidden_bytes": 35, "packed_bytes": 25}
    rates = seen(worker("a", 0, 3.0, **after)).rates(seen(worker("a", 0, 1.0, **before)), 0)
    assert (rates.batch_rows, rates.wait_s, rates.compression) == (4.0, pytest.approx(0.1), 1.5)
    idle = seen(worker("a", 0, 3.0, **after)).rates(seen(worker("a", 0, 1.0, **after)), 0)
    assert (idle.batch_rows, idle.wait_s, idle.compression) == (0.0, 0.0, 0.0)


def test_two_answers_at_one_instant_divide_by_no_zero() -> None:
    report = worker("a", 0, 1.0, rows=9)
    assert seen(report).rates(seen(report), 0).rows_per_s == 0.0


def test_a_stage_without_workers_has_rates_of_zero() -> None:
    assert seen().rates(seen(), 1).workers == 0
    assert seen().rates(seen(), 1).busy == 0.0


def test_the_busiest_stage_binds_while_work_is_under_way() -> None:
    earlier = seen(worker("a", 0, 0.0, busy_s=0), worker("b", 1, 0.0, busy_s=0))
    busy = (worker("a", 0, 10.0, busy_s=2), worker("b", 1, 10.0, busy_s=9))
    assert seen(*busy, coordinator(rows=3)).bound_stage(earlier) == 1
    assert seen(*busy, coordinator(rows=0)).bound_stage(earlier) is None


def test_a_stage_that_nobody_serves_binds_before_the_busiest() -> None:
    later = seen(worker("a", 0, 10.0, busy_s=9), coordinator(rows=3))
    assert later.bound_stage(seen()) == 1


def test_requests_in_flight_are_those_of_all_coordinators() -> None:
    other = Report(role="coordinator", id="d", host="h", stage=-1, clock_s=0, values={"rows": 4})
    assert seen(coordinator(rows=3), other).in_flight() == 7


def test_a_complaint_names_the_first_thing_to_start() -> None:
    assert "start one with `mqinfer coordinator`" in seen(worker("a", 0, 0.0)).complaint()
    assert seen(coordinator(), stages=3).complaint() == "no worker serves stage 0, 1, 2"
    assert seen(coordinator(), worker("a", 0, 0.0), worker("b", 1, 0.0)).complaint() == ""


def test_a_broker_that_takes_nothing_is_the_first_complaint_and_shows_no_loss() -> None:
    blocked = Survey(None, None, (None,), {}, blocked="low on memory")
    assert "memory or disk alarm (low on memory)" in blocked.complaint()
    assert not blocked.holds_nothing()
    assert seen().holds_nothing()
    assert not seen(coordinator(rows=1)).holds_nothing()


def test_how_long_publishers_were_blocked_is_what_the_longest_blocked_one_says() -> None:
    assert seen(worker("a", 0, 1.0, blocked_s=3), worker("b", 0, 1.0, blocked_s=30), coordinator()).blocked_s() == 30
    assert seen().blocked_s() == 0


async def test_where_the_broker_takes_no_question_the_queues_are_seen_all_the_same() -> None:
    transport = open_memory(new_id("test"))
    asked = asyncio.Event()

    async def never(_exchange: str, _body: bytes) -> None:
        asked.set()
        await asyncio.Event().wait()

    transport.broadcast = never  # type: ignore[method-assign]
    transport.blockage = lambda: Blockage("low on disk" if asked.is_set() else "")  # type: ignore[method-assign]
    await transport.declare(Topology("p").requests)
    found = await survey.take(transport, make_plan("p"), wait_s=10)
    assert (found.blocked, found.reports) == ("low on disk", {})
    assert found.requests == QueueState(0, 0)


async def declared(name: str) -> MemoryTransport:
    """A link to a broker that has the queues and exchanges of the pipeline "p"."""
    transport = open_memory(name)
    for spec in Topology("p").shared(2):
        await transport.declare(spec)
    return transport


class Answering:
    """An actor that answers every Ask with these bodies, once it is `free`."""

    def __init__(self, transport: Transport, plan: Plan, *bodies: bytes) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self._transport = transport
        self._spec = Topology(plan.name).worker("w-1")
        self._bodies = bodies

    async def open(self) -> None:
        await self._transport.declare(self._spec)
        await self._transport.consume(self._spec.name, prefetch=0, sink=self._arrived)

    def _arrived(self, delivery: Delivery) -> None:
        self._task = asyncio.ensure_future(self._answer(delivery))

    async def _answer(self, delivery: Delivery) -> None:
        ask = decode(delivery.body)
        assert isinstance(ask, Ask)
        await delivery.ack()
        await self.free.wait()
        for body in self._bodies:
            await self._transport.publish(ask.reply_to, body)


async def test_a_survey_with_nothing_there_is_empty_and_leaves_nothing_behind() -> None:
    plan, name = make_plan("p"), new_id("test")
    transport = open_memory(name)
    found = await survey.take(transport, plan, wait_s=0.01)
    assert (found.requests, found.dead, found.stages, found.reports) == (None, None, (None, None), {})
    assert found.in_flight() == 0
    assert not transport.subscriptions


async def test_a_survey_takes_reports_and_queues_and_no_notice_of_what_is_neither() -> None:
    plan, name, topology = make_plan("p"), new_id("test"), Topology("p")
    transport = await declared(name)
    await transport.publish(topology.stage(1).name, b"x")
    report = worker("a", 0, 1.0)
    probe = encode(Probe(plan=plan.digest))
    await Answering(open_memory(name), plan, b"garbage", probe, encode(report)).open()
    found = await survey.take(transport, plan, wait_s=0.05)
    assert found.reports == {"a": report}
    assert [state.ready for state in found.stages if state] == [0, 1]
    assert not transport.unsettled


async def test_a_worker_that_the_broker_knows_is_waited_for_while_it_is_in_a_forward() -> None:
    plan, name = make_plan("p"), new_id("test")
    transport, worker_link = await declared(name), open_memory(name)
    await worker_link.consume(Topology("p").stage(0).name, prefetch=1, sink=lambda _: None)
    report = worker("a", 0, 1.0)
    in_forward = Answering(worker_link, plan, encode(report))
    in_forward.free.clear()
    await in_forward.open()
    assert not (await survey.take(transport, plan, wait_s=0.01)).reports

    inspect = transport.inspect

    async def ends_while_queues_are_looked_at(queue: str) -> QueueState | None:
        in_forward.free.set()
        return await inspect(queue)

    transport.inspect = ends_while_queues_are_looked_at  # type: ignore[method-assign]
    assert (await survey.take(transport, plan, wait_s=0.01, patience_s=10)).reports == {"a": report}
    assert not transport.subscriptions


async def test_a_worker_that_has_come_after_the_question_is_not_waited_for() -> None:
    plan, name = make_plan("p"), new_id("test")
    transport, late = await declared(name), open_memory(name)
    broadcast = transport.broadcast

    async def comes_behind(exchange: str, body: bytes) -> None:
        await broadcast(exchange, body)
        await late.consume(Topology("p").stage(0).name, prefetch=1, sink=lambda _: None)

    transport.broadcast = comes_behind  # type: ignore[method-assign]
    async with asyncio.timeout(10):
        found = await survey.take(transport, plan, wait_s=0.01, patience_s=600)
    assert found.consumers(0) == 1
    assert not found.reports


# What the scaling advice is made of


def test_a_window_has_what_each_consumer_did_between_its_first_and_last_survey() -> None:
    surveys = [
        seen(worker("a", 0, 100.0, forwards=1, tokens=5), coordinator(rows=4)),
        seen(worker("a", 0, 101.0), coordinator(rows=6)),
        seen(
            worker("a", 0, 110.0, forwards=21, tokens=105, tokens_squared=500), coordinator(rows=8), worker("b", 0, 3)
        ),
    ]
    window = survey.window(surveys)
    (worked,) = window.stages[0].worked
    assert (worked.seconds, worked.forwards, worked.tokens, worked.tokens_squared) == (10.0, 20, 100, 500)
    assert (window.stages[0].consumers, window.stages[1].consumers) == (2, 0)
    assert (window.rows, window.coordinators) == (6, 1)


def test_a_consumer_that_did_not_answer_in_time_is_not_taken_for_gone() -> None:
    full = Survey(None, None, (QueueState(2, 3),), {"a": worker("a", 0, 1.0)})
    window = survey.window([full, full])
    assert (window.stages[0].consumers, window.stages[0].ready) == (3, 2)


def test_the_busiest_coordinator_is_what_a_window_tells_of_them() -> None:
    def reports(clock_s: float, *busy: float) -> list[Report]:
        return [
            Report(
                role="coordinator", id=f"c{n}", host="h", stage=-1, clock_s=clock_s, values={"cpu_s": clock_s * share}
            )
            for n, share in enumerate(busy)
        ]

    assert survey.window([seen(*reports(0, 0.1, 0.9)), seen(*reports(10, 0.1, 0.9))]).coordinator_busy == 0.9


async def test_actors_report_what_the_advice_is_made_of() -> None:
    fleet = Fleet(f"memory://{new_id('test')}", make_plan("p", stages=1))
    fleet.worker(0, instance="0-auto1")
    fleet.coordinator(microbatch_rows=7)
    transport = await open_transport(fleet.url)
    async with asyncio.timeout(10):
        while len((found := await survey.take(transport, fleet.plan, wait_s=0.05)).reports) < 2:
            pass
    assert [report.facts["instance"] for report in found.workers(0)] == ["0-auto1"]
    window = survey.window([found, await survey.take(transport, fleet.plan, wait_s=0.05)])
    assert (window.microbatch_rows, window.stages[0].consumers) == (7, 1)
    assert 0 <= window.coordinator_busy <= 2
    await transport.close()
    await fleet.close()
