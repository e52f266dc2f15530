"""Traces: one for each request, from its lease through every stage and back, whoever computed it."""

from __future__ import annotations

import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import Process, write_prompts
from fleet import PATIENCE_S, Fleet, Job, until
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from otlp_receiver import Receiver

from mqinfer import plan as plans
from mqinfer.messages import Row
from mqinfer.observe import add_sink
from mqinfer.tracing import Tracing

WITHOUT_OTEL = """\
import importlib.machinery
path = importlib.machinery.PathFinder
find = path.find_spec
path.find_spec = lambda name, *rest: None if name.split(".")[0] == "opentelemetry" else find(name, *rest)
from mqinfer.cli import main
main()
"""
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> Iterator[Tracing]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    made = Tracing(provider)
    forget = add_sink(made.sink)
    yield made
    forget()


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def attribute(span: ReadableSpan, name: str) -> Any:
    assert span.attributes is not None
    return span.attributes[f"mqinfer.{name}"]


def traces(spans: InMemorySpanExporter) -> set[int]:
    return {span.context.trace_id for span in spans.get_finished_spans() if span.context}


async def test_a_request_s_trace_goes_through_every_stage_and_back(
    fleet: Fleet, job: Job, tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    for stage in (0, 1):
        fleet.worker(stage)
    coordinator = fleet.coordinator(trace=tracing.trace)
    await job.ask(1, max_tokens=3)
    await job.gather()
    await coordinator.stop()
    (request,) = named(spans, "mqinfer.request")
    trips = named(spans, "mqinfer.trip")
    assert request.parent is None
    assert (attribute(request, "finish_reason"), attribute(request, "output_tokens")) == ("length", 4)
    assert [attribute(trip, "trip") for trip in trips] == [0, 1, 2, 3]
    stages = [named(spans, f"mqinfer.stage {stage}") for stage in (0, 1)]
    for at, trip in enumerate(trips):
        assert trip.parent == request.context
        for stage in stages:
            parent = stage[at].parent
            assert parent is not None
            assert parent.is_remote
            assert trip.context is not None
            assert parent.span_id == trip.context.span_id
        assert trip.start_time <= stages[0][at].end_time <= stages[1][at].end_time <= trip.end_time  # type: ignore[operator]
    assert len(spans.get_finished_spans()) == 1 + 4 + 2 * 4
    assert len(traces(spans)) == 1


async def test_rows_that_travel_together_are_linked_with_their_trip(
    fleet: Fleet, job: Job, tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    for stage in (0, 1):
        fleet.worker(stage)
    coordinator = fleet.coordinator(trace=tracing.trace)
    await job.ask(12)
    await job.gather()
    await coordinator.stop()
    requests = {span.context.span_id: span for span in named(spans, "mqinfer.request") if span.context}
    carried: Counter[int] = Counter()
    for trip in named(spans, "mqinfer.trip"):
        assert trip.parent is not None
        linked = [link.context.span_id for link in trip.links]
        assert len(linked) == attribute(trip, "rows") - 1
        for span_id in linked:
            assert trip.context in [link.context for link in requests[span_id].links]
        carried.update([trip.parent.span_id, *linked])
    assert len(requests) == 12
    assert carried == {span_id: attribute(request, "output_tokens") for span_id, request in requests.items()}


async def test_a_trip_that_ends_with_its_worker_is_lost_and_its_request_goes_on_in_the_same_trace(
    fleet: Fleet, job: Job, tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    holding, going = threading.Event(), threading.Event()

    def before(rows: Sequence[Row]) -> None:
        if rows[0].count == 1:  # not the prompt, whose trip a peer would take over and end
            holding.set()
            going.wait(PATIENCE_S)

    fleet.worker(0)
    doomed = fleet.worker(1, before=before)
    coordinator = fleet.coordinator(trace=tracing.trace)
    await job.ask(1, max_tokens=3)
    await until(holding.is_set)
    fleet.worker(1)
    for link in doomed._links:
        await link.close()
    await until(lambda: any(trip.status.status_code is StatusCode.ERROR for trip in named(spans, "mqinfer.trip")))
    going.set()
    await job.gather()
    job.check()
    await coordinator.stop()
    (request,) = named(spans, "mqinfer.request")
    (lost,) = (trip for trip in named(spans, "mqinfer.trip") if trip.status.status_code is StatusCode.ERROR)
    assert lost.status.description == "lost"
    assert lost.parent == request.context
    (replayed,) = request.events
    assert replayed.name == "row.replayed"
    assert replayed.attributes == {"mqinfer.reason": "lost", "mqinfer.lost_tokens": 11}
    assert request.status.is_unset
    assert len(traces(spans)) == 1


@pytest.mark.broker
def test_a_fleet_s_processes_send_one_trace_for_each_request(
    start: Callable[..., Process], amqp_url: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("-p", pipeline, "--broker", amqp_url)
    with Receiver() as receiver:
        monkeypatch.setenv(ENDPOINT, receiver.url)
        actors = [start("worker", "--stage", k, *where, "--kv-bytes", "64MiB", "--threads", 1) for k in (0, 1)]
        actors.append(start("coordinator", *where))
        for actor in actors:
            actor.said("actor.ready")
        prompts, out = write_prompts(tmp_path / "p.jsonl", 3, max_tokens=4), tmp_path / "out.jsonl"
        assert start("batch", prompts, "-o", out, *where).end().code == 0
        for actor in reversed(actors):
            ended = actor.end(signal.SIGTERM)
            assert ended.code == 0
            assert "tracing.failed" not in ended.err
    assert receiver.paths == {"/v1/traces"}
    requests, trips, *stages = (
        receiver.named(name) for name in ("mqinfer.request", "mqinfer.trip", "mqinfer.stage 0", "mqinfer.stage 1")
    )
    assert len(requests) == 3
    assert {span.parent_span_id for span in trips} <= {span.span_id for span in requests}
    for stage in stages:
        assert sorted(span.parent_span_id for span in stage) == sorted(span.span_id for span in trips)
    assert {span.trace_id for span in receiver.spans} == {span.trace_id for span in requests}
    assert Counter(who["service.name"] for who in receiver.senders) == {"mqinfer-worker": 2, "mqinfer-coordinator": 1}
    assert {who["mqinfer.pipeline"] for who in receiver.senders} == {plans.read(pipeline).name}
    assert start("queues", "delete", "--yes", *where).end().code == 0


def test_an_endpoint_without_the_extra_says_which_one(
    start: Callable[..., Process], pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("coordinator", "-p", pipeline, "--broker", "memory://x")
    start(*command, program=("-c", WITHOUT_OTEL)).said("link.opened")
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    ended = start(*command, program=("-c", WITHOUT_OTEL)).end()
    assert ended.code == 2
    assert re.fullmatch(rf"mqinfer: {ENDPOINT} is set, and traces need mqinfer\[otel\] \([^\n]*\)\n", ended.err)
