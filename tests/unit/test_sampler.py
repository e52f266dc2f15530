"""What is drawn, against transformers' own warpers and against the distribution itself."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mqinfer.errors import ComputeError
from mqinfer.messages import Sampling
from mqinfer.sampler import Drawn, Limits, Sampler, Shortlist, exact_shortlist, quick_shortlist, uniform

VOCAB = 200

seeds = st.integers(0, 2**63 - 1)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 1.3, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, VOCAB - 1, VOCAB, VOCAB + 5]),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.95, 0.999, 1.0]) | st.floats(0.001, 1.0),
    seed=seeds,
)


def some_logits(seed: int, rows: int = 1, *, spread: float = 3.0, step: float = 0.0, vocab: int = VOCAB) -> Tensor:
    """Random logits; with a step they are rounded to it, so that many are equal."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    return (logits / step).round() * step if step else logits


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """As `generate` does it."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1.0 else []
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList(warpers)(torch.zeros(len(logits), 0, dtype=torch.long), logits)


def limits_of(*wishes: Sampling) -> Limits:
    return Limits(
        top_k=torch.tensor([[sampling.top_k] for sampling in wishes]),
        top_p=torch.tensor([[sampling.top_p] for sampling in wishes], dtype=torch.float64),
    )


def scattered(shortlist: Shortlist, row: int, vocab: int = VOCAB) -> Tensor:
    """A row's shortlist as warped logits."""
    kept = int(shortlist.kept[row])
    logits = torch.full((vocab,), -math.inf)
    logits[shortlist.tokens[row, :kept]] = shortlist.logits[row, :kept]
    return logits


def draw(logits: Tensor, *wishes: Sampling, position: int = 0, candidates: int = 512) -> list[Drawn]:
    return Sampler(candidates).sample(logits, wishes, [position] * len(wishes))


def frequencies(logits: Tensor, sampling: Sampling, draws: int) -> Counter[int]:
    rows = Sampler().sample(logits.expand(draws, -1), [sampling] * draws, range(draws))
    return Counter(row.token for row in rows)


@given(seed=st.integers(0, 2**31), sampling=samplings)
def test_what_may_be_drawn_is_what_transformers_leaves(seed: int, sampling: Sampling) -> None:
    assume(sampling.temperature > 0)
    logits = some_logits(seed)
    expected = warped(logits, sampling)[0]
    found = scattered(exact_shortlist(logits / sampling.temperature, limits_of(sampling)), 0)
    assert torch.equal(found, expected)
    assert torch.equal(found.softmax(-1), expected.softmax(-1))


@given(seed=st.integers(0, 2**31), sampling=samplings, step=st.sampled_from([0.5, 4.0]))
def test_of_equally_likely_tokens_as_many_are_left_as_transformers_leaves(
    seed: int, sampling: Sampling, step: float
) -> None:
    assume(sampling.temperature > 0)
    logits = some_logits(seed, step=step)
    expected = warped(logits, sampling)[0]
    found = scattered(exact_shortlist(logits / sampling.temperature, limits_of(sampling)), 0)
    assert torch.equal(found.sort().values, expected.sort().values)


@given(
    seed=st.integers(0, 2**31),
    wishes=st.lists(samplings, min_size=1, max_size=5),
    step=st.sampled_from([0.0, 0.5, 4.0]),
    candidates=st.sampled_from([1, 2, 16, 64, 512]),
)
def test_a_quick_shortlist_that_is_sure_is_the_exact_one(
    seed: int, wishes: list[Sampling], step: float, candidates: int
) -> None:
    logits = some_logits(seed, len(wishes), step=step)
    exact = exact_shortlist(logits, limits_of(*wishes))
    quick, sure = quick_shortlist(logits, limits_of(*wishes), candidates)
    for row in sure.nonzero()[:, 0].tolist():
        kept = int(exact.kept[row])
        assert int(quick.kept[row]) == kept
        assert torch.equal(quick.tokens[row, :kept], exact.tokens[row, :kept])
        assert torch.equal(quick.logits[row, :kept], exact.logits[row, :kept])


def test_the_quick_way_is_sure_of_everyday_settings() -> None:
    everyday = [Sampling(top_p=0.95), Sampling(top_k=50), Sampling(top_k=40, top_p=0.9), Sampling(top_p=0.5)] * 8
    _, sure = quick_shortlist(some_logits(0, 32, spread=8.0, vocab=50_000), limits_of(*everyday), 512)
    assert int(sure.sum()) >= 31


@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.7, 0.9])
def test_the_quick_way_is_not_sure_where_rounding_decides(top_p: float) -> None:
    _, sure = quick_shortlist(torch.zeros(1, 10), limits_of(Sampling(top_p=top_p)), 512)
    assert not bool(sure[0])


def test_the_quick_way_is_not_sure_where_candidates_may_lack_equals() -> None:
    every = [Sampling(top_k=2), Sampling(top_k=2, top_p=0.55), Sampling(top_p=0.55)]
    logits = torch.zeros(3, VOCAB)
    assert not bool(quick_shortlist(logits, limits_of(*every), 2)[1].any())
    logits[:, 7] = 1.0  # the first is alone, but how likely it is among the kept depends on how many equal the second
    assert not bool(quick_shortlist(logits, limits_of(*every), 2)[1].any())


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.99}])
def test_the_ends_of_the_chance_draw_nothing_that_is_ruled_out(
    monkeypatch: pytest.MonkeyPatch, chance: float, limits: dict[str, Any]
) -> None:
    monkeypatch.setattr("mqinfer.sampler.uniform", lambda seed, position: chance)
    logits = some_logits(5)
    logits[0, [0, -1]] = -math.inf
    assert math.isfinite(logits[0, draw(logits, Sampling(temperature=1.0, **limits))[0].token])


@given(seed=st.integers(0, 2**31), wishes=st.lists(samplings, min_size=1, max_size=6), step=st.sampled_from([0.0, 1.0]))
def test_the_way_a_token_was_found_does_not_change_it(seed: int, wishes: list[Sampling], step: float) -> None:
    logits = some_logits(seed, len(wishes), step=step)
    tokens = [[row.token for row in draw(logits, *wishes, candidates=count)] for count in (1, 10, 512)]
    assert tokens[0] == tokens[1] == tokens[2]


@given(seed=st.integers(0, 2**31), wishes=st.lists(samplings, min_size=2, max_size=6), step=st.sampled_from([0.0, 1.0]))
def test_a_row_draws_the_same_alone_and_in_any_batch(seed: int, wishes: list[Sampling], step: float) -> None:
    logits = some_logits(seed, len(wishes), step=step)
    together = Sampler(32).sample(logits, wishes, range(len(wishes)))
    for row, sampling in enumerate(wishes):
        assert Sampler(32).sample(logits[row : row + 1], [sampling], [row]) == [together[row]]


@given(seed=st.integers(0, 2**31), sampling=samplings, position=st.integers(0, 2**20))
def test_only_what_may_be_drawn_is_drawn(seed: int, sampling: Sampling, position: int) -> None:
    logits = some_logits(seed)
    (drawn,) = draw(logits, sampling, position=position)
    if sampling.temperature == 0:
        assert drawn.token == int(logits.argmax())
    else:
        assert math.isfinite(warped(logits, sampling)[0, drawn.token])


def test_the_first_of_equally_likely_tokens_is_the_greedy_one() -> None:
    assert draw(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), Sampling())[0].token == 1


@pytest.mark.parametrize("temperature", [1e-6, 1e-40])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float) -> None:
    logits = some_logits(3, spread=100.0)
    assert draw(logits, Sampling(temperature=temperature))[0].token == int(logits.argmax())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.6, seed=2),
        Sampling(temperature=1.0, top_k=5, seed=3),
        Sampling(temperature=1.5, top_p=0.8, seed=4),
        Sampling(temperature=1.2, top_k=9, top_p=0.7, seed=5),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: Sampling) -> None:
    """Pearson's chi-squared; for a fair sampler more than mean + 5 deviations is rarer than one in 10,000 seeds."""
    draws = 20_000
    logits = some_logits(7, spread=1.5, vocab=20)
    expected = warped(logits, sampling)[0].double().softmax(-1) * draws
    counts = frequencies(logits, sampling, draws)
    assert set(counts) <= set(expected.nonzero()[:, 0].tolist())
    common = [token for token in range(20) if expected[token] >= 5]
    distance = sum((counts[token] - float(expected[token])) ** 2 / float(expected[token]) for token in common)
    freedom = len(common)
    assert distance < freedom + 5 * math.sqrt(2 * freedom)


def test_other_positions_and_other_seeds_draw_otherwise() -> None:
    flat = torch.zeros(1, 50_000)
    tokens = {
        draw(flat, Sampling(temperature=1.0, seed=seed), position=at)[0].token for seed in range(9) for at in range(9)
    }
    assert len(tokens) >= 79


def test_a_seed_and_a_position_give_the_same_number_for_ever() -> None:
    assert [uniform(0, 0), uniform(1, 0), uniform(0, 1), uniform(2**63 - 1, 8191)] == [
        0.17651443176981907,
        0.2375663098433094,
        0.2585963769753855,
        0.5620132582723525,
    ]


@given(seed=seeds, position=st.integers(0, 2**40))
def test_the_number_is_at_least_zero_and_less_than_one(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1e-9, 1)])
def test_of_equally_likely_tokens_top_p_keeps_the_first(top_p: float, kept: int) -> None:
    logits = torch.zeros(1, 4)
    for shortlist in (
        exact_shortlist(logits, limits_of(Sampling(top_p=top_p))),
        quick_shortlist(logits, limits_of(Sampling(top_p=top_p)), 512)[0],
    ):
        assert shortlist.tokens[0, : int(shortlist.kept[0])].tolist() == [0, 1, 2, 3][:kept]
    assert int(warped(logits, Sampling(temperature=1.0, top_p=top_p)).isfinite().sum()) == kept


def test_top_k_keeps_all_that_are_as_likely_as_the_last() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert set(frequencies(logits, Sampling(temperature=1.0, top_k=2), 500)) == {0, 1, 2, 3}


def test_equally_likely_tokens_beyond_the_candidates_are_not_forgotten() -> None:
    logits = torch.zeros(1, 1000)
    drawn = frequencies(logits, Sampling(temperature=1.0, top_k=3), 3000)
    assert len(drawn) > 800


def test_tokens_that_the_model_rules_out_are_never_drawn() -> None:
    logits = torch.full((1, 10), -math.inf)
    logits[0, [2, 7]] = 0.0
    for limits in ({}, {"top_k": 5}, {"top_p": 0.99}):
        assert set(frequencies(logits, Sampling(temperature=1.0, **limits), 100)) == {2, 7}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = some_logits(0, 2)
    logits[1, 5] = value
    with pytest.raises(ComputeError, match="not finite"):
        draw(logits, Sampling(), Sampling(temperature=1.0))


def test_no_row_draws_nothing() -> None:
    assert Sampler().sample(torch.empty(0, VOCAB), [], []) == []


def test_logprobs_are_the_models_own_whatever_the_settings() -> None:
    logits = some_logits(11, 4)
    rows = draw(
        logits,
        Sampling(),
        Sampling(logprobs=0),
        Sampling(temperature=0.3, top_k=4, top_p=0.5, logprobs=2),
        Sampling(temperature=1.0, logprobs=VOCAB + 20),
    )
    expected = logits.log_softmax(-1)
    assert rows[0].logprob is None
    for index, alternatives in ((1, 0), (2, 2), (3, VOCAB)):
        found = rows[index].logprob
        assert found is not None
        assert found.token == rows[index].token
        assert found.logprob == pytest.approx(float(expected[index, found.token]))
        assert [token for token, _ in found.top] == expected[index].topk(alternatives).indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(expected[index].topk(alternatives).values.tolist())
