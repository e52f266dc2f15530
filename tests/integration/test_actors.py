"""Producer, coordinators and workers together, over both transports, with a fake model that shows every mistake."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fakes import continuation
from fleet import PATIENCE_S, Fleet, Job, until

from mqinfer import coordinator, survey
from mqinfer.errors import ComputeError, Refused
from mqinfer.link import first
from mqinfer.messages import MissReason, Request, Row, Step
from mqinfer.queues import Topology, new_id
from mqinfer.transports import open_transport
from mqinfer.transports.base import Delivery
from mqinfer.wire import decode, encode


async def test_every_request_gets_its_one_result(fleet: Fleet, job: Job) -> None:
    for stage in (0, 1, 1):
        fleet.worker(stage)
    fleet.coordinator()
    await job.ask(60)
    await job.gather()
    job.check()
    assert job.repeats == 0


async def test_two_coordinators_and_two_workers_a_stage_share_the_work(fleet: Fleet, job: Job) -> None:
    workers = [fleet.worker(stage) for stage in (0, 0, 1, 1)]
    fleet.coordinator()
    fleet.coordinator()
    await job.ask(150)
    await job.gather()
    job.check()
    assert job.repeats == 0
    assert all(worker.engine is not None and worker.engine.computed for worker in workers)


async def test_all_compute_happens_in_one_thread_that_is_not_the_loops(fleet: Fleet, job: Job) -> None:
    worker = fleet.worker(0)
    fleet.worker(1)
    fleet.coordinator()
    await job.ask(5)
    await job.gather()
    assert worker.engine is not None
    assert len(worker.engine.threads) == 1


async def test_when_all_is_done_every_cache_is_empty_and_every_queue_too(fleet: Fleet, job: Job) -> None:
    workers = [fleet.worker(stage) for stage in (0, 1)]
    coordinator = fleet.coordinator()
    await job.ask(40)
    await job.gather()
    await until(lambda: all(worker.engine is not None and not worker.engine.cached_rows for worker in workers))
    await coordinator.stop()
    for spec in Topology(fleet.plan.name).shared(2):
        state = await job.transport.inspect(spec.name)
        assert state is not None
        assert state.ready == 0


@pytest.mark.parametrize("stage", [0, 1])
async def test_a_killed_worker_takes_nothing_with_it(fleet: Fleet, job: Job, stage: int) -> None:
    doomed = fleet.worker(stage, seconds_per_forward=0.01)
    fleet.worker(1 - stage)
    fleet.coordinator()
    await job.ask(60)
    await job.gather(5)
    await doomed.kill()
    fleet.worker(stage)
    await job.gather()
    job.check()


async def test_a_worker_killed_again_and_again_takes_nothing_with_it(fleet: Fleet, job: Job) -> None:
    fleet.worker(0)
    doomed = fleet.worker(1, seconds_per_forward=0.02)
    fleet.coordinator()
    await job.ask(60, max_tokens=12)
    for results in (3, 10, 20, 30):
        await job.gather(results)
        await doomed.kill()
        doomed = fleet.worker(1, seconds_per_forward=0.02)
    await job.gather()
    job.check()


async def test_a_killed_coordinator_s_requests_are_finished_by_another(fleet: Fleet, job: Job) -> None:
    for stage in (0, 1):
        fleet.worker(stage, seconds_per_forward=0.01)
    doomed = fleet.coordinator()
    await job.ask(60)
    await job.gather(5)
    await doomed.kill()
    fleet.coordinator()
    await job.gather()
    job.check()


async def test_a_coordinator_goes_on_from_the_checkpoint_not_from_the_prompt(fleet: Fleet, job: Job) -> None:
    workers = [fleet.worker(stage, seconds_per_forward=0.02) for stage in (0, 1)]
    doomed = fleet.coordinator(checkpoint_s=0.05, lease_s=0.05)
    await job.ask(1, max_tokens=200)
    engine = workers[1].engine
    assert engine is not None
    await until(lambda: engine.computed > 150)
    await doomed.kill()
    request = await first_request(job, fleet)
    assert len(request.output) > 50
    assert list(request.output) == continuation(fleet.plan, request.prompt, len(request.output))
    fleet.coordinator()
    await job.gather()
    job.check()


async def first_request(job: Job, fleet: Fleet) -> Request:
    """Look at the request that waits, and leave it there."""
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    subscription = await job.transport.consume(
        Topology(fleet.plan.name).requests.name, prefetch=1, sink=arrived.put_nowait
    )
    delivery = await asyncio.wait_for(arrived.get(), PATIENCE_S)
    message = decode(delivery.body)
    await subscription.cancel()
    await delivery.requeue()
    assert isinstance(message, Request)
    return message


async def test_a_drained_worker_finishes_or_gives_back_and_nothing_is_lost(fleet: Fleet, job: Job) -> None:
    leaving = fleet.worker(0, seconds_per_forward=0.005)
    fleet.worker(1)
    fleet.coordinator()
    await job.ask(60)
    await job.gather(5)
    fleet.worker(0)
    await leaving.stop()
    await job.gather()
    job.check()
    assert job.repeats == 0


async def test_a_drained_coordinator_gives_its_requests_back_with_their_tokens(fleet: Fleet, job: Job) -> None:
    for stage in (0, 1):
        fleet.worker(stage, seconds_per_forward=0.005)
    leaving = fleet.coordinator()
    await job.ask(40)
    await job.gather(5)
    await leaving.stop()
    fleet.coordinator()
    await job.gather()
    job.check()
    assert job.repeats == 0


async def test_a_worker_that_joins_a_running_job_gets_its_share(fleet: Fleet, job: Job) -> None:
    for stage in (0, 1):
        fleet.worker(stage, seconds_per_forward=0.01)
    fleet.coordinator(rows=16)
    await job.ask(120)
    await job.gather(10)
    late = fleet.worker(1)
    await job.gather()
    job.check()
    assert late.engine is not None
    assert late.engine.computed > 0


async def test_workers_with_little_room_leave_work_in_the_queue(fleet: Fleet, job: Job) -> None:
    small = [fleet.worker(stage, budget_rows=3) for stage in (0, 1)]
    fleet.coordinator()
    most = 0

    def watch(rows: Sequence[Row]) -> None:
        nonlocal most
        most = max(most, *(worker.engine.cached_rows for worker in small if worker.engine is not None))

    for worker in small:
        assert worker.engine is not None
        worker.engine.before = watch
    await job.ask(40)
    await job.gather()
    job.check()
    assert most <= 3


async def test_a_request_for_another_plan_becomes_a_failure_that_says_so(fleet: Fleet, job: Job) -> None:
    fleet.coordinator()
    job_plan = fleet.plan
    fleet.plan = replace(job_plan, fingerprint="e" * 64)
    await job.ask(1)
    await job.gather()
    (failure,) = job.failures().values()
    assert "plan" in failure.error


async def test_a_worker_of_another_plan_refuses_and_the_row_fails_with_the_reason(
    fleet: Fleet, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqinfer.stage_worker.PLAN_PAUSE_S", 0.1)
    stranger = fleet.worker(0, plan=replace(fleet.plan, fingerprint="e" * 64))
    fleet.worker(1)
    fleet.coordinator()
    await job.ask(1)
    await job.gather()
    (failure,) = job.failures().values()
    assert "plan" in failure.error
    dead = await job.transport.inspect(Topology(fleet.plan.name).dead.name)
    assert dead is not None
    assert dead.ready == 3
    assert stranger.engine is not None
    assert stranger.engine.computed == 0


async def test_a_worker_of_another_plan_does_not_swallow_the_work_of_others(fleet: Fleet, job: Job) -> None:
    fleet.worker(0, plan=replace(fleet.plan, fingerprint="e" * 64))
    fleet.worker(0)
    fleet.worker(1)
    fleet.coordinator()
    await job.ask(60)
    await job.gather()
    job.check()


async def test_a_full_worker_that_is_told_to_stop_stops(fleet: Fleet, job: Job) -> None:
    full = fleet.worker(0, budget_rows=2, drain_s=0.2, seconds_per_forward=0.02)
    last = fleet.worker(1)
    fleet.coordinator()
    await job.ask(20, max_tokens=50)
    await until(lambda: full.engine is not None and full.engine.cached_rows >= 2)
    await last.kill()
    await full.stop()
    for stage in (0, 1):
        fleet.worker(stage)
    await job.gather()
    job.check()


async def test_rows_that_a_leaving_worker_can_not_finish_go_on_elsewhere_without_blame(fleet: Fleet, job: Job) -> None:
    leaving = fleet.worker(0, drain_s=0.1, seconds_per_forward=0.02)
    fleet.worker(1)
    coordinator = fleet.coordinator()
    await job.ask(10, max_tokens=60)
    await until(lambda: leaving.engine is not None and leaving.engine.computed > 150)
    await leaving.stop()
    fleet.worker(0)
    await job.gather()
    job.check()
    assert not coordinator.task.done()


async def test_a_leaving_worker_says_of_a_redelivered_step_that_a_worker_died_with_it(fleet: Fleet, job: Job) -> None:
    """Put back it would look as new, and if it kills it would do so unseen."""
    topology, owner = Topology(fleet.plan.name), Topology(fleet.plan.name).coordinator(new_id("c"))
    told: asyncio.Queue[Delivery] = asyncio.Queue()
    for spec in (owner, topology.stage(0)):
        await job.transport.declare(spec)
    await job.transport.consume(owner.name, prefetch=0, sink=told.put_nowait)
    row = Row(row=0, epoch=0, start=0, count=2, reserve=4)
    step = Step(plan=fleet.plan.digest, owner=owner.name, microbatch=0, number=0, stage=0, rows=(row,), tokens=(5, 6))
    await job.transport.publish(topology.stage(0).name, encode(step))
    dying, hands = await open_transport(fleet.url), asyncio.Queue[Delivery]()
    await dying.consume(topology.stage(0).name, prefetch=1, sink=hands.put_nowait)
    await hands.get()

    going, holding = threading.Event(), threading.Event()
    going.set()

    def before(_rows: Sequence[Row]) -> None:
        if not going.is_set():
            holding.set()
        assert going.wait(PATIENCE_S)

    leaving = fleet.worker(0, before=before, drain_s=0.2)
    fleet.worker(1, seconds_per_forward=0.01)
    fleet.coordinator()
    await job.ask(1, max_tokens=200)
    await until(lambda: leaving.engine is not None and leaving.engine.cached_rows > 0)
    going.clear()
    await until(holding.is_set)  # it computes, and reads nothing
    await dying.close()
    await asyncio.sleep(0.1)
    while (state := await job.transport.inspect(topology.stage(0).name)) and state.ready:
        await asyncio.sleep(0.02)
    stopping = asyncio.ensure_future(leaving.stop())
    await asyncio.sleep(0)
    going.set()
    await stopping
    (miss,) = decode((await asyncio.wait_for(told.get(), PATIENCE_S)).body).misses  # type: ignore[union-attr]
    assert miss.reason is MissReason.LOST


async def test_a_blamed_row_goes_on_as_soon_as_its_blame_is_kept(
    fleet: Fleet, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the next round of any clock."""
    monkeypatch.setattr(coordinator, "LEASE_ROUND_S", 3600.0)
    breaks = iter([True])
    worker = fleet.worker(0)
    engine = worker.engine
    assert engine is not None

    def before(_rows: Sequence[Row]) -> None:
        engine.broken = next(breaks, False)

    engine.before = before
    fleet.worker(1)
    fleet.coordinator(probe_s=3600.0)
    await job.ask(1)
    await job.gather()
    job.check()


async def test_a_worker_whose_device_fails_at_everything_ends_and_healthy_ones_go_on(fleet: Fleet, job: Job) -> None:
    broken = fleet.worker(0)
    assert broken.engine is not None
    broken.engine.broken = True
    fleet.worker(1)
    fleet.coordinator()
    await job.ask(20)
    with pytest.raises(ExceptionGroup) as ended:
        await asyncio.wait_for(broken.task, PATIENCE_S)
    assert isinstance(first(ended.value), ComputeError)
    fleet.worker(0)
    await job.gather()
    assert len(job.results) == 20


async def test_a_refused_queue_ends_the_actor_with_the_reason(fleet: Fleet, job: Job) -> None:
    unlike = replace(Topology(fleet.plan.name).requests, max_priority=5)
    await job.transport.declare(unlike)
    coordinator = fleet.coordinator()
    with pytest.raises((ExceptionGroup, Refused)) as ended:
        await asyncio.wait_for(coordinator.task, PATIENCE_S)
    assert isinstance(first(ended.value) if isinstance(ended.value, ExceptionGroup) else ended.value, Refused)


async def test_a_request_of_a_job_that_can_not_be_answered_is_buried(fleet: Fleet, job: Job) -> None:
    coordinator = fleet.coordinator()
    for stage in (0, 1):
        fleet.worker(stage)
    topology = Topology(fleet.plan.name)
    await job.ask(3)
    bad = Request(id="x", job="No Name!", plan=fleet.plan.digest, prompt=(5,), max_tokens=1)
    await job.transport.publish(topology.requests.name, encode(bad), persistent=True)
    await job.ask(3, first=3)
    await job.gather()
    job.check()
    dead = await job.transport.inspect(topology.dead.name)
    assert dead is not None
    assert dead.ready == 1
    assert not coordinator.task.done()


async def test_garbage_goes_to_the_dead_letters_and_everybody_lives(fleet: Fleet, job: Job) -> None:
    for stage in (0, 1):
        fleet.worker(stage)
    fleet.coordinator()
    await job.ask(5)
    await job.gather()
    topology = Topology(fleet.plan.name)
    seen = await survey.take(job.transport, fleet.plan)
    own = [topology.worker(report.id).name for stage in (0, 1) for report in seen.workers(stage)]
    own += [topology.coordinator(report.id).name for report in seen.coordinators()]
    shared = [topology.requests.name, topology.stage(0).name, topology.stage(1).name]
    row = Row(row=0, epoch=0, start=0, count=1, reserve=4)
    wrong_stage = Step(plan=fleet.plan.digest, owner="x", microbatch=0, number=0, stage=0, rows=(row,), tokens=(5,))
    for queue in (*own, *shared):
        await job.transport.publish(queue, b"garbage")
    await job.transport.publish(topology.stage(1).name, encode(wrong_stage))

    async def buried() -> int:
        state = await job.transport.inspect(topology.dead.name)
        return state.ready if state else 0

    async with asyncio.timeout(PATIENCE_S):
        while await buried() < len(own) + len(shared) + 1:
            await asyncio.sleep(0.01)
    await job.ask(10, first=5)
    await job.gather()
    job.check()


async def test_the_same_request_twice_is_computed_once_while_it_is_held(fleet: Fleet, job: Job) -> None:
    fleet.coordinator()
    await job.ask(3)
    await job.ask(3)
    workers = [fleet.worker(stage) for stage in (0, 1)]
    await job.gather()
    job.check()
    await until(lambda: all(worker.engine is not None and not worker.engine.cached_rows for worker in workers))
    assert job.repeats == 0


async def test_a_survey_sees_every_actor(fleet: Fleet, job: Job) -> None:
    for stage in (0, 1, 1):
        fleet.worker(stage)
    fleet.coordinator()
    await job.ask(3)
    await job.gather()
    seen = await survey.take(job.transport, fleet.plan)
    assert len(seen.coordinators()) == 1
    assert [len(seen.workers(stage)) for stage in (0, 1)] == [1, 2]
    assert [state.consumers for state in seen.stages if state] == [1, 2]
    assert seen.complaint() == ""


async def test_actors_report_what_they_did_and_where(fleet: Fleet, job: Job) -> None:
    for stage in (0, 1):
        fleet.worker(stage)
    fleet.coordinator()
    await job.ask(20)
    await job.gather()
    topology = Topology(fleet.plan.name)
    await job.transport.publish(topology.stage(1).name, b"garbage")
    async with asyncio.timeout(PATIENCE_S):
        while (
            not (seen := await survey.take(job.transport, fleet.plan, wait_s=0.2))
            .workers(1)[0]
            .values.get("dead_letters")
        ):
            pass
    (first_stage,), (last_stage,), (coordinator,) = seen.workers(0), seen.workers(1), seen.coordinators()
    for report in (first_stage, last_stage):
        values = report.values
        assert values["tokens"] >= values["rows"] >= values["steps"] >= values["forwards"] > 0
        assert values["tokens_per_s"] > 0
        assert values["wait_s"] > 0
        assert values["in_bytes"] > 0
        assert report.facts["device"] == "cpu"
        assert {"version", "python", "torch", "device_name", "codec"} <= report.facts.keys()
    assert first_stage.values["out_bytes"] > first_stage.values["packed_bytes"] > 0
    assert first_stage.values["hidden_bytes"] == first_stage.values["tokens"] * fleet.plan.hidden_size * 4
    assert last_stage.values["hidden_bytes"] == 0
    asked = job._asked.values()
    assert coordinator.values["results"] == 20
    assert coordinator.values["prompt_tokens"] == sum(len(request.prompt) for request in asked)
    assert coordinator.values["output_tokens"] == sum(len(result.output) for result in job.results.values())
    assert (coordinator.values["dead_letters"], coordinator.values["blocked"]) == (0, 0)


async def test_a_survey_says_which_stage_nobody_serves(fleet: Fleet, job: Job) -> None:
    fleet.worker(0)
    coordinator = fleet.coordinator()
    await job.ask(1)
    async with asyncio.timeout(PATIENCE_S):
        while (
            seen := await survey.take(job.transport, fleet.plan, wait_s=0.2)
        ).complaint() != "no worker serves stage 1":
            assert not coordinator.task.done()
    assert seen.bound_stage(seen) in (1, None)
