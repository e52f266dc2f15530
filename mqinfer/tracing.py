"""OpenTelemetry spans of requests, trips and stage steps: an observe sink, and the trace context of each trip.

A request's span runs from its lease to its end. A trip of a microbatch is a child of the first of its rows' requests
and linked with the others, for a span has one parent; a stage's step is a child of its trip, whose W3C `traceparent`
the step carries around (docs/wire.md). A span is ended where the work ends, not where a message is queued: that is why
no instrumentation of the client is used. Never a prompt, a token or a secret.

`OTEL_*` in the environment is OpenTelemetry's own configuration, read by its SDK; only whether spans are sent at all is
known in settings.py. opentelemetry is at home here and comes with the extra `otel`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mqinfer import __version__
from mqinfer.errors import SettingsError
from mqinfer.messages import FinishReason, Step
from mqinfer.observe import (
    COORDINATOR_DRAINED,
    LINK_LOST,
    REQUEST_ENDED,
    REQUEST_LEASED,
    ROW_REPLAYED,
    STEP_COMPUTED,
    STEP_RETURNED,
    TRACING_FAILED,
    add_sink,
    emit,
)

#: How long an actor that leaves waits for its last spans to be sent. The SDK would wait for 30 s.
LAST_SPANS_S = 1.0
#: What goes wrong with sending goes wrong for every batch: it is not said more often.
SAID_AGAIN_S = 60.0

Fields = Mapping[str, Any]
_W3C = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class _Request:
    span: Span
    row: int


@dataclass(frozen=True, slots=True)
class _Trip:
    span: Span
    number: int
    #: Those of its rows whose requests are traced.
    rows: Set[int]


class Tracing:
    """The spans that are open in this process. For one event loop.

    A trip that does not come home ends with the first of its requests that is replayed or ends, so that there are
    never more open trips than open requests.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("mqinfer", __version__)
        #: Those that are sampled, by the request's id; and their spans, by the row's number.
        self._requests: dict[str, _Request] = {}
        self._rows: dict[int, Span] = {}
        #: By the microbatch's number.
        self._trips: dict[int, _Trip] = {}
        self._heard: Mapping[str, Callable[[Fields], None]] = {
            REQUEST_LEASED: self._on_leased,
            REQUEST_ENDED: self._on_ended,
            ROW_REPLAYED: self._on_replayed,
            STEP_RETURNED: self._on_returned,
            STEP_COMPUTED: self._on_computed,
            LINK_LOST: self._on_link_lost,
            COORDINATOR_DRAINED: lambda _: self.end_all(),
        }

    def sink(self, event: str, fields: Fields) -> None:
        """An observe.Sink."""
        if event in self._heard:
            self._heard[event](fields)

    def trace(self, step: Step) -> Step:
        """A coordinator_counts.Trace; the step as it is where none of its requests is sampled."""
        spans = {row.row: self._rows[row.row] for row in step.rows if row.row in self._rows}
        if not spans:
            return step
        self._end_trips(spans.keys())
        first, *others = spans.values()
        trip = self._tracer.start_span(
            "mqinfer.trip",
            set_span_in_context(first),
            SpanKind.PRODUCER,
            links=[Link(span.get_span_context()) for span in others],
            attributes=_named(microbatch=step.microbatch, trip=step.number, rows=len(step.rows)),
        )
        for span in others:
            span.add_link(trip.get_span_context())
        self._trips[step.microbatch] = _Trip(trip, step.number, frozenset(spans))
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(trip))
        return replace(step, traceparent=carrier["traceparent"])

    def end_all(self) -> None:
        """What is open goes on elsewhere, in spans of its own."""
        spans = [trip.span for trip in self._trips.values()] + [request.span for request in self._requests.values()]
        for span in spans:
            span.set_attributes(_named(given_back=True))
            span.end()
        self._trips.clear()
        self._requests.clear()
        self._rows.clear()

    def _on_leased(self, fields: Fields) -> None:
        request, row = fields["request"], fields["row"]
        span = self._tracer.start_span(
            "mqinfer.request", Context(), SpanKind.CONSUMER, attributes=_named(request=request)
        )
        if span.is_recording():
            self._requests[request] = _Request(span, row)
            self._rows[row] = span

    def _on_ended(self, fields: Fields) -> None:
        ended = self._requests.pop(fields["request"], None)
        if ended is None:
            return
        del self._rows[ended.row]
        self._end_trips({ended.row}, "given up")
        told = ("finish_reason", "prompt_tokens", "output_tokens")
        ended.span.set_attributes(_named(**{name: fields[name] for name in told}))
        if fields["finish_reason"] == FinishReason.ERROR:
            ended.span.set_status(StatusCode.ERROR)
        ended.span.end()

    def _on_replayed(self, fields: Fields) -> None:
        replayed = self._requests.get(fields["request"])
        if replayed is not None:
            told = ("reason", "lost_tokens")
            replayed.span.add_event(ROW_REPLAYED, _named(**{name: fields[name] for name in told}))
            self._end_trips({replayed.row}, fields["reason"])

    def _on_returned(self, fields: Fields) -> None:
        trip = self._trips.get(fields["microbatch"])
        if trip is not None and trip.number == fields["number"]:
            del self._trips[fields["microbatch"]]
            trip.span.end()

    def _on_computed(self, fields: Fields) -> None:
        """One span for each step of the forward that is traced; all of them took its time."""
        end_ns = time.time_ns()
        begin_ns = end_ns - int(fields["seconds"] * 1e9)
        for traceparent, wait_s in zip(fields["traceparents"], fields["waits_s"], strict=True):
            trip = _read(traceparent)
            if trip is not None:
                self._tracer.start_span(
                    f"mqinfer.stage {fields['stage']}",
                    trip,
                    SpanKind.CONSUMER,
                    attributes=_named(stage=fields["stage"], queue_wait_s=wait_s, batch_rows=fields["rows"]),
                    start_time=begin_ns,
                ).end(end_ns)

    def _on_link_lost(self, fields: Fields) -> None:
        if fields["actor"] == "coordinator":  # workers hold nothing that is open
            self.end_all()

    def _end_trips(self, rows: Set[int], lost: str = "") -> None:
        """Those that carry any of these rows, and did not come home."""
        for microbatch, trip in [*self._trips.items()]:
            if trip.rows & rows:
                del self._trips[microbatch]
                trip.span.set_status(StatusCode.ERROR, lost)
                trip.span.end()


def _named(**values: str | float) -> dict[str, str | float]:
    return {f"mqinfer.{name}": value for name, value in values.items()}


def _read(traceparent: str) -> Context | None:
    """What came over the wire; None where it is no trace context."""
    context = _W3C.extract({"traceparent": traceparent}) if traceparent else Context()
    return context if get_current_span(context).get_span_context().is_valid else None


@contextlib.contextmanager
def exported(role: str, pipeline: str) -> Iterator[Tracing]:
    """While the body runs, what is heard becomes spans that are sent to the endpoint; the last ones at its end.

    They wait in a queue that drops the oldest, and are sent by a thread of the SDK's. Raises: SettingsError.
    """
    with _library_heard():
        try:
            provider = TracerProvider(resource=_resource(role, pipeline), shutdown_on_exit=False)
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        except ValueError as error:
            raise SettingsError(f"OpenTelemetry does not take its variables OTEL_*: {error}") from error
        tracing = Tracing(provider)
        forget = add_sink(tracing.sink)
        try:
            yield tracing
        finally:
            forget()
            tracing.end_all()
            last = threading.Thread(target=provider.shutdown, daemon=True)
            last.start()
            last.join(LAST_SPANS_S)


def _resource(role: str, pipeline: str) -> Resource:
    """Who sends the spans. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word."""
    ours: dict[str, Any] = {
        "service.name": f"mqinfer-{role}",
        "service.version": __version__,
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
        **_named(pipeline=pipeline),
    }
    return Resource.create(ours | dict(OTELResourceDetector().detect().attributes))


class _Said(logging.Handler):
    """What the library logs becomes an event, which is told as all others are."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said_s: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s.get(record.name, -SAID_AGAIN_S) >= SAID_AGAIN_S:
            self._said_s[record.name] = now_s
            # Of the address only the host: there may be a key in the rest.
            emit(TRACING_FAILED, error=re.sub(r" with url: \S+", "", record.getMessage()))


@contextlib.contextmanager
def _library_heard() -> Iterator[None]:
    library = logging.getLogger("opentelemetry")
    library.propagate = False
    library.handlers = [_Said()]
    try:
        yield
    finally:
        library.handlers = [logging.NullHandler()]  # it may still be sending; nobody waits for that
