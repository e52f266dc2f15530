"""Fleets of unlike machines, drawn at random, and the best of all that can be done with a small one: slow and exact.

The search was written for itself; nothing of it is the planner's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from math import comb

import numpy as np

from mqinfer.fleet_costs import SHARED, Curve, Layer, Load, Machine, Model, Speed

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
    ways = 1 - (begins + ends) / 2
    link_s = ways * rows * (1 + prompt) * shape.hidden_bytes / one.link_bytes_per_s if one.link_bytes_per_s else 0.0
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
