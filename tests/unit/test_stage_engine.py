"""The engine on a tiny Llama: what it does with steps that are late, wrong, too large, or that make it fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Tiny, save
from ring import KV_BYTES, OWNER, Ring, load, plan_of, prompts_of, reference
from safetensors.torch import load_file, save_file

from mqinfer.errors import PlanError
from mqinfer.messages import Miss, MissReason, Row, Sampling
from mqinfer.observe import STAGE_LOADED, add_sink
from mqinfer.plan import Plan
from mqinfer.pruning import head_of
from mqinfer.stage_engine import Done, StageEngine, Work

TOKENS = 6
CUTS = (0, 2, 4)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint and what its whole model says."""

    folder: Path
    whole: torch.nn.Module
    plan: Plan
    prompts: Sequence[Sequence[int]]
    expected: Sequence[Sequence[int]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("llama")
    whole = save(Tiny(family="llama"), folder)
    prompts = prompts_of()
    return Saved(folder, whole, plan_of(folder, whole, CUTS), prompts, reference(whole, prompts, TOKENS))


@pytest.fixture
def stages(saved: Saved) -> list[StageEngine]:
    return load(saved.plan, saved.folder)


def row_of(row: int = 0, **facts: Any) -> Row:
    return Row(**{"row": row, "epoch": 0, "start": 0, "count": 3, "reserve": 16, "sampling": Sampling(), **facts})


def work_of(*rows: Row, token: int = 1) -> Work:
    """A step for the first stage."""
    return Work(owner=OWNER, rows=rows, tokens=torch.full((sum(row.count for row in rows),), token), hidden=None)


def onward(done: Done) -> Work:
    """The step that goes to the next stage."""
    return Work(owner=OWNER, rows=done.rows, tokens=None, hidden=done.hidden)


def only_miss(done: Done) -> Miss:
    """The one row's miss."""
    assert (done.rows, done.hidden, done.sampled) == ((), None, ())
    (miss,) = done.misses
    return miss


Forward = Callable[..., torch.Tensor]


def patch_forward(monkeypatch: pytest.MonkeyPatch, engine: StageEngine, make: Callable[[Forward], Forward]) -> None:
    """Let a fault into an engine's forward."""
    monkeypatch.setattr(engine._model, "forward", make(engine._model.forward))


# -- the way of a step --


def test_the_first_stage_gives_hidden_states_and_the_last_tokens(stages: list[StageEngine]) -> None:
    (first,) = stages[0].run([work_of(row_of(0), row_of(1, count=2))])
    assert first.hidden is not None
    assert first.hidden.shape == (5, 32)
    (last,) = stages[1].run([onward(first)])
    assert last.hidden is None
    assert [sampled.row for sampled in last.sampled] == [0, 1]


def test_only_rows_with_a_sampling_are_sampled_and_go_through_the_head(stages: list[StageEngine]) -> None:
    seen: list[torch.Size] = []
    head = stages[1]._model._model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    (first,) = stages[0].run([work_of(row_of(0, sampling=None), row_of(1), row_of(2, sampling=None))])
    (last,) = stages[1].run([onward(first)])
    assert [sampled.row for sampled in last.sampled] == [1]
    assert len(last.rows) == 3
    assert seen == [(1, 1, 32)]


def test_a_step_without_any_sampling_advances_its_rows(stages: list[StageEngine]) -> None:
    (first,) = stages[0].run([work_of(row_of(0, sampling=None))])
    (last,) = stages[1].run([onward(first)])
    assert (last.rows, last.sampled, last.misses) == (first.rows, (), ())
    assert not stages[1].run([onward(stages[0].run([work_of(row_of(0, start=3))])[0])])[0].misses


def test_each_work_gets_its_own_rows_back_in_order(stages: list[StageEngine]) -> None:
    works = [work_of(row_of(3), row_of(1)), work_of(row_of(2))]
    done = stages[0].run(works)
    assert [[row.row for row in one.rows] for one in done] == [[3, 1], [2]]
    assert [one.hidden.shape[0] for one in done if one.hidden is not None] == [6, 3]


def test_nothing_to_do_gives_nothing(stages: list[StageEngine]) -> None:
    assert stages[0].run([]) == []
    assert stages[0].run([work_of()])[0].rows == ()


# -- late, repeated, unknown --


def test_an_older_epoch_is_a_miss_without_a_forward(stages: list[StageEngine]) -> None:
    stages[0].run([work_of(row_of(0, epoch=1))])
    miss = only_miss(stages[0].run([work_of(row_of(0, epoch=0))])[0])
    assert (miss.reason, miss.detail, miss.epoch) == (MissReason.CACHE, "old epoch", 0)


def test_a_row_that_is_not_here_is_missed_and_its_neighbour_computed(stages: list[StageEngine]) -> None:
    (done,) = stages[0].run([work_of(row_of(0), row_of(1, start=3))])
    assert [row.row for row in done.rows] == [0]
    assert [(miss.row, miss.stage, miss.reason) for miss in done.misses] == [(1, 0, MissReason.CACHE)]


def test_a_step_and_the_next_one_can_come_in_one_forward(saved: Saved, stages: list[StageEngine]) -> None:
    prompt = torch.tensor(saved.prompts[1][:6])
    chunks = [
        Work(owner=OWNER, rows=(row_of(0, start=start, count=3),), tokens=prompt[start : start + 3], hidden=None)
        for start in (0, 3)
    ]
    apart = [stages[0].run([replace(chunk, owner="other")])[0] for chunk in chunks]
    for one, other in zip(stages[0].run(chunks), apart, strict=True):
        assert one.hidden is not None
        torch.testing.assert_close(one.hidden, other.hidden)


def test_two_owners_may_give_their_rows_the_same_number(saved: Saved, stages: list[StageEngine]) -> None:
    alone = stages[0].run([work_of(row_of(0), token=5)])[0].hidden
    stages[0].forget_all()
    works = [work_of(row_of(0), token=5), replace(work_of(row_of(0), token=9), owner="other")]
    done = stages[0].run(works)
    torch.testing.assert_close(done[0].hidden, alone)
    assert stages[0].cached_rows == 2


# -- room --


def test_what_does_not_fit_now_has_no_room_and_what_never_fits_is_told_so(saved: Saved) -> None:
    token_bytes = StageEngine.load(saved.plan, 0, folder=saved.folder, kv_bytes=0).bytes_per_token
    engine = StageEngine.load(saved.plan, 0, folder=saved.folder, kv_bytes=64 * token_bytes)
    assert engine.fits([row_of(0)])
    (done,) = engine.run([work_of(row_of(0), row_of(1), row_of(2, count=65))])
    assert [row.row for row in done.rows] == [0]
    assert [miss.reason for miss in done.misses] == [MissReason.ROOM, MissReason.NEVER]
    assert engine.kv_used_bytes == engine.kv_budget_bytes
    assert not engine.fits([row_of(1)])
    engine.forget(OWNER, [(0, 0)])
    assert (engine.kv_used_bytes, engine.cached_rows) == (0, 0)


def test_rows_that_push_each_other_out_all_come_to_their_end(saved: Saved) -> None:
    token_bytes = StageEngine.load(saved.plan, 0, folder=saved.folder, kv_bytes=0).bytes_per_token
    ring = Ring(load(saved.plan, saved.folder, kv_bytes=280 * token_bytes), seed=4)
    assert ring.generate(saved.prompts, TOKENS) == saved.expected
    assert ring.replays > 0


def test_a_row_beyond_the_models_positions_never_fits(saved: Saved) -> None:
    engine = StageEngine.load(replace(saved.plan, context_tokens=8), 0, folder=saved.folder, kv_bytes=KV_BYTES)
    assert only_miss(engine.run([work_of(row_of(0, count=9))])[0]).reason is MissReason.NEVER


def test_rows_of_a_coordinator_that_is_gone_are_forgotten(saved: Saved) -> None:
    engine = StageEngine.load(saved.plan, 0, folder=saved.folder, kv_bytes=KV_BYTES, idle_s=-1.0)
    engine.run([work_of(row_of(0))])
    assert engine.forget_idle() == 1
    assert engine.kv_used_bytes == 0


# -- faults --


@pytest.mark.parametrize("limit", [1, 2])
def test_a_forward_that_fails_for_many_rows_is_retried_with_fewer(
    saved: Saved, stages: list[StageEngine], monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    def fussy(forward: Forward) -> Forward:
        def run(inputs: torch.Tensor, extents: Sequence[Any], sampled: Sequence[int]) -> torch.Tensor:
            out = forward(inputs, extents, sampled)
            if len(extents) > limit:
                raise torch.OutOfMemoryError("too many at once")
            return out

        return run

    for engine in stages:
        patch_forward(monkeypatch, engine, fussy)
    ring = Ring(stages, seed=5, chunk=7)
    assert ring.generate(saved.prompts, TOKENS, late=True) == saved.expected
    assert ring.replays == 0


def test_a_row_that_fails_alone_is_missed_and_its_neighbours_are_computed(
    stages: list[StageEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    (healthy,) = stages[0].run([work_of(row_of(0), row_of(2))])
    stages[0].forget_all()

    def allergic(forward: Forward) -> Forward:
        def run(inputs: torch.Tensor, extents: Sequence[Any], sampled: Sequence[int]) -> torch.Tensor:
            if (inputs == 77).any():
                raise RuntimeError("a kernel failed\nin many\nlines")
            return forward(inputs, extents, sampled)

        return run

    patch_forward(monkeypatch, stages[0], allergic)
    rows = (row_of(0), row_of(1), row_of(2))
    tokens = torch.tensor([1, 1, 1, 1, 77, 1, 1, 1, 1])
    bad, other = stages[0].run([Work(owner=OWNER, rows=rows, tokens=tokens, hidden=None), work_of(row_of(3))])
    assert [row.row for row in bad.rows] == [0, 2]
    torch.testing.assert_close(bad.hidden, healthy.hidden)
    assert not other.misses
    (miss,) = bad.misses
    assert (miss.row, miss.reason, miss.detail) == (1, MissReason.COMPUTE, "RuntimeError: a kernel failed")
    assert stages[0].cached_rows == 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "python", "host"],
)
def test_a_row_without_memory_is_told_so(
    stages: list[StageEngine], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def poor(_: Forward) -> Forward:
        def run(*_: Any) -> torch.Tensor:
            raise error

        return run

    patch_forward(monkeypatch, stages[0], poor)
    assert only_miss(stages[0].run([work_of(row_of(0))])[0]).reason is MissReason.MEMORY
    assert stages[0].kv_used_bytes == 0


def test_a_cache_that_cannot_be_allocated_costs_its_row_only(
    stages: list[StageEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.empty

    def scarce(size: tuple[int, ...], **options: Any) -> torch.Tensor:
        if size[2] > 64:
            raise torch.OutOfMemoryError("no more")
        return real(size, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    (done,) = stages[0].run([work_of(row_of(0, count=65), row_of(1))])
    assert [row.row for row in done.rows] == [1]
    assert [miss.reason for miss in done.misses] == [MissReason.MEMORY]
    assert stages[0].cached_rows == 1


def test_hidden_states_that_are_not_finite_cost_their_row_only(stages: list[StageEngine]) -> None:
    (first,) = stages[0].run([work_of(row_of(0), row_of(1), row_of(2))])
    (healthy,) = stages[1].run([onward(first)])
    stages[1].forget_all()
    assert first.hidden is not None
    hidden = first.hidden.clone()
    hidden[4, 7] = float("inf")
    (done,) = stages[1].run([replace(onward(first), hidden=hidden)])
    assert [(miss.row, miss.reason, miss.detail) for miss in done.misses] == [(1, MissReason.COMPUTE, "not finite")]
    assert [s.token for s in done.sampled] == [healthy.sampled[0].token, healthy.sampled[2].token]
    assert stages[1].cached_rows == 2


def test_a_middle_stage_passes_on_nothing_that_is_not_finite(saved: Saved) -> None:
    middle = StageEngine.load(
        plan_of(saved.folder, saved.whole, (0, 1, 3, 4)), 1, folder=saved.folder, kv_bytes=KV_BYTES
    )
    hidden = torch.randn(6, 32)
    hidden[1] = float("nan")
    (done,) = middle.run([Work(owner=OWNER, rows=(row_of(0), row_of(1)), tokens=None, hidden=hidden)])
    assert [row.row for row in done.rows] == [1]
    assert done.hidden is not None
    assert done.hidden.isfinite().all()


@pytest.mark.parametrize("token", [-1, 128])
def test_a_token_outside_of_the_vocabulary_costs_its_row_only(stages: list[StageEngine], token: int) -> None:
    tokens = torch.tensor([1, 1, 1, 1, token, 1])
    (done,) = stages[0].run([Work(owner=OWNER, rows=(row_of(0), row_of(1)), tokens=tokens, hidden=None)])
    assert [row.row for row in done.rows] == [0]
    assert [(miss.row, miss.reason) for miss in done.misses] == [(1, MissReason.COMPUTE)]


@pytest.mark.parametrize(
    "work",
    [
        Work(owner=OWNER, rows=(row_of(0),), tokens=torch.ones(2, dtype=torch.int64), hidden=None),
        Work(owner=OWNER, rows=(row_of(0, count=0),), tokens=torch.ones(0, dtype=torch.int64), hidden=None),
        Work(owner=OWNER, rows=(row_of(0, start=-3),), tokens=torch.ones(3, dtype=torch.int64), hidden=None),
        Work(owner=OWNER, rows=(row_of(0),), tokens=None, hidden=None),
    ],
    ids=["too few", "none", "before the beginning", "no tensor"],
)
def test_a_work_that_contradicts_itself_is_missed(stages: list[StageEngine], work: Work) -> None:
    good, bad = stages[0].run([work_of(row_of(7)), work])
    assert not good.misses
    assert only_miss(bad).row == 0


# -- loading --


def test_the_stages_together_hold_every_weight_once(saved: Saved, stages: list[StageEngine]) -> None:
    norm_bytes = 32 * 4  # the final norm is read by every stage: it is smaller than the code that would leave it out
    whole_bytes = sum(parameter.nbytes for parameter in saved.whole.parameters())
    assert sum(engine.weight_bytes for engine in stages) == whole_bytes + norm_bytes
    assert [(engine.first, engine.last) for engine in stages] == [(True, False), (False, True)]


def test_only_the_last_stage_keeps_a_head_that_is_tied(tmp_path: Path) -> None:
    whole = save(Tiny(family="qwen2", tied=True), tmp_path)
    engines = load(plan_of(tmp_path, whole, CUTS), tmp_path)
    assert [type(head_of(engine._model._model)) for engine in engines] == [torch.nn.Identity, torch.nn.Linear]


def test_a_stage_in_another_dtype_takes_its_bytes(saved: Saved, stages: list[StageEngine]) -> None:
    half = StageEngine.load(replace(saved.plan, dtype="bfloat16"), 0, folder=saved.folder, kv_bytes=KV_BYTES)
    assert half.weight_bytes * 2 == stages[0].weight_bytes
    assert half.bytes_per_token * 2 == stages[0].bytes_per_token
    (done,) = half.run([work_of(row_of(0))])
    assert done.hidden is not None
    assert done.hidden.dtype is torch.bfloat16


def test_loading_says_what_it_took(saved: Saved) -> None:
    events: list[tuple[str, Any]] = []
    remove = add_sink(lambda event, fields: events.append((event, fields)))
    StageEngine.load(saved.plan, 1, folder=saved.folder, kv_bytes=KV_BYTES)
    remove()
    assert [(event, fields["stage"]) for event, fields in events] == [(STAGE_LOADED, 1)]
    assert events[0][1]["weight_bytes"] > 0


def copy_without(saved: Saved, folder: Path, key: str) -> Path:
    """The checkpoint without one tensor."""
    tensors = load_file(saved.folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((saved.folder / "config.json").read_text())
    return folder


def test_a_missing_tensor_is_named(saved: Saved, tmp_path: Path) -> None:
    folder = copy_without(saved, tmp_path, "model.layers.3.mlp.up_proj.weight")
    with pytest.raises(PlanError, match=r"lacks model\.layers\.3\.mlp\.up_proj\.weight"):
        StageEngine.load(saved.plan, 1, folder=folder, kv_bytes=KV_BYTES)


def test_a_tensor_of_another_stage_is_not_missed(saved: Saved, tmp_path: Path) -> None:
    folder = copy_without(saved, tmp_path, "model.layers.3.mlp.up_proj.weight")
    assert StageEngine.load(saved.plan, 0, folder=folder, kv_bytes=KV_BYTES).first


def test_a_truncated_file_is_a_plan_error(saved: Saved, tmp_path: Path) -> None:
    copy_without(saved, tmp_path, "lm_head.weight")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PlanError, match="can't be read"):
        StageEngine.load(saved.plan, 0, folder=tmp_path, kv_bytes=KV_BYTES)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"model_type": "mamba"}, "'mamba' are not verified"),
        ({"model_type": "mistral"}, "model_type 'llama'"),
        ({"hidden_size": 64}, "hidden_size 32"),
        ({"vocab_size": 64}, "vocab_size 128"),
    ],
)
def test_a_plan_for_another_model_is_refused(saved: Saved, facts: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        StageEngine.load(replace(saved.plan, **facts), 0, folder=saved.folder, kv_bytes=KV_BYTES)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_hidden_layers": 6}, "6 layers"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"intermediate_size": 48}, "does not fit its config"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    saved: Saved, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    config = json.loads((saved.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **settings}))
    (tmp_path / "model.safetensors").write_bytes((saved.folder / "model.safetensors").read_bytes())
    with pytest.raises(PlanError, match=said):
        StageEngine.load(saved.plan, 0, folder=tmp_path, kv_bytes=KV_BYTES)


def test_positions_end_where_the_rotary_encoding_would_depend_on_the_neighbours(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    whole = save(
        Tiny(family="phi3", settings={"rope_parameters": rope, "original_max_position_embeddings": 64}), tmp_path
    )
    (engine,) = load(plan_of(tmp_path, whole, (0, 4)), tmp_path)
    assert not engine.run([work_of(row_of(0, count=64))])[0].misses
    miss = only_miss(engine.run([work_of(row_of(0, start=64, count=1))])[0])
    assert (miss.reason, miss.detail) == (MissReason.NEVER, "the model's positions end at 64")
