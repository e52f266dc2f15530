"""Who may do what: by the regular expressions, for any pipeline and number of stages."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqinfer.errors import SettingsError
from mqinfer.permissions import User, commands, definitions, users
from mqinfer.queues import Topology, exchange_of, new_id, results

PIPELINES = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)


def by_role(pipeline: str, stages: int) -> dict[str, User]:
    """The users by what follows the pipeline's name."""
    return {user.name.removeprefix(f"{pipeline}-"): user for user in users(pipeline, stages)}


def queues(pipeline: str, stages: int) -> list[str]:
    """One queue of every kind."""
    topology = Topology(pipeline)
    specs = [
        *topology.shared(stages),
        *(topology.worker(new_id(f"s{stage}")) for stage in range(stages)),
        topology.coordinator(new_id("c")),
        topology.leases(new_id("c")),
        topology.reports(new_id("ask")),
        results(new_id("job")),
    ]
    return [spec.name for spec in specs]


def allowed(pattern: str, names: list[str]) -> set[str]:
    """Those of the names that the broker would let pass."""
    return {name for name in names if re.search(pattern, name)}


@given(pipeline=PIPELINES, stages=st.integers(1, 12), data=st.data())
def test_a_worker_reads_only_its_stages_queue_and_its_own(pipeline: str, stages: int, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    user, all_queues = by_role(pipeline, stages)[f"stage-{stage}"], queues(pipeline, stages)
    own = next(name for name in all_queues if f".worker.s{stage}-" in name)
    assert allowed(user.read, all_queues) == {Topology(pipeline).stage(stage).name, own}
    assert allowed(user.configure, all_queues) == {own}


@given(pipeline=PIPELINES, stages=st.integers(1, 12), data=st.data())
def test_a_worker_sends_only_to_its_stage_the_next_and_who_asked(
    pipeline: str, stages: int, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    user = by_role(pipeline, stages)[f"stage-{stage}"]
    sent = {name for name in queues(pipeline, stages) if re.search(user.write, exchange_of(name))}
    kinds = {name.removeprefix(Topology(pipeline).prefix).split(".")[1] for name in sent}
    stages_sent = {int(found[1]) for name in sent if (found := re.search(r"[.](?:stage[.]|worker[.]s)(\d+)", name))}
    assert kinds == {"stage", "worker", "coordinator", "reports", "dead"}
    assert stages_sent == {stage, stage + 1} & set(range(stages))


@given(pipeline=PIPELINES, other=PIPELINES, stages=st.integers(1, 12))
def test_no_user_has_a_right_on_another_pipeline(pipeline: str, other: str, stages: int) -> None:
    if pipeline == other or "collect" in (pipeline, other):
        return
    theirs = [name for name in queues(other, stages) if not name.startswith("mqinfer.results.job-")]
    exchanges = [exchange_of(name) for name in theirs]
    for user in users(pipeline, stages):
        for pattern in (user.configure, user.write, user.read):
            assert allowed(pattern, [*theirs, *exchanges, Topology(other).control]) == set()


@given(pipeline=PIPELINES, stages=st.integers(1, 12))
def test_every_queue_is_behind_an_exchange_that_is_declared(pipeline: str, stages: int) -> None:
    found = {exchange_of(name) for name in queues(pipeline, stages)}
    assert found == set(Topology(pipeline).exchanges(stages))
    assert found.isdisjoint(queues(pipeline, stages))


@pytest.mark.parametrize(
    "name", ["", "bare-1", "mqinfer", "mqinfer.demo.worker.w1", "mqinfer.demo.other", "x.requests"]
)
def test_a_queue_that_is_not_ours_is_behind_the_default_exchange(name: str) -> None:
    assert exchange_of(name) == ""


@given(pipeline=PIPELINES, stages=st.integers(1, 12))
def test_nobody_may_use_the_default_exchange(pipeline: str, stages: int) -> None:
    for user in users(pipeline, stages):
        assert allowed(user.write, ["amq.default", "amq.topic", ""]) == set()


def test_the_operator_may_do_everything_in_the_pipeline_but_read_results() -> None:
    user, all_queues = by_role("demo", 3)["operator"], queues("demo", 3)
    for pattern in (user.configure, user.write, user.read):
        assert set(all_queues) - allowed(pattern, all_queues) == {all_queues[-1]}


def test_a_batch_job_reads_results_and_answers_and_makes_nothing_else() -> None:
    user, all_queues = by_role("demo", 3)["producer"], queues("demo", 3)
    assert allowed(user.read, all_queues) == allowed(user.configure, all_queues) == set(all_queues[-2:])


def test_a_name_that_is_no_pipelines_is_refused() -> None:
    with pytest.raises(SettingsError, match="can't be a name"):
        users("demo|.*", 3)


def test_the_script_adds_every_user_with_its_rights_in_the_vhost(tmp_path: Path) -> None:
    said, rabbitmqctl = tmp_path / "said", tmp_path / "rabbitmqctl"
    rabbitmqctl.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {said}\n')
    rabbitmqctl.chmod(0o755)
    found = users("demo", 2)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", commands(found, "my vhost")], env=path, check=True, capture_output=True, timeout=30)
    expected = [
        line
        for user in found
        for line in (
            f"add_user {user.name}",
            f"set_permissions -p my vhost {user.name} {user.configure} {user.write} {user.read}",
        )
    ]
    assert said.read_text().splitlines() == expected


def test_the_definitions_name_every_user_of_the_pipeline_once() -> None:
    found = json.loads(json.dumps(definitions(users("demo", 2), "/")))["permissions"]
    assert [entry["user"] for entry in found] == [
        "demo-stage-0",
        "demo-stage-1",
        "demo-spare",
        "demo-coordinator",
        "demo-producer",
        "demo-operator",
    ]
    assert {entry["vhost"] for entry in found} == {"/"}
