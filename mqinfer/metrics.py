"""Prometheus metrics of one actor, served over HTTP: events become counters and histograms, its values gauges.

What happens is heard as an observe sink and counted since the process began; what is the case (and already counted for
reports) is asked for when somebody scrapes. prometheus_client is at home here and comes with the extra `metrics`.
docs/operations.md lists the names; what they may be used for stands in deploy/prometheus and deploy/grafana.

No label has more values than a plan has stages, or an enumeration has members: ids and hosts are no labels
(Prometheus adds `instance` itself).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mqinfer.errors import SettingsError
from mqinfer.messages import FinishReason, MissReason
from mqinfer.observe import (
    BODY_REFUSED,
    COMPUTE_FAILED,
    LINK_LOST,
    REQUEST_ENDED,
    REQUESTS_SEEN,
    ROW_MISSED,
    ROW_REPLAYED,
    STAGE_SEEN,
    STEP_COMPUTED,
    WORKER_GONE,
    add_sink,
)

# A second number beside each counter and histogram, which nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]

#: From a decode step on a GPU to the step timeout.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0)
#: Rows in one forward: microbatches have up to 64, and several may run together.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

Fields = Mapping[str, Any]
Values = Callable[[], Mapping[str, float]]

#: A name in `Report.values` -> the metric's name without its prefix, and what it says.
_ALL_GAUGES = {"blocked": ("broker_blocked", "1 while the broker keeps this actor from publishing (an alarm)")}
_WORKER_GAUGES = _ALL_GAUGES | {
    "kv_used_bytes": ("kv_used_bytes", "Keys and values of the rows cached here"),
    "kv_budget_bytes": ("kv_budget_bytes", "What keys and values may take at most"),
    "cached_rows": ("cached_rows", "Rows whose keys and values are here"),
    "unacknowledged": ("unacknowledged_steps", "Steps in this worker's hands that wait for a forward"),
}
_COORDINATOR_GAUGES = _ALL_GAUGES | {
    "rows": ("rows", "Requests that this coordinator holds"),
    "waiting": ("waiting_rows", "Those of them that are in no microbatch"),
    "microbatches": ("microbatches", "Microbatches under way"),
}


class _Metrics(Collector):
    """What workers and coordinators have in common. `labels` are the same for every metric of the actor."""

    def __init__(self, role: str, labels: Mapping[str, str], gauges: Mapping[str, tuple[str, str]]) -> None:
        self._labels = labels
        self._gauges = gauges
        self._linked = f"mqinfer_{role}_linked"
        self._values: Values = dict
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self._info = Info("mqinfer_actor", "What this actor is", (*labels, "role"), registry=self.registry).labels(
            *labels.values(), role
        )
        self._dead_letters = self.counter("dead_letters", "Bodies that this actor moved to the dead letters")
        self._links_lost = self.counter("links_lost", "Times that the link to the broker was lost")
        #: Event -> what is done about it.
        self._heard: dict[str, Callable[[Fields], None]] = {
            BODY_REFUSED: lambda _: self._dead_letters.inc(),
            LINK_LOST: lambda _: self._links_lost.inc(),
        }

    def attach(self, values: Values, facts: Mapping[str, str]) -> None:
        """From now on the actor is there to be asked: what it would report, nothing while it has no link."""
        self._values = values
        self._info.info(dict(facts))

    def sink(self, event: str, fields: Fields) -> None:
        """An observe.Sink."""
        if event in self._heard:
            self._heard[event](fields)

    def collect(self) -> Iterator[Metric]:
        """What is the case; called by the registry, in a thread of its own."""
        values = self._values()
        yield self._now(GaugeMetricFamily, self._linked, "1 while it has a link to the broker", bool(values))
        for name, (metric, about) in self._gauges.items():
            if name in values:
                yield self._now(GaugeMetricFamily, f"mqinfer_{metric}", about, values[name])
        about = "Time that the broker kept this actor from publishing, since its link is open"
        yield self._now(CounterMetricFamily, "mqinfer_broker_blocked_seconds", about, values.get("blocked_s", 0.0))

    def _now(self, kind: type[Metric], name: str, about: str, value: float) -> Metric:
        family: Any = kind(name, about, labels=tuple(self._labels))  # type: ignore[call-arg]
        family.add_metric(tuple(self._labels.values()), value)
        return family  # type: ignore[no-any-return]

    def counter(self, name: str, about: str) -> Counter:
        """One that counts for the whole actor."""
        return Counter(f"mqinfer_{name}", about, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def counters(
        self, name: str, about: str, label: str, values: type[MissReason | FinishReason]
    ) -> dict[str, Counter]:
        """One for each value of the label, all of them there from the beginning: a rate needs the zero."""
        family = Counter(f"mqinfer_{name}", about, (*self._labels, label), registry=self.registry)
        return {value.value: family.labels(*self._labels.values(), value.value) for value in values}

    def histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        """For the whole actor."""
        return Histogram(f"mqinfer_{name}", about, tuple(self._labels), registry=self.registry, buckets=buckets).labels(
            **self._labels
        )


class WorkerMetrics(_Metrics):
    """Of a process that serves one stage."""

    def __init__(self, pipeline: str, stage: int) -> None:
        super().__init__("worker", {"pipeline": pipeline, "stage": str(stage)}, _WORKER_GAUGES)
        self._wait = self.histogram(
            "queue_wait_seconds", "Time of a step in this worker's hands before it ran", SECONDS
        )
        self._compute = self.histogram("compute_seconds", "Time of a forward, unpacking and packing included", SECONDS)
        self._rows = self.histogram("batch_rows", "Rows in one forward", ROWS)
        self._sums = {
            "tokens": self.counter("computed_tokens", "New positions computed, of prompts and of answers"),
            "in_bytes": self.counter("received_bytes", "Bodies of the steps computed"),
            "out_bytes": self.counter("sent_bytes", "Bodies of what came of them"),
            "hidden_bytes": self.counter("hidden_bytes", "Hidden states passed on, before the codec"),
            "packed_bytes": self.counter("packed_bytes", "Hidden states passed on, as they travel"),
        }
        self._missed = self.counters("missed_rows", "Rows given up here", "reason", MissReason)
        self._failures = self.counter("compute_failures", "Forwards that raised")
        self._heard |= {
            STEP_COMPUTED: self._on_computed,
            ROW_MISSED: lambda fields: self._missed[fields["reason"]].inc(),
            COMPUTE_FAILED: lambda _: self._failures.inc(),
        }

    def _on_computed(self, fields: Fields) -> None:
        self._compute.observe(fields["seconds"])
        self._rows.observe(fields["rows"])
        for wait_s in fields["waits_s"]:
            self._wait.observe(wait_s)
        for name, counter in self._sums.items():
            counter.inc(fields[name])


class CoordinatorMetrics(_Metrics):
    """Of a process that coordinates; it also sees every stage's queue."""

    def __init__(self, pipeline: str) -> None:
        super().__init__("coordinator", {"pipeline": pipeline}, _COORDINATOR_GAUGES)
        self._requests = self.counters("requests", "Requests that ended", "finish_reason", FinishReason)
        self._prompt = self.counter("prompt_tokens", "Tokens of the prompts of requests that ended")
        self._output = self.counter("output_tokens", "Tokens of the answers of requests that ended")
        self._replays = self.counters("replays", "Rows computed again", "reason", MissReason)
        self._replayed = self.counter("replayed_tokens", "Positions whose computing was lost")
        self._gone = self.counter("workers_lost", "Workers on a route that were gone")
        self._ready = self._seen("stage_ready_steps", "Steps in a stage's shared queue", "stage")
        self._consumers = self._seen("stage_consumers", "Workers that take from a stage's shared queue", "stage")
        self._waiting = self._seen("waiting_requests", "Requests that no coordinator holds")
        self._heard |= {
            REQUEST_ENDED: self._on_ended,
            ROW_REPLAYED: self._on_replayed,
            WORKER_GONE: lambda _: self._gone.inc(),
            STAGE_SEEN: self._on_stage_seen,
            REQUESTS_SEEN: lambda fields: self._waiting.labels(*self._labels.values()).set(fields["ready"]),
            LINK_LOST: self._on_link_lost,
        }

    def _seen(self, name: str, about: str, *more: str) -> Gauge:
        return Gauge(f"mqinfer_{name}", about, (*self._labels, *more), registry=self.registry)

    def _on_ended(self, fields: Fields) -> None:
        self._requests[fields["finish_reason"]].inc()
        self._prompt.inc(fields["prompt_tokens"])
        self._output.inc(fields["output_tokens"])

    def _on_replayed(self, fields: Fields) -> None:
        self._replays[fields["reason"]].inc()
        self._replayed.inc(fields["lost_tokens"])

    def _on_stage_seen(self, fields: Fields) -> None:
        where = (*self._labels.values(), str(fields["stage"]))
        self._ready.labels(*where).set(fields["ready"])
        self._consumers.labels(*where).set(fields["consumers"])

    def _on_link_lost(self, _: Fields) -> None:
        """What was seen of the queues is not so any more; nothing is better than what is old."""
        self._links_lost.inc()
        for gauge in (self._ready, self._consumers, self._waiting):
            gauge.clear()


@contextlib.contextmanager
def served(metrics: WorkerMetrics | CoordinatorMetrics, address: str, port: int) -> Iterator[None]:
    """While the body runs the metrics hear events and can be scraped. Raises: SettingsError where the port is taken."""
    try:
        server, thread = start_http_server(port, address, metrics.registry)
    except OSError as error:
        raise SettingsError(f"metrics can't be served at {address}:{port}: {error.strerror or error}") from error
    forget = add_sink(metrics.sink)
    try:
        yield
    finally:
        forget()
        server.shutdown()
        server.server_close()
        thread.join()
