"""In fp32 the greedy tokens of a cut model are those of `generate` on the whole one, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import CANDIDATES, TINY, Tiny, save
from ring import CUTS, Ring, load, plan_of, prompts_of, reference

from mqinfer.families import VERIFIED
from mqinfer.messages import Sampling
from mqinfer.stage_engine import StageEngine

TOKENS = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint on disk, its stages, and what the whole model says."""

    folder: Path
    whole: torch.nn.Module
    prompts: Sequence[Sequence[int]]
    expected: Sequence[Sequence[int]]

    def stages(self, cuts: Sequence[int]) -> list[StageEngine]:
        """Loaded from disk."""
        return load(plan_of(self.folder, self.whole, cuts), self.folder)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The slow matrix is there for those who ask for it: `pytest -m matrix`."""
    tinies: list[object] = list(TINY)
    if "matrix" in metafunc.config.option.markexpr:
        tinies += [pytest.param(tiny, marks=pytest.mark.matrix) for tiny in CANDIDATES if tiny.family in VERIFIED]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", tinies, ids=str, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny: Tiny = request.param
    folder = tmp_path_factory.mktemp(str(tiny))
    whole = save(tiny, folder)
    prompts = prompts_of()
    return Case(folder, whole, prompts, reference(whole, prompts, TOKENS))


@pytest.fixture(scope="module")
def three(case: Case) -> list[StageEngine]:
    return case.stages(CUTS[2])


def test_the_tiny_model_does_not_repeat_itself(case: Case) -> None:
    assert len({tuple(text) for text in case.expected}) == len(case.expected)
    assert all(len(set(text)) >= 3 for text in case.expected)


@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: f"{len(cuts) - 1}-stages")
def test_a_mixed_batch_in_chunks_with_late_rows_equals_generate(case: Case, cuts: Sequence[int]) -> None:
    ring = Ring(case.stages(cuts), chunk=7)
    assert ring.generate(case.prompts, TOKENS, late=True) == case.expected
    assert ring.replays == 0


def test_a_row_alone_equals_generate(case: Case, three: list[StageEngine]) -> None:
    for prompt, text in zip(case.prompts, case.expected, strict=True):
        assert Ring(three).generate([prompt], TOKENS) == [text]


def test_whole_prompts_side_by_side_equal_generate(case: Case, three: list[StageEngine]) -> None:
    assert Ring(three, seed=1).generate(case.prompts, TOKENS) == case.expected


def test_steps_delivered_twice_change_nothing(case: Case, three: list[StageEngine]) -> None:
    ring = Ring(three, seed=2, chunk=16)
    assert ring.generate(case.prompts, TOKENS, trip=Ring.trip_with_duplicates) == case.expected
    assert ring.replays == 0


def test_rows_replayed_from_their_tokens_equal_generate(case: Case, three: list[StageEngine]) -> None:
    ring = Ring(three, seed=3, chunk=16)
    assert ring.generate(case.prompts, TOKENS, late=True, trip=Ring.trip_with_losses) == case.expected
    assert ring.replays > 0
    assert all(engine.kv_used_bytes == 0 for engine in three)


def test_drawn_tokens_are_the_same_whatever_else_is_in_the_batch(case: Case, three: list[StageEngine]) -> None:
    sampling = Sampling(temperature=0.9, top_k=60, top_p=0.95)
    alone = [Ring(three, sampling=sampling).generate([prompt], TOKENS)[0] for prompt in case.prompts]
    assert alone != case.expected, "they are to be drawn"
    mixed = Ring(three, seed=4, chunk=7, sampling=sampling)
    assert mixed.generate(case.prompts, TOKENS, late=True) == alone
    replayed = Ring(three, seed=5, chunk=16, sampling=sampling)
    assert replayed.generate(case.prompts, TOKENS, late=True, trip=Ring.trip_with_losses) == alone
    assert replayed.replays > 0
