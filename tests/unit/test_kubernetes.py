"""The manifests of deploy/kubernetes and compose.yaml, against the schemas of those who read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from fakes import make_plan
from test_deploy import DEPLOY, check_command

from mqinfer import plan as plans
from mqinfer.permissions import users
from mqinfer.queues import Topology
from mqinfer.settings import WorkerSettings, load

RENDER = DEPLOY / "kubernetes" / "render"
KUBERNETES = "1.37"
PLAN = make_plan("smol.lm", stages=3)
NAMED = ("--image", "registry/mqinfer:1", "--models-claim", "models")

#: What KEDA's ScaledObject may have, as far as we use it (keda.sh/docs/latest/reference/scaledobject-spec).
POLICIES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "value", "periodSeconds"],
        "properties": {
            "type": {"enum": ["Pods", "Percent"]},
            "value": {"type": "integer", "minimum": 1},
            "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
        },
        "additionalProperties": False,
    },
}
RULES = {
    "type": "object",
    "properties": {"stabilizationWindowSeconds": {"type": "integer", "maximum": 3600}, "policies": POLICIES},
    "additionalProperties": False,
}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
TRIGGER = closed(
    ["type", "metadata", "authenticationRef"],
    type={"const": "rabbitmq"},
    metadata=closed(
        ["protocol", "mode", "value", "queueName"],
        protocol={"const": "amqp"},
        mode={"const": "QueueLength"},
        value=TEXT,
        queueName=TEXT,
    ),
    authenticationRef=closed(["name"], name=TEXT),
)
BEHAVIOR = {"behavior": closed([], scaleUp=RULES, scaleDown=RULES)}
SCALED_OBJECT = closed(
    ["scaleTargetRef", "triggers"],
    scaleTargetRef=closed(["name"], name=TEXT),
    pollingInterval=COUNT,
    cooldownPeriod=COUNT,
    minReplicaCount={"type": "integer", "minimum": 0},
    maxReplicaCount=COUNT,
    fallback=closed(
        ["failureThreshold", "replicas"],
        failureThreshold=COUNT,
        replicas=COUNT,
        behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
    ),
    advanced=closed([], horizontalPodAutoscalerConfig=closed([], **BEHAVIOR)),
    triggers={"type": "array", "items": TRIGGER},
)
SECRET_REF = closed(["parameter", "name", "key"], parameter={"const": "host"}, name=TEXT, key=TEXT)
TRIGGER_AUTHENTICATION = closed(["secretTargetRef"], secretTargetRef={"type": "array", "items": SECRET_REF})
KEDA = {"ScaledObject": SCALED_OBJECT, "TriggerAuthentication": TRIGGER_AUTHENTICATION}

Manifests = dict[tuple[str, str], dict[str, Any]]


def render(folder: Path, *options: str) -> Manifests:
    """By kind and name."""
    plans.write(PLAN, folder / "pipeline.toml")
    command = [sys.executable, str(RENDER), str(folder / "pipeline.toml"), *NAMED, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    pages: list[dict[str, Any]] = list(yaml.safe_load_all(ended.stdout))
    found = {(page["kind"], page["metadata"]["name"]): page for page in pages}
    assert len(found) == len(pages)
    return found


@pytest.fixture
def manifests(tmp_path: Path) -> Manifests:
    return render(tmp_path)


def pod(manifests: Manifests, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment", name]["spec"]["template"]["spec"]
    return spec


WORKLOADS = ("mqinfer-coordinator", *(f"mqinfer-stage-{stage}" for stage in range(3)))


def test_every_manifest_is_what_kubernetes_and_keda_take(manifests: Manifests) -> None:
    for (kind, _), page in manifests.items():
        if page["apiVersion"] == "keda.sh/v1alpha1":
            jsonschema.validate(page["spec"], KEDA[kind])
        else:
            kubernetes_validate.validate(page, KUBERNETES, strict=True)


def test_the_schemas_refuse_what_is_misspelt(manifests: Manifests) -> None:
    deployment, scaled = manifests["Deployment", WORKLOADS[1]], manifests["ScaledObject", WORKLOADS[1]]
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 90
    scaled["spec"]["coolDownPeriod"] = 600
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(scaled["spec"], SCALED_OBJECT)


def test_each_stage_has_workers_a_scaler_and_a_budget_and_the_coordinator_is_there_once(manifests: Manifests) -> None:
    assert {name for kind, name in manifests if kind == "Deployment"} == set(WORKLOADS)
    assert {name for kind, name in manifests if kind == "PodDisruptionBudget"} == set(WORKLOADS)
    assert {name for kind, name in manifests if kind == "ScaledObject"} == set(WORKLOADS[1:])
    for stage, name in enumerate(WORKLOADS[1:]):
        assert pod(manifests, name)["containers"][0]["args"] == ["worker", "--stage", str(stage)]
        check_command(pod(manifests, name)["containers"][0]["args"])
    check_command(pod(manifests, "mqinfer-coordinator")["containers"][0]["args"])


def test_every_selector_finds_its_pods_and_no_others(manifests: Manifests) -> None:
    labels = {name: manifests["Deployment", name]["spec"]["template"]["metadata"]["labels"] for name in WORKLOADS}
    for kind in ("Deployment", "PodDisruptionBudget"):
        for name in WORKLOADS:
            wanted = manifests[kind, name]["spec"]["selector"]["matchLabels"].items()
            assert [other for other in WORKLOADS if wanted <= labels[other].items()] == [name]


def test_a_scaler_looks_at_queues_that_there_are_as_a_user_who_may(manifests: Manifests) -> None:
    topology = Topology(PLAN.name)
    for stage, name in enumerate(WORKLOADS[1:]):
        spec = manifests["ScaledObject", name]["spec"]
        assert spec["scaleTargetRef"]["name"] == name
        looked_at = [trigger["metadata"]["queueName"] for trigger in spec["triggers"]]
        assert looked_at == [topology.stage(stage).name, topology.requests.name]
        for trigger in spec["triggers"]:
            assert ("TriggerAuthentication", trigger["authenticationRef"]["name"]) in manifests


def test_no_busy_worker_is_killed(manifests: Manifests) -> None:
    drain_s = load(WorkerSettings).drain_s
    for name in WORKLOADS:
        assert pod(manifests, name)["terminationGracePeriodSeconds"] >= drain_s + 60
        assert manifests["PodDisruptionBudget", name]["spec"]["maxUnavailable"] == 1
    for name in WORKLOADS[1:]:
        spec = manifests["ScaledObject", name]["spec"]
        down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
        assert spec["minReplicaCount"] == 1  # what a coordinator holds is in no queue that a scaler sees
        assert min(spec["cooldownPeriod"], down["stabilizationWindowSeconds"]) >= 300
        assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 300}]
        assert "replicas" not in manifests["Deployment", name]["spec"]  # applying it again would undo the scaler's


def test_each_workload_gets_its_own_user_of_the_broker_and_no_password_stands_in_a_manifest(
    manifests: Manifests,
) -> None:
    roles = {user.name.removeprefix(f"{PLAN.name}-") for user in users(PLAN.name, 3)}
    for name in WORKLOADS:
        (secret,) = [volume["secret"] for volume in pod(manifests, name)["volumes"] if "secret" in volume]
        assert secret["items"] == [{"key": name.removeprefix("mqinfer-"), "path": "broker"}]
        assert secret["items"][0]["key"] in roles
        (mount,) = [m for m in pod(manifests, name)["containers"][0]["volumeMounts"] if m["name"] == "broker"]
        environment = {entry["name"]: entry["value"] for entry in pod(manifests, name)["containers"][0]["env"]}
        assert environment["MQINFER_BROKER"] == f"@{mount['mountPath']}/broker"


def test_nothing_runs_as_root_or_writes_to_its_image(manifests: Manifests) -> None:
    for name in WORKLOADS:
        assert pod(manifests, name)["securityContext"]["runAsNonRoot"]
        context = pod(manifests, name)["containers"][0]["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(("gpus", "device"), [("0", "cpu"), ("1", "cuda")])
def test_a_worker_has_the_device_that_it_is_given(tmp_path: Path, gpus: str, device: str) -> None:
    container = pod(render(tmp_path, "--gpus", gpus), "mqinfer-stage-1")["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert {"name": "MQINFER_DEVICE", "value": device} in container["env"]


def test_what_is_no_plan_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("x = 1\n")
    command = [sys.executable, str(RENDER), str(tmp_path / "plan.toml"), *NAMED]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "is not a plan" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_compose_is_what_the_compose_specification_takes() -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    jsonschema.validate(compose, schema)
    compose["services"]["coordinator"]["stop_grace_periode"] = "90s"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(compose, schema)
