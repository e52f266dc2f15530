"""A fleet's file and a checkpoint's facts as planning takes them, without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mqinfer import fleet_file, host_profile, kv_cache
from mqinfer.anatomy import Anatomy, LayerFacts
from mqinfer.checkpoint import CheckpointFacts
from mqinfer.errors import PlanError

FACTS = CheckpointFacts(
    revision="",
    fingerprint="f1",
    model_type="llama",
    hidden_size=64,
    vocab_size=1000,
    context_tokens=4096,
    eos_tokens=(),
    anatomy=Anatomy(
        layers=(LayerFacts(parameters=1000, active=1000),) * 4,
        embedding=64_000,
        final=64,
        head=64_000,
        tied=False,
        kv_elements=128,
        dtype="F32",
    ),
)


@pytest.mark.parametrize(("context", "prompt", "share"), [(100, 90, 9), (65, 64, 64), (64, 32, 1)])
def test_room_that_the_cache_rounds_up_is_not_taken_for_tokens_to_generate(
    context: int, prompt: int, share: float
) -> None:
    load = fleet_file.load_of(context, prompt, 8, FACTS)
    assert load.prompt_share == share
    assert load.context_tokens == context
    assert load.kv_tokens == -(-context // kv_cache.ROUND_TOKENS) * kv_cache.ROUND_TOKENS


def test_a_layer_has_a_cost_however_little_time_it_takes() -> None:
    nothing = ((1, 0.0),)
    profile = host_profile.HostProfile(
        host="h",
        device="cpu",
        threads=0,
        model="m",
        fingerprint="f1",
        dtype="float32",
        memory_bytes=0,
        context_tokens=64,
        prefill_tokens=64,
        layers=2,
        forward=nothing,
        layer=((1, 1e-12),),
        head=nothing,
        embedding=nothing,
        layer_prefill_token_s=0.0,
    )
    assert fleet_file.stage_costs(FACTS, profile, 32) == [1, 1, 1, 1]


@pytest.mark.parametrize(("family", "copies"), [("llama", 1), ("falcon", 2), ("bloom", 2)])
def test_keys_and_values_have_room_twice_in_families_whose_forwards_copy_them(family: str, copies: int) -> None:
    load = fleet_file.load_of(64, 0, 8, FACTS)
    shape = fleet_file.model_of(replace(FACTS, model_type=family), "float16", load, step_tokens=16)
    assert shape.kv_copies == copies


@pytest.mark.parametrize("gpu", ["T4", "P100", "V100-16GB"])
def test_a_gpu_without_bfloat16_is_not_planned_for_in_it(gpu: str, tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[[machine]]\nname = "a"\ngpu = "{gpu}"\n')
    load = fleet_file.load_of(64, 0, 8, FACTS)
    with pytest.raises(PlanError, match=f"machine a: gpu: {gpu} has no bfloat16: plan with --dtype float16"):
        fleet_file.read_fleet(fleet, FACTS, "bfloat16", load)
    [found] = fleet_file.read_fleet(fleet, FACTS, "float16", load)
    assert found.estimated
