"""What can be known of deploy/, constraints.txt and examples/ without systemd, Docker or a model running."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.core import TyperGroup

from mqinfer import settings
from mqinfer.actuators import SYSTEMD_DOWN, SYSTEMD_UP
from mqinfer.batch_files import parse_line, read_lines
from mqinfer.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
WORKER = DEPLOY / "mqinfer-worker@.service"
COORDINATOR = DEPLOY / "mqinfer-coordinator.service"
AUTOSCALER = DEPLOY / "mqinfer-autoscaler.service"
INSTALLED = "/opt/mqinfer/bin/mqinfer"

UNIT_SUFFIXES = (".service", ".target", ".slice", ".timer")
ENVIRONMENT = {"PATH": os.environ["PATH"]}

#: systemd 254 brought them; an older one says so and goes on.
NEWER_KEYS = ("RestartSteps", "RestartMaxDelaySec")


def read_unit(path: Path) -> dict[str, list[str]]:
    """Key -> its values, over all sections."""
    lines = path.read_text().replace("\\\n", "").splitlines()
    pairs = [line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line)]
    return {key: [value for other, value in pairs if other == key] for key, _ in pairs}


def compose() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return services


def check_command(arguments: list[str]) -> None:
    """Parse a command line as `mqinfer` does, without running it; an unknown option is an exception."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    context = group.context_class(group)
    _, command, rest = group.resolve_command(context, arguments)
    assert command is not None
    command.make_context(arguments[0], rest, parent=context)


def as_installed(folder: Path, *drop_ins: str) -> None:
    """Copies of all units whose programs exist on this machine; the drop-ins are the worker's."""
    for unit in [*DEPLOY.glob("mqinfer*.*"), *(DEPLOY / "night").iterdir()]:
        if unit.suffix in UNIT_SUFFIXES:
            (folder / unit.name).write_text(unit.read_text().replace(INSTALLED, sys.executable))
    for name in drop_ins:
        (folder / f"{WORKER.name}.d").mkdir(exist_ok=True)
        shutil.copy(DEPLOY / "drop-ins" / f"{name}.conf", folder / f"{WORKER.name}.d")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What systemd-analyze says."""
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("CI"):
            pytest.fail("systemd-analyze is missing (apt-get install systemd)")
        pytest.skip("systemd-analyze is not on this machine")
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False, env=ENVIRONMENT
    )


def complaints(folder: Path) -> list[str]:
    """What systemd does not like in the units of a folder."""
    units = sorted(str(unit) for unit in folder.iterdir() if unit.suffix in UNIT_SUFFIXES)
    done = analyze("verify", "--man=no", *units)
    lines = [line for line in done.stderr.splitlines() if not any(f"'{key}'" in line for key in NEWER_KEYS)]
    return lines if lines or done.returncode == 0 else [f"exit code {done.returncode}"]


def test_systemd_accepts_every_unit(tmp_path: Path) -> None:
    as_installed(tmp_path)
    assert complaints(tmp_path) == []


@pytest.mark.parametrize("drop_in", sorted(path.stem for path in (DEPLOY / "drop-ins").iterdir()))
def test_systemd_accepts_every_drop_in(drop_in: str, tmp_path: Path) -> None:
    as_installed(tmp_path, drop_in)
    assert complaints(tmp_path) == []


def test_systemd_would_complain_of_a_drop_in(tmp_path: Path) -> None:
    as_installed(tmp_path, "cpu")
    (tmp_path / f"{WORKER.name}.d" / "cpu.conf").write_text("[Service]\nNoSuchKey=1\n")
    assert "NoSuchKey" in "".join(complaints(tmp_path))


@pytest.mark.parametrize(
    ("unit", "drop_ins", "most"),
    [
        (WORKER, (), 1.7),
        (WORKER, ("one-gpu",), 1.7),
        (WORKER, ("cpu",), 1.3),
        (WORKER, ("cpu", "network"), 1.2),
        (COORDINATOR, (), 1.2),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "+".join(value) if isinstance(value, tuple) else "",
)
def test_the_sandbox_leaves_little_exposed(unit: Path, drop_ins: tuple[str, ...], most: float, tmp_path: Path) -> None:
    as_installed(tmp_path, *drop_ins)
    said = analyze("security", "--offline=yes", "--no-pager", str(tmp_path / unit.name)).stdout
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert found, said
    assert float(found[1]) <= most


@pytest.mark.parametrize(
    ("instance", "stage", "device"),
    [
        ("2", "2", "preset"),
        ("2-b", "2", "preset"),
        ("12-gpu1", "12", "cuda:1"),
        ("0-gpu10-b", "0", "cuda:10"),
        ("3-cpu", "3", "cpu"),
        ("3-cpu-b", "3", "cpu"),
        ("3-cpus", "3", "preset"),
        ("auto-gpu0", "auto", "cuda:0"),
    ],
)
def test_an_instance_says_stage_and_device(instance: str, stage: str, device: str, tmp_path: Path) -> None:
    program = tmp_path / "mqinfer"
    program.write_text('#!/bin/sh\nprintenv MQINFER_DEVICE; echo "$@"\n')
    program.chmod(0o755)
    (line,) = read_unit(WORKER)["ExecStart"]
    for escaped, plain in (("$$", "$"), ("%i", instance), ("%%", "%"), (INSTALLED, str(program))):
        line = line.replace(escaped, plain)
    preset = ENVIRONMENT | {"MQINFER_DEVICE": "preset"}
    said = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=10, check=True, env=preset).stdout
    assert said.split() == [device, "worker", "--stage", stage]


def test_the_worker_unit_runs_a_command_that_exists() -> None:
    check_command(["worker", "--stage", "2"])


@pytest.mark.parametrize("unit", [COORDINATOR, AUTOSCALER], ids=lambda unit: unit.stem)
def test_a_unit_without_a_shell_runs_a_command_that_exists(unit: Path) -> None:
    (line,) = read_unit(unit)["ExecStart"]
    program, *arguments = line.split()
    assert program == INSTALLED
    check_command(arguments)


@pytest.mark.parametrize("unit", [WORKER, COORDINATOR, AUTOSCALER], ids=lambda unit: unit.stem)
def test_a_unit_has_time_to_drain_and_comes_back(unit: Path) -> None:
    keys = read_unit(unit)
    drain_s = settings.WorkerSettings.model_fields["drain_s"].default
    assert int(keys["TimeoutStopSec"][0]) >= drain_s + 60
    assert keys["Restart"] == ["always"]
    assert keys["StartLimitIntervalSec"] == ["0"]
    assert "RestartPreventExitStatus" not in keys  # a broker that is down for a while ends in exit code 2, too


@pytest.mark.parametrize("unit", [WORKER, COORDINATOR, AUTOSCALER], ids=lambda unit: unit.stem)
def test_a_unit_says_when_it_serves_and_is_watched_and_may_load_for_as_long_as_it_takes(unit: Path) -> None:
    keys = read_unit(unit)
    assert (keys["Type"], keys["NotifyAccess"], keys["TimeoutStartSec"]) == (["notify"], ["main"], ["infinity"])
    assert int(keys["WatchdogSec"][0]) > 0
    assert "AF_UNIX" in keys["RestrictAddressFamilies"][0]  # the socket that it tells


def test_a_worker_is_not_killed_for_a_forward_that_its_coordinator_still_waits_for() -> None:
    step_timeout_s = settings.CoordinatorSettings.model_fields["step_timeout_s"].default
    assert int(read_unit(WORKER)["WatchdogSec"][0]) >= step_timeout_s


def test_the_sandbox_of_a_worker_leaves_it_the_gpu() -> None:
    keys = read_unit(WORKER)
    assert {"PrivateDevices", "MemoryDenyWriteExecute", "PrivateUsers", "ProcSubset"} & keys.keys() == set()
    assert keys["DevicePolicy"] == ["closed"]
    assert {value.split()[0] for value in keys["DeviceAllow"]} == {"char-nvidia*", "char-drm", "char-kfd"}
    assert "@resources" not in " ".join(value for value in keys["SystemCallFilter"] if value.startswith("~"))


@pytest.mark.parametrize("unit", [WORKER, COORDINATOR], ids=lambda unit: unit.stem)
def test_the_brokers_password_comes_as_a_credential_and_in_no_other_way(unit: Path) -> None:
    keys = read_unit(unit)
    (credential,) = keys["LoadCredential"]
    assert credential.startswith("broker:/etc/mqinfer/")  # the name that settings look for
    assert "amqp" not in " ".join(keys["Environment"] + keys["ExecStart"])
    assert "MQINFER_BROKER" not in (DEPLOY / "mqinfer.env.example").read_text()


def test_stopping_the_target_stops_every_actor_and_starting_it_starts_them() -> None:
    for unit in (WORKER, COORDINATOR):
        keys = read_unit(unit)
        assert keys["PartOf"] == keys["WantedBy"] == ["mqinfer.target"]
        assert keys["Slice"] == ["mqinfer.slice"]
    assert read_unit(DEPLOY / "night" / "mqinfer-night.timer")["Unit"] == ["mqinfer.target"]
    assert read_unit(DEPLOY / "night" / "mqinfer-day.timer")["Unit"] == ["mqinfer-day.target"]
    assert read_unit(DEPLOY / "night" / "mqinfer-day.target")["Conflicts"] == ["mqinfer.target"]


def test_a_worker_says_the_instance_that_its_unit_has() -> None:
    assert "MQINFER_INSTANCE=%i" in read_unit(WORKER)["Environment"]


@pytest.mark.parametrize(
    ("unit", "allowed"),
    [
        ("mqinfer-worker@2-auto1.service", True),
        ("mqinfer-worker@2.service", True),
        ("mqinfer-worker@x.service", False),
        ("mqinfer-worker@2-a.service.evil.service", True),  # an instance of the template all the same
        ("sshd.service", False),
        ("mqinfer-coordinator.service", False),
    ],
)
def test_the_autoscaler_s_rule_is_for_instances_of_the_worker_unit_alone(unit: str, allowed: bool) -> None:
    rule = (DEPLOY / "mqinfer-autoscaler.rules").read_text()
    (pattern,) = re.findall(r"/(\^.*\$)/\.test", rule)
    assert bool(re.search(pattern, unit)) is allowed
    assert f'"{read_unit(AUTOSCALER)["User"][0]}"' in rule
    assert all(f'"{command.split()[1]}"' in rule for command in (SYSTEMD_UP, SYSTEMD_DOWN))


def test_every_variable_of_the_example_is_a_setting() -> None:
    names = set(re.findall(r"MQINFER_([A-Z_]+)=", (DEPLOY / "mqinfer.env.example").read_text()))
    known = {name.upper() for name in settings.WorkerSettings.model_fields}
    assert names <= known
    assert {"PIPELINE", "DEVICE", "KV_BYTES"} <= names


def test_compose_runs_a_coordinator_and_each_stage_of_its_plan_once() -> None:
    services = compose()
    plan = services["plan"]["command"]
    stages = [service["command"][2] for service in services.values() if service.get("command", [""])[0] == "worker"]
    assert stages == [str(stage) for stage in range(int(plan[plan.index("--stages") + 1]))]
    assert services["coordinator"]["command"] == ["coordinator"]


def test_every_command_of_compose_exists() -> None:
    for service in compose().values():
        if "command" in service:
            check_command(service["command"])
    check_command([*compose()["batch"]["entrypoint"][1:], str(ROOT / "examples" / "prompts.jsonl"), "-o", "x.jsonl"])


def test_every_actor_of_compose_waits_for_the_broker_and_the_plan_and_may_drain() -> None:
    for name, service in compose().items():
        if name.startswith(("coordinator", "stage-")):
            assert service["depends_on"] == {
                "rabbitmq": {"condition": "service_healthy"},
                "plan": {"condition": "service_completed_successfully"},
            }
            assert service["stop_grace_period"] == "90s"
            assert {"MQINFER_BROKER", "MQINFER_PIPELINE"} <= service["environment"].keys()


def test_all_that_the_image_copies_is_sent_to_its_build() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    sent = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert {name for line in copied for name in line.split()} == sent


def test_the_constraints_pin_every_direct_dependency_to_a_version_that_fits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines if line and line[0] != "#")
    }
    needs = {canonicalize_name(need.name): need.specifier for need in map(Requirement, wanted)}
    assert pins.keys() == needs.keys()
    assert [name for name, specifier in needs.items() if pins[name] not in specifier] == []


def test_every_example_prompt_is_a_good_line() -> None:
    lines = [parse_line(number, raw) for number, raw in read_lines(ROOT / "examples" / "prompts.jsonl")]
    assert len({line.custom_id for line in lines}) == len(lines)
    assert {type(line.body).__name__ for line in lines} == {"ChatBody", "CompletionBody"}
