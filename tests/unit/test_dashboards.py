"""deploy/prometheus and deploy/grafana: what they ask for is there, and Prometheus and Grafana can read them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric

from mqinfer.metrics import CoordinatorMetrics, WorkerMetrics
from mqinfer.observe import REQUESTS_SEEN, STAGE_SEEN

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
RULES_TEST = ROOT / "tests" / "data" / "prometheus_rules_test.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "mqinfer.json"
#: What Grafana puts into an expression, for those who are not Grafana.
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$pipeline": "p"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def expressions() -> Iterator[str]:
    """Of the dashboard, as Prometheus gets them."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            assert "$" not in expression
            yield expression


def exported() -> dict[str, set[str]]:
    """Name of every sample that the code exports -> its labels."""
    worker, coordinator = WorkerMetrics("p", 0), CoordinatorMetrics("p")
    names = ("kv_used_bytes", "kv_budget_bytes", "cached_rows", "unacknowledged", "rows", "waiting", "microbatches")
    values = dict.fromkeys((*names, "blocked", "blocked_s"), 1.0)
    for made in (worker, coordinator):
        made.attach(lambda: values, {"version": "1"})
    coordinator.sink(STAGE_SEEN, {"stage": 0, "ready": 0, "consumers": 0})
    coordinator.sink(REQUESTS_SEEN, {"ready": 0})
    families: list[Metric] = [*worker.registry.collect(), *coordinator.registry.collect()]
    found: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def asked_for(expression: str) -> set[str]:
    """Names of ours, and of the process, in an expression; not those of recording rules."""
    return set(re.findall(r"(?<![\w:])(?:mqinfer|process)_\w+(?!:)\b", expression))


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is missing (apt-get install prometheus)")
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


def test_every_metric_that_rules_and_dashboard_ask_for_is_exported() -> None:
    asked = set().union(*map(asked_for, expressions()), *(asked_for(rule["expr"]) for rule in rules()))
    assert len(asked) > 20
    assert asked - exported().keys() == set()


def test_every_metric_that_is_exported_is_in_operations_md_and_no_other() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    told = set(re.findall(r"`(mqinfer_\w+)`", text))
    suffix = re.compile(r"_(bucket|sum|count)$")
    ours = {suffix.sub("", name) for name in exported() if name.startswith("mqinfer_")}
    assert told == ours


def test_every_recording_rule_that_an_alert_uses_is_there() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for rule in rules() for name in re.findall(r"\w+:mqinfer\w+:\w+", rule["expr"])}
    assert used <= recorded


def test_labels_that_are_summed_by_are_labels_that_are_exported() -> None:
    known = set().union(*exported().values()) | {"instance"}
    for expression in (*expressions(), *(rule["expr"] for rule in rules())):
        for words in re.findall(r"(?:by|on|group_left) \(([^)]*)\)", expression):
            assert set(words.replace(",", " ").split()) <= known


def test_every_alert_says_what_it_is_and_has_its_section_in_operations_md() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    alerts = [rule for rule in rules() if "alert" in rule]
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"].keys() == {"summary", "description"}
        assert f"**{alert['alert']}**" in text
    assert sorted(re.findall(r"\*\*(Mqinfer\w+)\*\*", text)) == sorted(alert["alert"] for alert in alerts)


def test_promtool_accepts_the_rules() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_must_and_not_before(tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path)
    done = promtool("test", "rules", shutil.copy(RULES_TEST, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {found["alertname"] for test in yaml.safe_load(RULES_TEST.read_text())["tests"] for found in fired(test)}
    assert tested == {rule["alert"] for rule in rules() if "alert" in rule}


def fired(test: dict[str, Any]) -> list[dict[str, Any]]:
    return [found for found in test["alert_rule_test"] if found["exp_alerts"]]


def test_prometheus_can_read_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    made = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions())]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    done = promtool("check", "rules", "--lint=none", tmp_path / "panels.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_what_grafana_loads() -> None:
    found = dashboard()
    assert re.fullmatch(r"[\w-]{1,40}", found["uid"])
    assert (found["id"], found["schemaVersion"] >= 36, found["title"]) == (None, True, "mqinfer")
    variables = {variable["name"]: variable for variable in found["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["pipeline"]["datasource"] == source
    for panel in found["panels"]:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == source
        assert [target["datasource"] for target in panel["targets"]] == [source] * len(panel["targets"])
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])


def test_no_two_panels_of_the_dashboard_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not taken & cells
        taken |= cells
