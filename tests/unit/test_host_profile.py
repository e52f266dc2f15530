"""A machine's profile as a file, and measuring one: a tiny Llama on the CPU, a link over the memory transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import LAYERS, Tiny, save

from mqinfer import checkpoint, gpus, host_profile, link_profile, profiling
from mqinfer.errors import PlanError, TransportError
from mqinfer.host_profile import HostProfile, LinkProfile
from mqinfer.observe import STAGE_LOADED, add_sink
from mqinfer.profiling import Weights, count_layers
from mqinfer.queues import new_id
from mqinfer.settings import CoordinatorSettings, WorkerSettings
from mqinfer.transports import open_transport

PROFILE = HostProfile(
    host='a "host"',
    device="cuda:1",
    threads=2,
    model="some/model",
    fingerprint="f1",
    dtype="bfloat16",
    memory_bytes=2**34,
    context_tokens=512,
    prefill_tokens=256,
    layers=3,
    forward=((1, 0.001), (8, 0.0015)),
    layer=((1, 1e-05), (8, 0.002), (32, 0.003)),
    head=((1, 0.0),),
    embedding=((1, 0.1),),
    layer_prefill_token_s=1.5e-06,
    link=LinkProfile(hop_s=0.001, bytes_per_s=1e8),
)


def rewritten(old: str, new: str) -> str:
    text = host_profile.dumps(PROFILE)
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize("profile", [PROFILE, replace(PROFILE, link=None)])
def test_what_is_written_is_read(profile: HostProfile, tmp_path: Path) -> None:
    host_profile.write(profile, tmp_path / "host.toml")
    assert host_profile.read(tmp_path / "host.toml") == profile


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("threads = 2", "", "threads: missing"),
        ("threads = 2", "threads = 2\nthread = 2", "unknown key: thread"),
        ("[1, 0.001]", "[1, -0.001]", "seconds.forward: -0.001 is not a number of 0 or more"),
        ("[8, 0.002]", "[1, 0.002]", r"seconds.layer: \[1, 0.002\] is not \[rows, seconds\] with rising rows"),
        ("[[1, 0.1]]", "[]", "seconds.embedding: there is none"),
        ("layer_prefill_token = 1.5e-06", "layer_prefill_token = nan", "seconds.layer_prefill_token: nan is not"),
        ("[model]", "[model", "not TOML"),
        ("threads = 2", "threads = -2", "threads: -2 is not a number of 0 or more"),
        ("memory_bytes = 17179869184", "memory_bytes = -5", "memory_bytes: -5 is not a number of 0 or more"),
        ("memory_bytes = 17179869184", f"memory_bytes = {10**40}", "memory_bytes: 1000000"),
        ("[1, 0.001]", "[true, 0.001]", r"seconds.forward: \[True, 0.001\] is not \[rows, seconds\]"),
        ("[1, 0.001]", "[1, true]", r"seconds.forward: \[1, True\] is not \[rows, seconds\]"),
        ("[1, 0.001]", f"[1, {10**400}]", "seconds.forward: 1000000"),
        ("[32, 0.003]", f"[{10**400}, 0.003]", "seconds.layer: .*rising rows"),
        ("hop_s = 0.001", f"hop_s = {10**400}", "link.hop_s: 1000000.*too large"),
        ("[[1, 1e-05], [8, 0.002], [32, 0.003]]", "[[1, 0], [8, 0.0]]", "seconds.layer: a layer takes time"),
        ('"cuda:1"', '"gpu"', "device: 'gpu' is no device: write cpu, cuda or, for the second GPU, cuda:1"),
        ('"cuda:1"', '"cpu; reboot"', "device: 'cpu; reboot' is no device"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named(old: str, new: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        host_profile.loads(rewritten(old, new))


def test_prompts_are_measured_and_estimated_in_the_steps_that_a_coordinator_makes() -> None:
    step_tokens = CoordinatorSettings.model_fields["step_tokens"].default
    assert profiling.PREFILL_TOKENS == gpus.PREFILL_TOKENS == step_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save(Tiny(family="llama"), path)
    return path


WEIGHTS = Weights(work=(1.0,) * LAYERS, layer_bytes=10**6, ends_bytes=10**6, kv_layer_token_bytes=256)


def measured(folder: Path) -> HostProfile:
    plan, _ = checkpoint.make_plan(str(folder), stages=1, dtype="float32")
    settings = WorkerSettings(threads=torch.get_num_threads())
    return profiling.profile(plan, WEIGHTS, folder, settings, context_tokens=40, layers=None, tell=lambda _: None)


def test_a_profile_has_every_curve_at_1_8_and_32_rows(folder: Path) -> None:
    found = measured(folder)
    for points in (found.forward, found.layer, found.head, found.embedding):
        assert [rows for rows, _ in points] == [1, 8, 32]
        assert all(seconds >= 0 for _, seconds in points)
    assert (found.layers, found.context_tokens, found.prefill_tokens, found.dtype) == (2, 40, 40, "float32")
    assert found.memory_bytes > 0
    assert host_profile.loads(host_profile.dumps(found)) == found


def test_only_the_layers_that_are_measured_are_loaded(folder: Path) -> None:
    loaded = []
    forget = add_sink(lambda event, fields: event == STAGE_LOADED and loaded.append(fields["layers"]))
    try:
        measured(folder)
    finally:
        forget()
    assert loaded == ["[1, 2)", "[1, 3)", "[0, 1)", "[3, 4)"]


def test_parts_of_a_model_are_differences_of_stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stage takes 2 s, a layer 1 s + 0.1 s a row, the embedding 3 s and the head 5 s."""

    def seconds(watch: profiling._Stopwatch, rows: Sequence[tuple[int, int]], count: int) -> float:
        spec = watch._plan.stages[watch._stage]
        layers = spec.end - spec.first
        if count > 1:
            return float(count * layers)
        return 2 + layers * (1 + 0.1 * len(rows)) + 3 * (spec.first == 0) + 5 * (spec.end == LAYERS)

    monkeypatch.setattr(profiling._Stopwatch, "_seconds", seconds)
    found = measured(folder)
    assert dict(found.layer) == pytest.approx({1: 1.1, 8: 1.8, 32: 4.2})
    assert dict(found.forward) == pytest.approx({1: 2, 8: 2, 32: 2})
    assert dict(found.embedding) == pytest.approx({1: 3, 8: 3, 32: 3})
    assert dict(found.head) == pytest.approx({1: 5, 8: 5, 32: 5})
    assert found.layer_prefill_token_s == pytest.approx(1.0)


def test_small_layers_are_measured_many_at_once_and_no_more_than_there_is_room_for() -> None:
    small = replace(WEIGHTS, work=(1.0,) * 30, kv_layer_token_bytes=0)
    assert count_layers(small, None, 40) == 28
    large = replace(small, layer_bytes=2**30)
    assert count_layers(large, None, 40) == 2
    assert count_layers(replace(small, layer_bytes=2**25), None, 40) == 8
    assert count_layers(replace(small, layer_bytes=2**25), 2**25 * 10, 40) == 4


@pytest.mark.parametrize(
    ("weights", "free", "said"),
    [
        (replace(WEIGHTS, work=(1.0,) * 3), None, "a model of 3 layers can't be profiled"),
        (replace(WEIGHTS, layer_bytes=2**30), 2**31, "not enough memory"),
    ],
)
def test_what_can_not_be_profiled_is_said(weights: Weights, free: int | None, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        count_layers(weights, free, 40)


async def test_a_message_that_never_comes_back_ends_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_profile, "WAIT_S", 0.01)
    transport = await open_transport(f"memory://{new_id('link')}")

    async def lost(queue: str, body: bytes) -> None:
        pass

    transport.publish = lost  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(TransportError, match="no message came back through the broker within"):
            await link_profile.measure(transport)
    finally:
        await transport.close()


async def test_a_link_is_measured_and_leaves_no_queue() -> None:
    transport = await open_transport(f"memory://{new_id('link')}")
    declared: list[str] = []
    declare = transport.declare

    async def noted(spec: link_profile.QueueSpec) -> None:
        declared.append(spec.name)
        await declare(spec)

    transport.declare = noted  # type: ignore[method-assign]
    try:
        found = await link_profile.measure(transport)
        assert found.hop_s > 0
        assert found.bytes_per_s > 0
        assert [await transport.inspect(name) for name in declared] == [None]
    finally:
        await transport.close()
