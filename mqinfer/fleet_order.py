"""Small fleets and unlike layers: which machines serve which of the real layers, in every order. Standard library only.

`fleet_search.py` takes all layers for mean ones and stages for able to change places; where a few layers are much
larger than the others that misses what fits only in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from operator import add

from mqinfer.fleet_costs import Load, Machine, Model, rows_held
from mqinfer.fleet_search import Found, Group

#: Of a small fleet.
MOST_MACHINES = 6

#: Whether a group can be a stage of the layers [first, end).
Makes = Callable[[Group, int, int], bool]


def carry(makes: Makes, layers: int, counts: Group, *, workers: int, single: bool) -> Found:
    """Stages that carry all layers with exactly so many workers, if there are any; else none.

    Whatever a set of machines has carried so far, it is best to have carried as much as it can. `single`: by stages of
    one machine each; else at least one stage has more.
    """
    reach: dict[tuple[Group, bool], tuple[int, tuple[Group, ...]]] = {((0,) * len(counts), False): (0, ())}
    furthest: dict[tuple[Group, int], int] = {}
    for used in sorted(product(*(range(count + 1) for count in counts)), key=sum):
        left = tuple(all_ - one for all_, one in zip(counts, used, strict=True))
        for shared in (False, True):
            if (used, shared) not in reach:
                continue
            done, groups = reach[used, shared]
            for group in product(*(range(count + 1) for count in left)):
                size, now = sum(group), shared or sum(group) > 1
                total = sum(used) + size
                if not size or total > workers or (single and now):
                    continue
                if total == workers:
                    if now != single and makes(group, done, layers):
                        return Found(layers, (*groups, group))
                    continue
                if (group, done) not in furthest:
                    furthest[group, done] = _furthest(makes, group, done, layers - 1)
                key = (tuple(map(add, used, group)), now)
                if furthest[group, done] > max(done, reach.get(key, (0, ()))[0]):
                    reach[key] = (furthest[group, done], (*groups, group))
    return Found(0, ())


def _furthest(makes: Makes, group: Group, first: int, most: int) -> int:
    low, high = first, most
    while low < high:
        middle = (low + high + 1) // 2
        if makes(group, first, middle):
            low = middle
        else:
            high = middle - 1
    return low


def _orders(left: list[int], begun: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Kinds of all machines, in every order."""
    if not any(left):
        yield begun
    for kind, count in enumerate(left):
        if count:
            left[kind] -= 1
            yield from _orders(left, (*begun, kind))
            left[kind] += 1


def alone_bytes(model: Model, load: Load, first: int, end: int) -> int:
    """What a machine with the layers [first, end) and all rows takes beside its working space."""
    kv_bytes = load.concurrency * load.kv_tokens * model.kv_layer_token_room_bytes * (end - first)
    return model.fixed_bytes(first, end) - model.working_bytes + kv_bytes


def short_bytes(model: Model, load: Load, machines: Sequence[Machine]) -> int:
    """The least that a further machine must take where all others have a stage alone or serve nothing."""
    layers = len(model.layers)
    least = alone_bytes(model, load, 0, layers)
    counts = tuple(machine.count for machine in machines)

    def fits(kind: int, first: int, end: int) -> bool:
        return rows_held(model, load, machines[kind], first, end) >= load.concurrency

    for order in _orders(list(counts)) if sum(counts) <= MOST_MACHINES else ():
        ends = _reach(order, layers, lambda kind, done, more: fits(kind, done, more))
        begins = _reach(order[::-1], layers, lambda kind, done, more: fits(kind, layers - more, layers - done))[::-1]
        for front, back in zip(ends, begins, strict=True):
            first = min(front, layers - 1)
            least = min(least, alone_bytes(model, load, first, max(layers - back, first + 1)))
    return least


def _reach(order: Sequence[int], layers: int, fits: Callable[[int, int, int], bool]) -> list[int]:
    """How many layers the first 0, 1, 2, … machines carry, each as many as it can."""
    reach = [0]
    for kind in order:
        done = more = reach[-1]
        while more < layers and fits(kind, done, more + 1):
            more += 1
        reach.append(more)
    return reach
