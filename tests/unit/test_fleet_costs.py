"""What a stage costs a machine: curves, how rows are spread, and who holds how much of a stage's work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqinfer import gpus
from mqinfer.batching import busy_target
from mqinfer.errors import SettingsError
from mqinfer.fleet_costs import Curve, Layer, Load, Model, flight, stage_rate

RATES = st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 1)), min_size=1, max_size=6)


def test_a_curve_is_straight_between_its_points_and_beyond_and_level_before() -> None:
    curve = Curve(((2, 1.0), (4, 3.0), (8, 4.0)))
    assert [curve.at(rows) for rows in (1, 2, 3, 4, 6, 8, 16)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 6.0]
    assert Curve(((1, 0.5),)).at(100) == 0.5


def test_a_curve_that_falls_does_not_go_below_nothing() -> None:
    assert Curve(((1, 1.0), (2, 0.5))).at(100) == 0.0


@pytest.mark.parametrize("points", [(), ((2, 1.0), (1, 1.0)), ((1, 1.0), (1, 1.0)), ((1, -1.0),)])
def test_a_curve_of_no_rising_rows_or_of_negative_seconds_is_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(SettingsError, match="rising rows"):
        Curve(points)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 500))
def test_rows_are_spread_as_the_coordinator_spreads_them(consumers: list[int], concurrency: int) -> None:
    load = Load(context_tokens=1, prompt_tokens=0, concurrency=concurrency, microbatch_rows=64)
    microbatches = min(max(busy_target(consumers), -(-concurrency // 64)), concurrency)
    spread = flight(sum(consumers), len(consumers), load)
    assert spread.rows == concurrency / microbatches
    assert spread.per_worker == microbatches / sum(consumers)


def test_workers_that_hold_every_row_add_up() -> None:
    assert stage_rate([3.0, 4.0, 5.0], [1.0, 1.0, 1.0]) == 12.0


def test_a_worker_does_no_more_than_its_part_of_the_rows() -> None:
    # the quick one has room for half of the rows: it does as much as the other
    assert stage_rate([100.0, 4.0], [0.5, 1.0]) == pytest.approx(8.0)


def test_a_stage_that_can_not_hold_every_row_does_nothing() -> None:
    assert stage_rate([1.0, 1.0], [0.5, 0.4]) == 0.0


@given(RATES)
def test_a_stage_s_rate_is_the_largest_at_which_its_workers_do_it_all(workers: list[tuple[float, float]]) -> None:
    rates, shares = zip(*workers, strict=True)

    def done(rate: float) -> float:
        return sum(min(own, rate * share) for own, share in workers)

    rate = stage_rate(rates, shares)
    if sum(shares) < 1 - 1e-9:  # nearly all rows are all
        assert rate == 0
    else:
        assert done(rate) == pytest.approx(rate)
        assert done(1.01 * rate) < 1.01 * rate


@pytest.mark.parametrize(
    "facts", [{"prompt_tokens": 8}, {"prompt_tokens": -1}, {"concurrency": 0}, {"microbatch_rows": 0}]
)
def test_a_load_that_can_not_be_is_refused(facts: dict[str, int]) -> None:
    with pytest.raises(SettingsError):
        Load(**{"context_tokens": 8, "prompt_tokens": 4, "concurrency": 1, **facts})


def test_a_tied_head_is_held_once_where_the_embedding_is_too() -> None:
    facts = {"embedding_bytes": 50, "head_bytes": 60, "kv_layer_token_bytes": 0, "hidden_bytes": 0, "working_bytes": 1}
    tied = Model(layers=(Layer(weight_bytes=10),) * 2, tied=True, head_working_bytes=2, **facts)
    assert (tied.fixed_bytes(0, 2), tied.fixed_bytes(0, 1), tied.fixed_bytes(1, 2)) == (20 + 60 + 3, 61, 73)


def test_a_gpu_reads_weights_for_few_rows_and_multiplies_for_many() -> None:
    gpu = gpus.GPUS["A100-80GB"]
    work = gpus.Work(layer_parameters=9e8, layer_active=9e8, head_parameters=10**8, itemsize=2, layer_kv_bytes=0)
    speed = gpus.speed(gpu, work)
    assert speed.layer.at(1) == pytest.approx(9e8 * 2 / (gpu.bytes_per_s * gpus.BANDWIDTH_SHARE))
    assert speed.layer.at(8) == speed.layer.at(1)
    assert speed.layer.at(512) == pytest.approx(2 * 9e8 * 512 / (gpu.flops_16 * gpus.FLOPS_SHARE))


def test_small_layers_take_what_starting_kernels_takes_and_float32_multiplies_slower() -> None:
    small = gpus.Work(layer_parameters=1e6, layer_active=1e6, head_parameters=0, itemsize=2, layer_kv_bytes=0)
    assert gpus.speed(gpus.GPUS["T4"], small).layer.at(32) == gpus.LAYER_S
    large = {"layer_parameters": 9e8, "layer_active": 9e8, "head_parameters": 0, "layer_kv_bytes": 0}
    halves, floats = (gpus.speed(gpus.GPUS["T4"], gpus.Work(itemsize=itemsize, **large)) for itemsize in (2, 4))
    assert floats.layer_prefill_token_s > 4 * halves.layer_prefill_token_s


def test_a_mixture_reads_only_the_experts_that_its_tokens_visit() -> None:
    facts = {"head_parameters": 0, "itemsize": 2, "layer_kv_bytes": 0}
    mixture = gpus.Work(layer_parameters=64e9, layer_active=4e9, **facts)
    speed = gpus.speed(gpus.GPUS["H200"], mixture)
    assert speed.layer.at(8) == pytest.approx(8 * speed.layer.at(1))
    assert speed.layer.at(32) == pytest.approx(16 * speed.layer.at(1))
