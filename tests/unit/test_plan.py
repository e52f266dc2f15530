"""The plan: what a person may write into it, and what its digest binds."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mqinfer import plan as plans
from mqinfer.errors import PlanError
from mqinfer.plan import Plan, StageSpec, dumps, loads

PLAN = Plan(
    name="smol",
    model="/models/SmolLM2-135M-Instruct",
    dtype="float32",
    stages=(StageSpec(first=0, end=13), StageSpec(first=13, end=26), StageSpec(first=26, end=30)),
    fingerprint="5f0e",
    model_type="llama",
    hidden_size=576,
    vocab_size=49152,
    context_tokens=8192,
    eos_tokens=(2,),
)


def changed(old: str, new: str) -> str:
    text = dumps(PLAN)
    assert old in text
    return text.replace(old, new)


def test_a_plan_is_the_same_after_writing_and_reading() -> None:
    assert loads(dumps(PLAN)) == PLAN


@example(text='\x00\x1f\x7f\x85"\\\r\n', tokens=[])
@given(text=st.text(st.characters(exclude_categories=("Cs",))), tokens=st.lists(st.integers(0, 2**31)))
def test_any_text_survives_the_file(text: str, tokens: list[int]) -> None:
    plan = dataclasses.replace(PLAN, model=text, fingerprint=text, eos_tokens=tuple(tokens))
    assert loads(dumps(plan)) == plan


def test_the_file_shows_half_open_ranges() -> None:
    assert tomllib.loads(dumps(PLAN))["stages"] == [[0, 13], [13, 26], [26, 30]]


def test_the_file_says_what_is_not_to_be_edited() -> None:
    assert "do not edit. For another model make another plan.\n[checkpoint]" in dumps(PLAN)


def test_the_digest_is_sixteen_hex_digits_that_never_change() -> None:
    assert PLAN.digest == "cae3c6ed7952a9a8"


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"fingerprint": "5f0f"},
        {"revision": "9a"},
        {"stages": (StageSpec(first=0, end=12), *(StageSpec(first=12, end=26), StageSpec(first=26, end=30)))},
        {"stages": (StageSpec(first=0, end=30),)},
    ],
)
def test_the_digest_binds_weights_dtype_and_cuts(change: dict[str, object]) -> None:
    assert dataclasses.replace(PLAN, **change).digest != PLAN.digest


def test_the_digest_binds_the_id_of_a_hub_model() -> None:
    hub = dataclasses.replace(PLAN, revision="9a", model="org/a")
    assert hub.digest != dataclasses.replace(hub, model="org/b").digest


@pytest.mark.parametrize("change", [{"name": "other"}, {"model": "/mnt/elsewhere"}, {"eos_tokens": (2, 7)}])
def test_the_digest_leaves_name_folder_and_facts_free(change: dict[str, object]) -> None:
    assert dataclasses.replace(PLAN, **change).digest == PLAN.digest


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[[0, 13], [13, 26], [26, 30]]", "[[1, 13], [13, 30]]", "stages: stage 0 begins at layer 1 instead of 0"),
        ("[[0, 13], [13, 26], [26, 30]]", "[[0, 13], [14, 30]]", "stages: stage 1 begins at layer 14 instead of 13"),
        ("[[0, 13], [13, 26], [26, 30]]", "[[0, 13], [13, 13], [13, 30]]", "stage 1, [13, 13], has no layer"),
        ("[[0, 13], [13, 26], [26, 30]]", "[[0, 29]]", "stages: they end at layer 29, but the model has 30 layers"),
        ("[[0, 13], [13, 26], [26, 30]]", "[]", "stages: there is none"),
        ("[[0, 13], [13, 26], [26, 30]]", "[[0, 13, 26, 30]]", "stages: [0, 13, 26, 30] is not a pair"),
        ("[[0, 13], [13, 26], [26, 30]]", "[0, 30]", "stages: 0 is not a pair"),
        ("[[0, 13], [13, 26], [26, 30]]", "[[0, 30.0]]", "stages: 30.0 is not a whole number"),
        ("[[0, 13], [13, 26], [26, 30]]", "[[false, 30]]", "stages: False is not a whole number"),
        ("[[0, 13], [13, 26], [26, 30]]", "3", "stages: 3 is not a list"),
        ('dtype = "float32"', 'dtype = "int4"', "dtype: 'int4' is not one of float32, bfloat16, float16"),
        ('dtype = "float32"', "dtype = 32", "dtype: 32 is not a text"),
        ('dtype = "float32"', "", "dtype: missing"),
        ('name = "smol"', 'name = "Smol!"', "name: 'Smol!' can't be a name"),
        ('name = "smol"', 'name = "smol"\ncodec = "raw"', "unknown key: codec"),
        ("layers = 30", "layers = 30\nheads = 9", "unknown key: checkpoint.heads"),
        ("layers = 30\n", "", "checkpoint.layers: missing"),
        ("layers = 30", "layers = true", "checkpoint.layers: True is not a whole number"),
        ("hidden_size = 576", "hidden_size = 0", "hidden_size: 0 is less than 1"),
        ("eos_tokens = [2]", "eos_tokens = [-1]", "eos_tokens: -1 is less than 0"),
        ("eos_tokens = [2]", 'eos_tokens = ["2"]', "checkpoint.eos_tokens: '2' is not a whole number"),
        ("[checkpoint]", "[checkpoints]", "checkpoint: missing"),
        ("[checkpoint]", "[checkpoint", "not TOML: "),
    ],
)
def test_a_wrong_key_is_refused_by_name(old: str, new: str, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        loads(changed(old, new))
    assert words in str(caught.value)


def test_a_plan_that_is_made_by_hand_is_checked_too() -> None:
    with pytest.raises(PlanError, match="stage 0 begins at layer 1"):
        dataclasses.replace(PLAN, stages=(StageSpec(first=1, end=30),))


def test_a_plan_is_written_and_read_back_with_nothing_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.toml"
    plans.write(dataclasses.replace(PLAN, name="older"), path)
    plans.write(PLAN, path)
    assert plans.read(path) == PLAN
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_plan_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pipeline.toml"
    plans.write(PLAN, path)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(PlanError, match=r"can't write the plan .*: No space left on device"):
        plans.write(dataclasses.replace(PLAN, name="newer"), path)
    assert plans.read(path) == PLAN
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"can't read the plan .*none\.toml: No such file"):
        plans.read(tmp_path / "none.toml")


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.toml"
    path.write_text(changed('dtype = "float32"', 'dtype = "int4"'))
    with pytest.raises(PlanError, match=r"pipeline\.toml: dtype: 'int4'"):
        plans.read(path)
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(PlanError, match="not UTF-8"):
        plans.read(path)
