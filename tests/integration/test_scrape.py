"""Metrics of real processes, scraped over HTTP while they serve a job over a real broker."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Process, write_prompts
from private_broker import free_ports
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from mqinfer import plan as plans

WITHOUT_PROMETHEUS = """\
import importlib.machinery
path = importlib.machinery.PathFinder
find = path.find_spec
path.find_spec = lambda name, *rest: None if name.split(".")[0] == "prometheus_client" else find(name, *rest)
from mqinfer.cli import main
main()
"""


def scrape(port: int) -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


#: Of every actor; no process and no instance, which Prometheus knows by itself.
COMMON_FACTS = ("role", "version", "python", "plan")


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The sum of the samples of that name that have these labels."""
    samples = [s for family in families.values() for s in family.samples if s.name == name]
    fitting = [s.value for s in samples if labels.items() <= s.labels.items()]
    assert fitting, name
    return sum(fitting)


@pytest.mark.broker
def test_a_fleet_s_metrics_add_up_to_the_job_it_did(
    start: Callable[..., Process], amqp_url: str, pipeline: Path, tmp_path: Path
) -> None:
    name, ports = plans.read(pipeline).name, free_ports(3)
    where = ("-p", pipeline, "--broker", amqp_url)
    prompts, out = write_prompts(tmp_path / "p.jsonl", 20, max_tokens=6), tmp_path / "out.jsonl"
    worker = ("--kv-bytes", "64MiB", "--threads", 1, "--metrics-port")
    for stage in (0, 1):
        start("worker", "--stage", stage, *where, *worker, ports[stage])
    coordinating = start("coordinator", *where, "--metrics-port", ports[2])
    assert start("batch", prompts, "-o", out, *where).end().code == 0
    # It looks at the queues once a second.
    coordinating.until(lambda: value(scrape(ports[2]), "mqinfer_stage_consumers", stage="1") == 1)
    first, last, coordinator = map(scrape, ports)
    for stage, seen in ((0, first), (1, last)):
        labels = {"pipeline": name, "stage": str(stage)}
        assert value(seen, "mqinfer_worker_linked", **labels) == 1
        assert value(seen, "mqinfer_compute_seconds_count", **labels) == value(seen, "mqinfer_batch_rows_count")
        assert value(seen, "mqinfer_queue_wait_seconds_count") >= value(seen, "mqinfer_compute_seconds_count") > 0
        assert value(seen, "mqinfer_batch_rows_sum") >= 20 * 6
        assert value(seen, "mqinfer_kv_budget_bytes") == 64 * 2**20
        assert value(seen, "mqinfer_actor_info", role="worker", device="cpu", codec="auto") == 1
        (info,) = seen["mqinfer_actor_info"].samples
        assert info.labels.keys() == {*labels, *COMMON_FACTS, "device", "device_name", "codec", "torch"}
        assert value(seen, "mqinfer_dead_letters_total") == 0
    tokens = value(first, "mqinfer_computed_tokens_total")
    assert tokens >= value(coordinator, "mqinfer_prompt_tokens_total") + 20 * 5
    assert value(first, "mqinfer_hidden_bytes_total") == tokens * plans.read(pipeline).hidden_size * 4
    assert 0 < value(first, "mqinfer_packed_bytes_total") < value(first, "mqinfer_sent_bytes_total")
    assert value(last, "mqinfer_received_bytes_total") > value(first, "mqinfer_packed_bytes_total")
    assert value(coordinator, "mqinfer_requests_total", finish_reason="length") == 20
    assert value(coordinator, "mqinfer_output_tokens_total") == 20 * 6
    assert value(coordinator, "mqinfer_replays_total") == 0
    assert value(coordinator, "mqinfer_stage_consumers", stage="1") == 1
    assert value(coordinator, "mqinfer_waiting_requests") == 0
    assert start("queues", "delete", "--yes", *where).end().code == 0


def test_a_metrics_port_without_the_extra_says_which_one(start: Callable[..., Process], pipeline: Path) -> None:
    command = ("coordinator", "-p", pipeline, "--broker", "memory://x")
    ended = start(*command, "--metrics-port", free_ports(1)[0], program=("-c", WITHOUT_PROMETHEUS)).end()
    assert ended.code == 2
    assert re.fullmatch(r"mqinfer: --metrics-port needs mqinfer\[metrics\] \(No module named '\S+'\)\n", ended.err)
    served = start(*command, program=("-c", WITHOUT_PROMETHEUS))
    served.said("link.opened")
