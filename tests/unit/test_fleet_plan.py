"""Planning for a fleet, against every possible assignment of small fleets to every possible cut."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from mqinfer import fleet_search
from mqinfer.fleet_costs import SHARED, Curve, Layer, Load, Machine, Model, Speed
from mqinfer.fleet_plan import FleetPlan, Shortage, one_more, plan_fleet

Fleet = tuple[Model, Load, list[Machine]]
Array = np.ndarray


def speed(layer_s: float, *, forward_s: float = 0.0, head_layers: float = 4.0, growth: float = 1.0) -> Speed:
    """A forward of 32 rows takes `growth` times one of a single row."""
    rows = ((1.0, 1.0), (8.0, 1 + (growth - 1) / 4), (32.0, growth))
    return Speed(
        forward=Curve(((1.0, forward_s),)),
        layer=Curve(tuple((at, layer_s * times) for at, times in rows)),
        head=Curve(tuple((at, layer_s * head_layers * times) for at, times in rows)),
        embedding=Curve(((1.0, layer_s / 50),)),
        layer_prefill_token_s=layer_s / 30,
    )


def machine(name: str, count: int, layer_s: float, memory_bytes: int = 10**9, **facts: float) -> Machine:
    return Machine(name=name, count=count, memory_bytes=memory_bytes, speed=speed(layer_s, **facts))


def model(layers: int, **facts: int) -> Model:
    sizes = {"embedding_bytes": 400, "head_bytes": 500, "kv_layer_token_bytes": 1, "hidden_bytes": 1000, **facts}
    return Model(layers=(Layer(weight_bytes=100),) * layers, **sizes)


LOAD = Load(context_tokens=4, prompt_tokens=0, concurrency=32)
#: Few rows: all of a stage's keys and values are small beside its weights.
LOAD2 = Load(context_tokens=1, prompt_tokens=0, concurrency=2)


def random_fleet(seed: int) -> Fleet:
    """At most 6 machines and 24 layers; memory is short now and then."""
    rng = random.Random(seed)
    layers = rng.choice((2, 5, 8, 12, 16, 20, 24))
    kinds = rng.randint(1, 6)
    counts = [1] * kinds
    for _ in range(rng.randint(0, 6 - kinds)):
        counts[rng.randrange(kinds)] += 1
    shape = Model(
        layers=(Layer(weight_bytes=rng.randint(50, 150)),) * layers,
        embedding_bytes=rng.randint(0, 800),
        head_bytes=rng.randint(0, 800),
        tied=rng.random() < 0.5,
        kv_layer_token_bytes=rng.choice((0, 1, 2)),
        hidden_bytes=1000,
        working_bytes=rng.randint(0, 100),
        head_working_bytes=rng.randint(0, 100),
    )
    load = Load(
        context_tokens=4,
        prompt_tokens=rng.choice((0, 2, 3)),
        concurrency=rng.choice((1, 7, 32, 128)),
        microbatch_rows=rng.choice((8, 64)),
    )
    whole_bytes = 100 * layers + 4 * load.concurrency * shape.kv_layer_token_bytes * layers + 1600
    machines = [
        Machine(
            name=f"m{kind}",
            count=count,
            memory_bytes=int(whole_bytes * rng.choice((0.2, 0.4, 0.8, 2.0)) * rng.uniform(0.7, 1.3)),
            speed=speed(
                rng.choice((0.001, 0.002, 0.004)) * rng.uniform(0.7, 1.4),
                forward_s=rng.choice((0.0, 0.003)),
                head_layers=rng.uniform(0, 8),
                growth=rng.uniform(1, 8),
            ),
            hop_s=rng.choice((0.0, 0.001, 0.02)),
            link_bytes_per_s=rng.choice((0.0, 1e7)),
        )
        for kind, count in enumerate(counts)
    ]
    return shape, load, machines


# -- exhaustive search, written for itself -----------------------------------------------------------


def interpolated(curve: Curve, rows: float) -> float:
    at, seconds = (list(column) for column in zip(*curve.points, strict=True))
    if rows > at[-1] and len(at) > 1:
        return seconds[-1] + (rows - at[-1]) * (seconds[-1] - seconds[-2]) / (at[-1] - at[-2])
    return float(np.interp(rows, at, seconds))


def spread(workers: int, stages: int, load: Load) -> tuple[float, float, float]:
    """Rows of a forward, microbatches for each worker, and what workers bring of their rates."""
    microbatches = workers if workers == stages else workers + -(-workers // 2)
    microbatches = min(max(microbatches, -(-load.concurrency // load.microbatch_rows)), load.concurrency)
    return load.concurrency / microbatches, microbatches / workers, 1.0 if workers == stages else SHARED


def alone(
    shape: Model, load: Load, one: Machine, how: tuple[float, float, float], begins: bool, ends: bool
) -> tuple[Array, Array]:
    """Of one machine by the number of its layers: tokens per second, and the part of the rows that it can hold."""
    rows, per_worker, brought = how
    count = np.arange(1, len(shape.layers) + 1)
    prompt = load.prompt_tokens / (load.context_tokens - load.prompt_tokens)
    each_s = interpolated(one.speed.layer, rows) + rows * prompt * one.speed.layer_prefill_token_s
    busy_s = interpolated(one.speed.forward, rows) + each_s * count
    busy_s += begins * interpolated(one.speed.embedding, rows * (1 + prompt)) + ends * interpolated(
        one.speed.head, rows
    )
    link_s = rows * (1 + prompt) * shape.hidden_bytes / one.link_bytes_per_s if one.link_bytes_per_s else 0.0
    period_s = np.maximum(np.maximum(busy_s, link_s), (busy_s + one.hop_s + link_s) / per_worker)
    weights = shape.layers[0].weight_bytes * count + shape.working_bytes + begins * shape.embedding_bytes
    weights += ends * (shape.head_bytes + shape.head_working_bytes)
    weights -= (begins and ends and shape.tied) * min(shape.embedding_bytes, shape.head_bytes)
    room = one.memory_bytes - weights
    row_bytes = load.kv_tokens * shape.kv_layer_token_bytes * count
    held = np.where(row_bytes > 0, room // np.maximum(row_bytes, 1), load.concurrency)
    return brought * rows / period_s, np.where(room < 0, 0, np.minimum(held, load.concurrency)) / load.concurrency


def together(members: Sequence[tuple[int, tuple[Array, Array]]]) -> Array:
    """Of a stage of these machines: the most that they do, none of them more than its part of the rows allows."""
    low = np.zeros_like(members[0][1][0])
    high = sum((count * rates for count, (rates, _) in members), low)
    for _ in range(45):
        middle = (low + high) / 2
        done = sum((count * np.minimum(rates, middle * shares) for count, (rates, shares) in members), 0 * low)
        enough = done >= middle * (1 - 1e-12)
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    held = sum((count * shares for count, (_, shares) in members), 0 * low)
    each_has_room = np.all([shares > 0 for _, (_, shares) in members], axis=0)
    return np.where(each_has_room & (held >= 1 - 1e-9), low, 0.0)


def assignments(counts: tuple[int, ...], stages: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every way to give each stage some of the machines, in order; the rest is idle."""
    if stages == 0:
        yield ()
        return
    for group in product(*(range(count + 1) for count in counts)):
        if any(group):
            left = tuple(all_ - one for all_, one in zip(counts, group, strict=True))
            for rest in assignments(left, stages - 1):
                yield (group, *rest)


def exhaustive(shape: Model, load: Load, machines: Sequence[Machine]) -> float:
    """Tokens per second of the best of all assignments and cuts; 0 where there is none."""
    layers, best = len(shape.layers), 0.0
    counts = tuple(one.count for one in machines)
    stage_rates: dict[tuple[object, ...], Array] = {}

    def rates(group: tuple[int, ...], how: tuple[float, float, float], begins: bool, ends: bool) -> Array:
        key = (group, how, begins, ends)
        if key not in stage_rates:
            members = [
                (count, alone(shape, load, one, how, begins, ends))
                for count, one in zip(group, machines, strict=True)
                if count
            ]
            stage_rates[key] = together(members)
        return stage_rates[key]

    for stages in range(1, min(layers, sum(counts)) + 1):
        shape_of = (comb(layers - 1, stages - 1), stages - 1)
        inner = np.array(list(combinations(range(1, layers), stages - 1)), dtype=np.int64).reshape(shape_of)
        bounds = np.hstack([np.zeros((len(inner), 1), np.int64), inner, np.full((len(inner), 1), layers)])
        sizes = np.diff(bounds, axis=1).T - 1
        for groups in assignments(counts, stages):
            how = spread(sum(map(sum, groups)), stages, load)
            tables = [rates(group, how, at == 0, at == stages - 1) for at, group in enumerate(groups)]
            if min(table[0] for table in tables) <= best:  # not even with one layer each
                continue
            slowest = tables[0][sizes[0]]
            for table, size in zip(tables[1:], sizes[1:], strict=True):
                slowest = np.minimum(slowest, table[size])
            best = max(best, float(slowest.max()))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_a_small_fleet_is_planned_within_5_percent_of_all_possibilities(seed: int) -> None:
    shape, load, machines = random_fleet(seed)
    best, plan = exhaustive(shape, load, machines), plan_fleet(shape, load, machines)
    if isinstance(plan, Shortage):
        assert best == 0
    else:
        assert 0.95 * best <= plan.tokens_per_s <= 1.0001 * best


def planned(shape: Model, machines: Sequence[Machine], load: Load = LOAD) -> FleetPlan:
    """A plan that there must be."""
    found = plan_fleet(shape, load, machines)
    assert isinstance(found, FleetPlan)
    return found


def layers_of(plan: FleetPlan) -> list[tuple[int, int]]:
    return [(stage.first, stage.end) for stage in plan.stages]


def members(plan: FleetPlan) -> list[dict[int, int]]:
    """Of each stage: how many machines of which kind."""
    return [{serving.machine: serving.count for serving in stage.serving} for stage in plan.stages]


def large_fleet(seed: int, kinds: int) -> Fleet:
    """64 machines for 80 layers."""
    rng = random.Random(seed)
    counts = [64 // kinds + (kind < 64 % kinds) for kind in range(kinds)]
    shape = replace(model(80), layers=(Layer(weight_bytes=1000),) * 80, working_bytes=50, head_working_bytes=20)
    load = Load(context_tokens=2, prompt_tokens=1, concurrency=rng.choice((64, 256, 512)))
    machines = [
        machine(f"m{kind}", count, rng.choice((0.0005, 0.001, 0.004)), rng.choice((10, 20, 40)) * 1000, growth=2)
        for kind, count in enumerate(counts)
    ]
    return shape, load, machines


def test_the_search_of_large_fleets_is_nearly_as_good_where_it_can_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = [plan_fleet(*random_fleet(seed)) for seed in range(100)]
    monkeypatch.setattr(fleet_search, "MOST_PAIRS", 0)
    pairs = zip(exact, (plan_fleet(*random_fleet(seed)) for seed in range(100)), strict=True)
    ratios = sorted(
        found.tokens_per_s / best.tokens_per_s if isinstance(found, FleetPlan) else 0.0
        for best, found in pairs
        if isinstance(best, FleetPlan)
    )
    assert ratios[len(ratios) // 2] > 0.99
    assert ratios[len(ratios) // 10] > 0.9


@pytest.mark.parametrize(
    "fleet", [*(random_fleet(seed) for seed in range(60)), *(large_fleet(kinds, kinds) for kinds in (1, 3, 7, 64))]
)
def test_a_plan_has_every_layer_once_and_no_machine_twice_and_passes_no_memory(fleet: Fleet) -> None:
    shape, load, machines = fleet
    plan = plan_fleet(shape, load, machines)
    if isinstance(plan, Shortage):
        assert plan.short_bytes > 0
        return
    bounds = layers_of(plan)
    assert [first for first, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == len(shape.layers)
    used = [sum(stage.get(kind, 0) for stage in members(plan)) for kind in range(len(machines))]
    assert [own + idle for own, idle in zip(used, plan.idle, strict=True)] == [one.count for one in machines]
    assert min(plan.idle) >= 0
    for stage in plan.stages:
        row_bytes = load.kv_tokens * shape.kv_layer_token_bytes * (stage.end - stage.first)
        assert sum(serving.rows * serving.count for serving in stage.serving) >= load.concurrency
        for serving in stage.serving:
            assert serving.kv_bytes >= serving.rows * row_bytes
            fixed_bytes = shape.fixed_bytes(stage.first, stage.end)
            assert fixed_bytes + serving.kv_bytes <= machines[serving.machine].memory_bytes


@pytest.mark.parametrize("seed", range(200))
def test_with_the_missing_bytes_in_one_more_machine_the_model_fits(seed: int) -> None:
    shape, load, machines = random_fleet(seed)
    found = plan_fleet(shape, load, machines)
    if isinstance(found, Shortage):
        further = machine("further", 1, 0.001, found.short_bytes + shape.working_bytes)
        assert isinstance(plan_fleet(shape, load, [*machines, further]), FleetPlan)


def test_a_fleet_without_room_for_two_layers_is_short_by_their_weights_and_keys() -> None:
    shape = model(10, embedding_bytes=0, head_bytes=0)  # a layer takes 100 bytes, and 4 x 32 for its rows
    found = plan_fleet(shape, LOAD, [machine("small", 2, 0.001, 4 * 228 + 5)])
    assert found == Shortage(2 * 228)


def test_a_machine_twice_as_fast_gets_twice_the_layers() -> None:
    plan = planned(
        model(30),
        [machine("fast", 1, 0.001, 2900, head_layers=0), machine("slow", 1, 0.002, 2900, head_layers=0)],
        LOAD2,
    )
    assert sorted(end - first for first, end in layers_of(plan)) == [10, 20]


def test_the_stage_with_the_head_has_fewer_layers() -> None:
    plan = planned(model(30), [machine("all", 2, 0.001, 2900, head_layers=10)], LOAD2)
    assert layers_of(plan) == [(0, 20), (20, 30)]


def test_unlike_machines_serve_one_stage_together_and_their_rates_add_up() -> None:
    plan = planned(model(2), [machine("fast", 1, 0.001, growth=32), machine("slow", 2, 0.002, growth=32)])
    assert members(plan) == [{0: 1, 1: 2}]
    fast, slow = plan.stages[0].serving
    assert fast.tokens_per_s == pytest.approx(2 * slow.tokens_per_s)
    assert plan.tokens_per_s == pytest.approx(fast.tokens_per_s + 2 * slow.tokens_per_s)


def test_a_machine_that_would_slow_the_others_down_is_idle() -> None:
    plan = planned(model(4), [machine("fast", 1, 0.001), machine("hopeless", 1, 1.0)])
    assert plan.idle == (0, 1)


def test_layers_that_work_more_make_a_stage_shorter() -> None:
    shape = replace(model(12), layers=tuple(Layer(weight_bytes=100, work=3 if at < 4 else 1) for at in range(12)))
    plan = planned(shape, [machine("all", 2, 0.001, 1900, head_layers=0)], LOAD2)
    assert layers_of(plan) in ([(0, 3), (3, 12)], [(0, 4), (4, 12)])


def test_a_slow_link_slows_its_machine() -> None:
    near = machine("near", 1, 0.001)
    far = replace(near, name="far", link_bytes_per_s=1000.0)
    assert planned(model(4), [near]).tokens_per_s > 10 * planned(model(4), [far]).tokens_per_s


def test_with_one_microbatch_for_each_worker_the_way_between_them_counts() -> None:
    near = [machine("near", 1, 0.001)]
    far = [replace(near[0], hop_s=0.006)]
    forward = LOAD.concurrency / planned(model(2), near).tokens_per_s
    assert LOAD.concurrency / planned(model(2), far).tokens_per_s == pytest.approx(forward + 0.006, rel=1e-3)


def test_one_more_machine_never_makes_it_slower_and_the_right_one_faster() -> None:
    shape, machines = (
        model(8, kv_layer_token_bytes=0),
        [
            machine("fast", 1, 0.001, growth=32),
            machine("hopeless", 1, 1.0, growth=32),
        ],
    )
    plan = planned(shape, machines)
    fast, hopeless = one_more(shape, LOAD, machines, plan)
    assert fast > 1.2 * plan.tokens_per_s
    assert hopeless == plan.tokens_per_s
