"""Fleets of unlike machines, drawn at random, and the best of all that can be done with a small one: slow and exact.

The search was written for itself; nothing of it is the planner's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
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


def unlike_fleet(seed: int) -> Fleet:
    """A random fleet whose model's first layers are much larger or smaller than the others, as in many mixtures."""
    shape, load, machines = random_fleet(seed)
    rng = random.Random(f"unlike {seed}")
    first, times = rng.choice((1, 3)), rng.choice((0.2, 3.0))
    works = [times if at < first else 1.0 for at in range(len(shape.layers))]
    mean = sum(works) / len(works)
    unlike = [
        replace(layer, weight_bytes=int(layer.weight_bytes * work), work=work / mean)
        for layer, work in zip(shape.layers, works, strict=True)
    ]
    return replace(shape, layers=tuple(unlike)), load, machines


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


def alone(shape: Model, load: Load, one: Machine, how: tuple[float, float, float]) -> tuple[Array, Array]:
    """Of one machine by the first of its layers and their end: tokens per second, and the part of the rows it holds.

    Both are 0 where there is no layer.
    """
    rows, per_worker, brought = how
    layers = len(shape.layers)
    first, end = np.arange(layers)[:, None], np.arange(layers + 1)[None, :]
    begins, ends = first == 0, end == layers
    prompt = load.prompt_tokens / (load.context_tokens - load.prompt_tokens)
    work = np.concatenate([[0.0], np.cumsum([layer.work for layer in shape.layers])])
    each_s = interpolated(one.speed.layer, rows) + rows * prompt * one.speed.layer_prefill_token_s
    busy_s = interpolated(one.speed.forward, rows) + each_s * (work[end] - work[first])
    busy_s = busy_s + begins * interpolated(one.speed.embedding, rows * (1 + prompt))
    busy_s = np.maximum(busy_s + ends * interpolated(one.speed.head, rows), 1e-12)
    ways = 1 - (begins * 1 + ends * 1) / 2
    link_s = ways * rows * (1 + prompt) * shape.hidden_bytes / (one.link_bytes_per_s or np.inf)
    period_s = np.maximum(np.maximum(busy_s, link_s), (busy_s + one.hop_s + link_s) / per_worker)
    weight = np.concatenate([[0], np.cumsum([layer.weight_bytes for layer in shape.layers])])
    weights = weight[end] - weight[first] + shape.working_bytes + begins * shape.embedding_bytes
    weights = weights + ends * (shape.head_bytes + shape.head_working_bytes)
    weights = weights - (begins & ends) * shape.tied * min(shape.embedding_bytes, shape.head_bytes)
    room = one.memory_bytes - weights
    row_bytes = load.kv_tokens * shape.kv_layer_token_bytes * np.maximum(end - first, 1)
    held = np.where(row_bytes > 0, room // np.maximum(row_bytes, 1), load.concurrency)
    shares = np.where(room < 0, 0, np.minimum(held, load.concurrency)) / load.concurrency
    return np.where(end > first, brought * rows / period_s, 0.0), np.where(end > first, shares, 0.0)


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

    def rates(group: tuple[int, ...], how: tuple[float, float, float]) -> Array:
        key = (group, how)
        if key not in stage_rates:
            members = [
                (count, alone(shape, load, one, how)) for count, one in zip(group, machines, strict=True) if count
            ]
            stage_rates[key] = together(members)
        return stage_rates[key]

    for stages in range(1, min(layers, sum(counts)) + 1):
        shape_of = (comb(layers - 1, stages - 1), stages - 1)
        inner = np.array(list(combinations(range(1, layers), stages - 1)), dtype=np.int64).reshape(shape_of)
        bounds = np.hstack([np.zeros((len(inner), 1), np.int64), inner, np.full((len(inner), 1), layers)])
        firsts, ends = bounds[:, :-1].T, bounds[:, 1:].T
        for groups in assignments(counts, stages):
            how = spread(sum(map(sum, groups)), stages, load)
            tables = [rates(group, how) for group in groups]
            if min(table.max() for table in tables) <= best:  # not even with the layers that suit it best
                continue
            slowest = tables[0][firsts[0], ends[0]]
            for table, first, end in zip(tables[1:], firsts[1:], ends[1:], strict=True):
                slowest = np.minimum(slowest, table[first, end])
            best = max(best, float(slowest.max()))
    return best
