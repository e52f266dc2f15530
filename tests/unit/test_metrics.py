"""Prometheus metrics: what events and values become, and that names and labels keep Prometheus' conventions."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from mqinfer import metrics, observe
from mqinfer.errors import SettingsError
from mqinfer.metrics import CoordinatorMetrics, WorkerMetrics

FORWARD = {
    "stage": 1,
    "microbatches": 2,
    "rows": 5,
    "tokens": 40,
    "seconds": 0.25,
    "waits_s": [0.5, 0.002],
    "in_bytes": 300,
    "out_bytes": 200,
    "hidden_bytes": 160,
    "packed_bytes": 80,
}
WHERE = {"pipeline": "p", "stage": "1"}
#: What the conventions ask of a name's end, by type (https://prometheus.io/docs/practices/naming).
BASE_UNITS = ("_seconds", "_bytes", "_tokens", "_rows", "_steps", "_requests")


def families(of: WorkerMetrics | CoordinatorMetrics) -> dict[str, Metric]:
    text = generate_latest(of.registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def sample(of: WorkerMetrics | CoordinatorMetrics, name: str, **labels: str) -> float | None:
    return of.registry.get_sample_value(name, {"pipeline": "p", **labels})


@pytest.fixture
def worker() -> WorkerMetrics:
    return WorkerMetrics("p", 1)


@pytest.fixture
def coordinator() -> CoordinatorMetrics:
    return CoordinatorMetrics("p")


def test_a_forward_is_measured_by_its_time_its_rows_its_waits_and_its_bytes(worker: WorkerMetrics) -> None:
    worker.sink(observe.STEP_COMPUTED, FORWARD)
    values = {
        "mqinfer_compute_seconds_sum": 0.25,
        "mqinfer_compute_seconds_count": 1,
        "mqinfer_batch_rows_sum": 5,
        "mqinfer_queue_wait_seconds_sum": 0.502,
        "mqinfer_queue_wait_seconds_count": 2,
        "mqinfer_computed_tokens_total": 40,
        "mqinfer_received_bytes_total": 300,
        "mqinfer_sent_bytes_total": 200,
        "mqinfer_hidden_bytes_total": 160,
        "mqinfer_packed_bytes_total": 80,
    }
    assert {name: sample(worker, name, stage="1") for name in values} == values
    assert sample(worker, "mqinfer_queue_wait_seconds_bucket", stage="1", le="0.0025") == 1


def test_rows_and_bodies_that_were_given_up_and_lost_links_are_counted(worker: WorkerMetrics) -> None:
    worker.sink(observe.ROW_MISSED, {"reason": "room", "row": 3})
    worker.sink(observe.COMPUTE_FAILED, {})
    worker.sink(observe.BODY_REFUSED, {})
    worker.sink(observe.LINK_LOST, {})
    assert sample(worker, "mqinfer_missed_rows_total", stage="1", reason="room") == 1
    for name in ("compute_failures", "dead_letters", "links_lost"):
        assert sample(worker, f"mqinfer_{name}_total", stage="1") == 1


def test_requests_replays_and_lost_workers_are_counted(coordinator: CoordinatorMetrics) -> None:
    ended = {"request": "r", "finish_reason": "length", "prompt_tokens": 7, "output_tokens": 5}
    coordinator.sink(observe.REQUEST_ENDED, ended)
    coordinator.sink(observe.ROW_REPLAYED, {"request": "r", "reason": "lost", "detail": "", "lost_tokens": 12})
    coordinator.sink(observe.WORKER_GONE, {"queue": "q"})
    assert sample(coordinator, "mqinfer_requests_total", finish_reason="length") == 1
    assert sample(coordinator, "mqinfer_prompt_tokens_total") == 7
    assert sample(coordinator, "mqinfer_output_tokens_total") == 5
    assert sample(coordinator, "mqinfer_replays_total", reason="lost") == 1
    assert sample(coordinator, "mqinfer_replayed_tokens_total") == 12
    assert sample(coordinator, "mqinfer_workers_lost_total") == 1


def test_what_a_coordinator_saw_of_the_queues_goes_with_its_link(coordinator: CoordinatorMetrics) -> None:
    coordinator.sink(observe.STAGE_SEEN, {"stage": 0, "ready": 4, "consumers": 2})
    coordinator.sink(observe.REQUESTS_SEEN, {"ready": 9})
    assert sample(coordinator, "mqinfer_stage_ready_steps", stage="0") == 4
    assert sample(coordinator, "mqinfer_stage_consumers", stage="0") == 2
    assert sample(coordinator, "mqinfer_waiting_requests") == 9
    coordinator.sink(observe.LINK_LOST, {})
    assert sample(coordinator, "mqinfer_stage_consumers", stage="0") is None
    assert sample(coordinator, "mqinfer_waiting_requests") is None


def test_what_is_the_case_is_asked_for_when_it_is_scraped(worker: WorkerMetrics) -> None:
    values: dict[str, float] = {}
    worker.attach(lambda: values, {"version": "1", "device": "cuda:0"})
    assert sample(worker, "mqinfer_worker_linked", stage="1") == 0
    assert sample(worker, "mqinfer_kv_used_bytes", stage="1") is None
    values |= {"kv_used_bytes": 5, "blocked": 1, "blocked_s": 2.5, "tokens": 99}
    assert sample(worker, "mqinfer_worker_linked", stage="1") == 1
    assert sample(worker, "mqinfer_kv_used_bytes", stage="1") == 5
    assert sample(worker, "mqinfer_broker_blocked", stage="1") == 1
    assert sample(worker, "mqinfer_broker_blocked_seconds_total", stage="1") == 2.5
    facts = {"role": "worker", "version": "1", "device": "cuda:0"}
    assert sample(worker, "mqinfer_actor_info", stage="1", **facts) == 1


def test_every_rate_has_its_zero_from_the_beginning(worker: WorkerMetrics, coordinator: CoordinatorMetrics) -> None:
    assert sample(worker, "mqinfer_dead_letters_total", stage="1") == 0
    assert sample(coordinator, "mqinfer_replays_total", reason="cache") == 0
    assert sample(coordinator, "mqinfer_requests_total", finish_reason="error") == 0


def test_an_event_that_nobody_counts_changes_nothing(worker: WorkerMetrics) -> None:
    before = generate_latest(worker.registry).decode().replace("process_", "")
    worker.sink(observe.ACTOR_READY, {"actor": "x"})
    counted = [line for line in before.splitlines() if "mqinfer_" in line]
    after = generate_latest(worker.registry).decode().replace("process_", "")
    assert [line for line in after.splitlines() if "mqinfer_" in line] == counted


@pytest.mark.parametrize("made", [WorkerMetrics("p", 1), CoordinatorMetrics("p")], ids=["worker", "coordinator"])
def test_names_and_labels_keep_prometheus_conventions(made: WorkerMetrics | CoordinatorMetrics) -> None:
    for name, family in families(made).items():
        if name.startswith("process_"):
            continue
        assert name.startswith("mqinfer_")
        assert family.documentation
        if family.type == "histogram":
            assert name.endswith(BASE_UNITS)
        for found in family.samples:
            assert found.labels["pipeline"] == "p"
            assert found.labels.keys() <= {"pipeline", "stage", "reason", "finish_reason", "le", "role"}
            assert found.name.endswith("_total") == (family.type == "counter")
            assert not found.name.endswith("_created")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_while_they_are_served_events_are_heard_and_afterwards_not() -> None:
    made, port = WorkerMetrics("p", 1), free_port()
    with metrics.served(made, "127.0.0.1", port):
        observe.emit(observe.STEP_COMPUTED, **FORWARD)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert 'mqinfer_batch_rows_sum{pipeline="p",stage="1"} 5.0' in answer.read().decode()
    observe.emit(observe.STEP_COMPUTED, **FORWARD)
    assert sample(made, "mqinfer_batch_rows_sum", stage="1") == 5
    with metrics.served(made, "127.0.0.1", port):  # the port is free again
        pass


def test_a_port_that_is_taken_is_told_in_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(SettingsError, match=rf"metrics can't be served at 127.0.0.1:{port}: Address already in use"),
            metrics.served(CoordinatorMetrics("p"), "127.0.0.1", port),
        ):
            pass
