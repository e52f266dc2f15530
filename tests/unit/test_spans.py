"""Spans by themselves: what events become, what comes over the wire, and a collector that does not answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import StatusCode
from otlp_receiver import Receiver

from mqinfer import observe, tracing
from mqinfer.errors import SettingsError
from mqinfer.messages import Row, Step
from mqinfer.tracing import Tracing, exported

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def step(*rows: int, microbatch: int = 1, number: int = 0) -> Step:
    return Step(
        plan="p",
        microbatch=microbatch,
        number=number,
        owner="o",
        stage=0,
        rows=tuple(Row(row=row, epoch=0, start=0, count=1, reserve=9) for row in rows),
        tokens=(5,) * len(rows),
    )


def computed(*traceparents: str) -> Mapping[str, Any]:
    waits_s = [0.5] * len(traceparents)
    return {"stage": 1, "seconds": 0.25, "rows": 3, "traceparents": [*traceparents], "waits_s": waits_s}


class Heard:
    """A Tracing and the spans that it ended."""

    def __init__(self, provider: TracerProvider) -> None:
        self._exporter = InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    def hear(self, event: str, **fields: Any) -> None:
        self.tracing.sink(event, fields)

    @property
    def ended(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def names(self) -> list[str]:
        return [span.name.removeprefix("mqinfer.") for span in self.ended]


@pytest.fixture
def heard() -> Heard:
    return Heard(TracerProvider(shutdown_on_exit=False))


@pytest.fixture
def unsampled() -> Heard:
    return Heard(TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False))


def test_a_trip_s_step_carries_its_trace_context_and_is_the_same_otherwise(heard: Heard) -> None:
    heard.hear(observe.REQUEST_LEASED, request="r", row=4)
    sent = heard.tracing.trace(step(4, 5))
    heard.hear(observe.STEP_RETURNED, microbatch=1, number=0)
    (trip,) = heard.ended
    assert trip.context is not None
    assert sent.traceparent.startswith(f"00-{trip.context.trace_id:032x}-{trip.context.span_id:016x}-")
    assert sent == Step(
        **{name: getattr(step(4, 5), name) for name in Step.__slots__} | {"traceparent": sent.traceparent}
    )


def test_a_step_without_a_sampled_request_is_sent_as_it_is(unsampled: Heard) -> None:
    unsampled.hear(observe.REQUEST_LEASED, request="r", row=4)
    sent = step(4)
    assert unsampled.tracing.trace(sent) is sent
    unsampled.hear(observe.REQUEST_ENDED, request="r", finish_reason="stop", prompt_tokens=1, output_tokens=1)
    assert unsampled.ended == ()


def test_a_stage_is_sampled_as_its_trip_is_whatever_the_worker_s_own_sampler_says(unsampled: Heard) -> None:
    unsampled.hear(observe.STEP_COMPUTED, **computed(TRACEPARENT, TRACEPARENT[:-1] + "0"))
    (span,) = unsampled.ended
    assert span.name == "mqinfer.stage 1"
    assert span.attributes == {"mqinfer.stage": 1, "mqinfer.queue_wait_s": 0.5, "mqinfer.batch_rows": 3}
    assert span.start_time is not None
    assert span.end_time == span.start_time + 250_000_000


HOSTILE = [
    "",
    "x",
    "-" * 55,
    "é" * 55,
    TRACEPARENT.upper(),
    TRACEPARENT.replace("00-", "ff-", 1),
    TRACEPARENT + "-",
    TRACEPARENT + "\n-",
    TRACEPARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
    TRACEPARENT.replace("b7ad6b7169203331", "0" * 16),
]


@pytest.mark.parametrize("traceparent", HOSTILE)
def test_what_is_no_trace_context_starts_no_trace(heard: Heard, traceparent: str) -> None:
    heard.hear(observe.STEP_COMPUTED, **computed(traceparent))
    assert heard.ended == ()


ANY = Tracing(TracerProvider(shutdown_on_exit=False))
hexadecimal = st.text("0123456789abcdef", max_size=32)


@given(st.text(max_size=55) | st.lists(hexadecimal, max_size=5).map("-".join))
def test_no_trace_context_from_the_wire_is_an_error(traceparent: str) -> None:
    ANY.sink(observe.STEP_COMPUTED, computed(traceparent))


def test_a_trip_ends_with_the_first_of_its_requests_that_is_replayed(heard: Heard) -> None:
    for row, request in enumerate("ab"):
        heard.hear(observe.REQUEST_LEASED, request=request, row=row)
    heard.tracing.trace(step(0, 1))
    for request in "ab":
        heard.hear(observe.ROW_REPLAYED, request=request, reason="gone", detail="", lost_tokens=3)
    (trip,) = heard.ended
    assert (trip.status.status_code, trip.status.description) == (StatusCode.ERROR, "gone")


def test_a_trip_that_never_came_home_ends_with_its_request(heard: Heard) -> None:
    heard.hear(observe.REQUEST_LEASED, request="r", row=0)
    heard.tracing.trace(step(0))
    heard.hear(observe.REQUEST_ENDED, request="r", finish_reason="error", prompt_tokens=1, output_tokens=1)
    assert heard.names() == ["trip", "request"]
    assert all(span.status.status_code is StatusCode.ERROR for span in heard.ended)


def test_a_late_end_of_a_trip_does_not_end_the_next_one(heard: Heard) -> None:
    heard.hear(observe.REQUEST_LEASED, request="r", row=0)
    heard.tracing.trace(step(0, number=7))
    heard.hear(observe.STEP_RETURNED, microbatch=1, number=6)
    heard.hear(observe.STEP_RETURNED, microbatch=2, number=7)
    assert heard.ended == ()


def test_a_row_is_on_one_trip_at_a_time(heard: Heard) -> None:
    heard.hear(observe.REQUEST_LEASED, request="r", row=0)
    for microbatch in range(3):
        heard.tracing.trace(step(0, microbatch=microbatch))
    assert heard.names() == ["trip", "trip"]


@pytest.mark.parametrize("event", [observe.LINK_LOST, observe.COORDINATOR_DRAINED])
def test_what_is_open_ends_as_given_back_when_others_go_on_with_it(heard: Heard, event: str) -> None:
    heard.hear(observe.REQUEST_LEASED, request="r", row=0)
    heard.tracing.trace(step(0))
    heard.hear(observe.LINK_LOST, actor="worker of stage 0", error="")
    assert heard.ended == ()
    heard.hear(event, actor="coordinator")
    assert heard.names() == ["trip", "request"]
    assert all(span.attributes and span.attributes["mqinfer.given_back"] is True for span in heard.ended)
    heard.hear(observe.REQUEST_ENDED, request="r", finish_reason="stop", prompt_tokens=1, output_tokens=1)
    assert len(heard.ended) == 2


@pytest.fixture
def failures() -> Iterator[list[str]]:
    told: list[str] = []
    forget = observe.add_sink(lambda event, fields: told.append(fields["error"]) if event == "tracing.failed" else None)
    yield told
    forget()


def send_one() -> None:
    with exported("worker", "p"):
        observe.emit(observe.STEP_COMPUTED, **computed(TRACEPARENT))


def test_the_last_spans_are_sent_before_an_actor_leaves(monkeypatch: pytest.MonkeyPatch, failures: list[str]) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,room=7")
    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        send_one()
    (span,) = receiver.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    (sender,) = receiver.senders
    assert sender.items() >= {"service.name": "mine", "room": "7", "mqinfer.pipeline": "p"}.items()
    assert failures == []


def test_a_collector_that_does_not_answer_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "LAST_SPANS_S", 0.01)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "10")
    with Receiver(stuck=True) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        before = set(threading.enumerate())
        send_one()
        sending = set(threading.enumerate()) - before
        assert any(thread.name.startswith("OtelBatch") for thread in sending)
        assert receiver.arrived.wait(60)
    for thread in sending:
        thread.join(60)


def test_a_collector_that_is_gone_is_told_without_what_may_be_secret(
    monkeypatch: pytest.MonkeyPatch, failures: list[str]
) -> None:
    monkeypatch.setattr(tracing, "LAST_SPANS_S", 60.0)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1/v1?key=secret")
    send_one()
    (failure,) = failures
    assert "secret" not in failure


def test_what_goes_wrong_with_every_batch_is_not_said_with_every_batch(
    monkeypatch: pytest.MonkeyPatch, failures: list[str]
) -> None:
    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        with exported("worker", "p"):
            for _ in range(3):
                logging.getLogger("opentelemetry.sdk").warning("spans are lost")
    assert failures == ["spans are lost"]


def test_variables_that_the_library_does_not_take_are_an_error_of_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0")
    with pytest.raises(SettingsError, match=r"OTEL_\*"):
        send_one()
