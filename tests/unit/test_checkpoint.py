"""What is known of a checkpoint without its weights, against the models that transformers makes of them."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, TINY, VOCAB, save
from transformers import PreTrainedModel

from mqinfer import checkpoint, headers, hub
from mqinfer.anatomy import dissect
from mqinfer.errors import PlanError
from mqinfer.headers import TensorHeader
from mqinfer.plan import StageSpec

LLAMA = next(tiny for tiny in TINY if tiny.family == "llama")


@pytest.fixture(scope="module", params=TINY, ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp(str(request.param))
    return folder, save(request.param, folder)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save(LLAMA, tmp_path / "Tiny_Llama!")
    return tmp_path / "Tiny_Llama!"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def test_every_parameter_of_a_family_is_counted_once(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    anatomy = checkpoint.facts(str(folder)).anatomy
    assert anatomy.parameters(0, LAYERS) == model.num_parameters()


def test_a_layer_of_a_family_holds_what_its_module_holds(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    anatomy = checkpoint.facts(str(folder)).anatomy
    (layers,) = (
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == LAYERS
    )
    for layer, module in zip(anatomy.layers, layers, strict=True):
        assert layer.parameters == sum(parameter.numel() for parameter in module.parameters())


def test_a_familys_head_is_what_a_token_is_multiplied_with(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    anatomy = checkpoint.facts(str(folder)).anatomy
    assert anatomy.head == model.get_output_embeddings().weight.numel()
    assert anatomy.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def test_a_familys_keys_and_values_are_as_large_as_its_cache(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    with torch.no_grad():
        cache = model(torch.tensor([[5]]), use_cache=True).past_key_values
    layer = cache.layers[0]
    assert checkpoint.facts(str(folder)).anatomy.kv_elements == layer.keys.numel() + layer.values.numel()


def test_the_facts_of_a_family_are_its_configs(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    facts = checkpoint.facts(str(folder))
    assert (facts.model_type, facts.vocab_size, facts.hidden_size) == (model.config.model_type, VOCAB, 32)
    assert facts.context_tokens == 256
    assert facts.anatomy.dtype == "F32"


def test_stages_of_a_plan_weigh_together_what_the_model_weighs(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    plan, facts = checkpoint.make_plan(str(folder), stages=3, dtype="bfloat16")
    table = checkpoint.stage_table(plan, facts)
    twice = facts.anatomy.head if facts.anatomy.tied else 0
    assert sum(cost.parameters for cost in table) == model.num_parameters() + twice
    assert sum(cost.weight_bytes for cost in table) == 2 * (model.num_parameters() + twice)
    assert sum(cost.share for cost in table) == pytest.approx(1)
    assert sum(cost.kv_bytes_per_token for cost in table) == 2 * LAYERS * facts.anatomy.kv_elements


def test_of_a_mixture_only_the_visited_experts_cost() -> None:
    class Config:
        num_hidden_layers = num_attention_heads = 1
        hidden_size, num_local_experts, num_experts_per_tok = 8, 4, 2

    shapes = {
        "model.embed_tokens.weight": (16, 8),
        "lm_head.weight": (16, 8),
        "model.layers.0.mlp.gate.weight": (4, 8),
        "model.layers.0.mlp.experts.0.up.weight": (8, 8),
        "model.layers.0.mlp.stacked": (4, 8, 8),
        "model.layers.0.mlp.shared_experts.up.weight": (8, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.1.extra.weight": (8, 8),
    }
    anatomy = dissect(Config(), {name: header(shape) for name, shape in shapes.items()})
    assert anatomy.layers[0].active == 4 * 8 + 8 * 8 // 2 + 4 * 8 * 8 // 2 + 8 * 8
    assert anatomy.layers[0].parameters == 4 * 8 + 8 * 8 + 4 * 8 * 8 + 8 * 8 + 8
    assert len(anatomy.layers) == 1


def header(shape: tuple[int, ...]) -> TensorHeader:
    return TensorHeader(dtype="F32", shape=shape, file="m", begin=0, end=0)


def test_causal_masks_in_old_files_are_no_parameters() -> None:
    class Config:
        num_hidden_layers = num_attention_heads = 1
        hidden_size = 8

    shapes = {"wte.weight": (16, 8), "h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,)}
    masks = {"h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": (), "h.0.attn.rotary_emb.inv_freq": (4,)}
    plain = dissect(Config(), {name: header(shape) for name, shape in shapes.items()})
    assert plain == dissect(Config(), {name: header(shape) for name, shape in (shapes | masks).items()})
    assert plain.tied
    assert plain.layers[0].parameters == 8 * 24 + 24


def test_a_plan_is_cut_by_cost_or_by_hand(llama: Path) -> None:
    plan, _ = checkpoint.make_plan(str(llama), stages=2, dtype="float32")
    assert plan.stages == (StageSpec(first=0, end=2), StageSpec(first=2, end=4))
    by_hand, _ = checkpoint.make_plan(str(llama), cuts=[1, 2], dtype="float32")
    assert [stage.end for stage in by_hand.stages] == [1, 2, 4]
    assert by_hand.digest != plan.digest


def test_a_pipeline_is_called_like_its_model_unless_it_has_a_name(llama: Path) -> None:
    assert checkpoint.make_plan(str(llama), stages=1, dtype="float32")[0].name == "tiny_llama"
    assert checkpoint.make_plan(str(llama), stages=1, dtype="float32", name="mine")[0].name == "mine"


def test_a_plan_finds_its_folder_from_anywhere(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    plan, _ = checkpoint.make_plan(llama.name, stages=1, dtype="float32")
    assert plan.model == str(llama.resolve())
    assert checkpoint.resolve(plan.model) == checkpoint.resolve_tokenizer(plan.model) == llama


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"stages": 5}, "4 layers can't be cut into 5 stages"),
        ({"stages": 0}, "4 layers can't be cut into 0 stages"),
        ({"cuts": [2, 2]}, "cuts [2, 2]: they must rise, and lie between 1 and 3"),
        ({"cuts": [4]}, "cuts [4]: they must rise"),
        ({"cuts": [0]}, "cuts [0]: they must rise"),
        ({}, "either a number of stages or the cuts"),
        ({"stages": 2, "cuts": [2]}, "either a number of stages or the cuts"),
        ({"stages": 2, "dtype": "int3"}, "dtype: 'int3' is not one of"),
        ({"stages": 2, "name": "No Name"}, "name: 'No Name' can't be a name"),
    ],
)
def test_a_plan_that_can_not_be_is_refused(llama: Path, wish: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        checkpoint.make_plan(str(llama), **{"dtype": "float32", **wish})
    assert words in str(caught.value)


def test_a_family_that_is_not_verified_is_refused_with_those_that_are(llama: Path) -> None:
    edit(llama / "config.json", lambda config: config.update(model_type="gemma4_text"))
    with pytest.raises(PlanError, match=r"model type 'gemma4_text' is not verified; these are: .*llama, .*qwen3"):
        checkpoint.facts(str(llama))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "is quantized; a checkpoint in float32, bfloat16 or float16",
        ),
        ({"hidden_size": "wide"}, "can't be used: "),
        ({"num_hidden_layers": 6}, "has no tensor of layer 4 of 6"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(llama: Path, change: dict[str, Any], words: str) -> None:
    (llama / "generation_config.json").unlink()
    edit(llama / "config.json", lambda config: config.update(change))
    with pytest.raises(PlanError) as caught:
        checkpoint.facts(str(llama))
    assert words in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [(None, "No such file"), ("{", "not JSON"), ("[]", "not a JSON object")])
def test_a_config_that_can_not_be_read_is_refused(llama: Path, text: str | None, words: str) -> None:
    (llama / "config.json").unlink()
    if text is not None:
        (llama / "config.json").write_text(text)
    with pytest.raises(PlanError, match=rf"config\.json can't be read: {words}"):
        checkpoint.facts(str(llama))


def test_weights_that_are_torn_are_refused(llama: Path) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(PlanError, match=r"model\.safetensors is torn"):
        checkpoint.facts(str(llama))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, (7, 8)),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (7,)),
        ({}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": None}, {"eos_token_id": [9, 10]}, (9, 10)),
        ({}, {"eos_token_id": None}, ()),
        (None, {"eos_token_id": 9}, (9,)),
    ],
)
def test_what_ends_an_answer_is_what_ends_it_for_generate(
    llama: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (llama / "generation_config.json").unlink()
    if generation is not None:
        (llama / "generation_config.json").write_text(json.dumps(generation))
    edit(llama / "config.json", lambda value: value.update(config))
    assert checkpoint.facts(str(llama)).eos_tokens == expected


@pytest.mark.parametrize("tokens", [[1, "2"], "2", -1, 2.0, [True]])
def test_an_end_that_is_no_token_is_refused(llama: Path, tokens: Any) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens}))
    with pytest.raises(PlanError, match=r"eos_token_id .* are no tokens"):
        checkpoint.facts(str(llama))


def test_a_model_that_names_no_limit_has_the_usual_one(tmp_path: Path) -> None:
    save(next(tiny for tiny in TINY if tiny.family == "bloom"), tmp_path)
    edit(tmp_path / "config.json", lambda config: config.pop("max_position_embeddings"))
    assert checkpoint.facts(str(tmp_path)).context_tokens == checkpoint.UNNAMED_CONTEXT_TOKENS


def flip(path: Path, tensor: TensorHeader, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[tensor.begin + place] ^= 1
    path.write_bytes(data)


def test_a_fingerprint_changes_with_one_bit_of_any_tensor(llama: Path) -> None:
    before = checkpoint.fingerprint(llama)
    tensors = headers.read_folder(llama)
    for tensor in tensors.values():
        flip(llama / tensor.file, tensor, 3)
        assert checkpoint.fingerprint(llama) != before
        flip(llama / tensor.file, tensor, 3)
    assert checkpoint.fingerprint(llama) == before


def test_a_fingerprint_changes_with_what_the_config_computes_only(llama: Path) -> None:
    before = checkpoint.fingerprint(llama)
    edit(llama / "config.json", lambda config: config.update(transformers_version="9", torch_dtype="float16"))
    assert checkpoint.fingerprint(llama) == before
    edit(llama / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    assert checkpoint.fingerprint(llama) != before


def test_the_same_weights_in_one_file_or_many_have_one_fingerprint(tmp_path: Path) -> None:
    save(dataclasses.replace(LLAMA), tmp_path / "one")
    save(dataclasses.replace(LLAMA, file_bytes=20_000), tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert checkpoint.fingerprint(tmp_path / "one") == checkpoint.fingerprint(tmp_path / "many")


def test_a_folder_is_verified_against_its_plan(llama: Path) -> None:
    plan, _ = checkpoint.make_plan(str(llama), stages=2, dtype="float32")
    checkpoint.verify(llama, plan)
    tensor = headers.read_folder(llama)["model.norm.weight"]
    flip(llama / tensor.file, tensor, 0)
    with pytest.raises(PlanError, match="has other weights or another config than the plan was made for"):
        checkpoint.verify(llama, plan)


@pytest.fixture
def on_the_hub(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint as the hub has it: the folder has no weights, only their headers come."""
    commit = "c0ffee" + "0" * 34
    tensors = headers.read_folder(llama)
    (llama / "model.safetensors").unlink()
    snapshot = llama.rename(llama.parent / commit)
    monkeypatch.setattr(hub, "commit", lambda model, revision: commit)
    monkeypatch.setattr(hub, "fetch", lambda model, revision, patterns: snapshot)
    monkeypatch.setattr(hub, "headers", lambda model, revision: tensors)
    return snapshot


def test_a_plan_of_a_hub_id_is_pinned_to_a_commit_and_reads_no_weights(on_the_hub: Path) -> None:
    plan, facts = checkpoint.make_plan("org/Tiny", stages=2, dtype="float32", revision="main")
    assert (plan.name, plan.model, plan.revision) == ("tiny", "org/Tiny", on_the_hub.name)
    assert plan.fingerprint == on_the_hub.name
    assert len(facts.anatomy.layers) == LAYERS


def test_the_snapshot_of_a_commit_is_verified_by_its_name(on_the_hub: Path, tmp_path: Path) -> None:
    plan, _ = checkpoint.make_plan("org/Tiny", stages=2, dtype="float32")
    checkpoint.verify(checkpoint.resolve(plan.model, plan.revision), plan)
    with pytest.raises(PlanError, match=r"can't be known to be org/Tiny at c0ffee0+: plan the folder itself"):
        checkpoint.verify(tmp_path, plan)


def test_a_model_that_is_one_empty_header_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(PlanError, match="no token embedding"):
        checkpoint.facts(str(llama))


def test_a_head_weighs_by_half_since_prompts_do_not_pass_it(saved: tuple[Path, PreTrainedModel]) -> None:
    anatomy = checkpoint.facts(str(saved[0])).anatomy
    *others, last = anatomy.costs
    assert others == [2 * layer.active for layer in anatomy.layers[:-1]]
    assert last == 2 * anatomy.layers[-1].active + anatomy.head
