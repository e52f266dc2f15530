"""Which machines could serve a stage together, so that all layers are carried at a given rate: pure, no dependencies.

Every layer counts as a mean one here and stages may come in any order; `fleet_plan.py` cuts the real layers for the
groups that are found. All groups of a small fleet are tried (`Lattice`), of a large one those that lie side by side
when its machines are sorted (`Line`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from itertools import count as naturals
from math import prod
from operator import mul
from typing import NamedTuple

from mqinfer.fleet_costs import Flight, Layer, Load, Machine, Model, forward_s, layer_s, rows_held, worker_rates

#: How many machines of each kind serve a stage together.
Group = tuple[int, ...]
#: A number for one machine alone: by kind, place and layers, from 0 on.
Parts = Sequence[Sequence[Sequence[float]]]
#: Where a stage is: it may have the embedding, the head, or both, besides its layers.
INNER, FIRST, LAST, WHOLE = range(4)

Reach = tuple[list[int], list[int]]
Origin = tuple[list[tuple[int, int, bool]], list[tuple[int, int, bool]]]

#: Pairs of a set of machines and a group out of it that `Lattice` looks at, at most: 3**8 for eight unlike machines.
MOST_PAIRS = 7000
#: Parts that add up to nearly 1 are the whole.
SLACK = 1e-9
#: The part of a machine that has no room for a single row: no stage has it among its workers.
NEVER = -1e4


@dataclass(frozen=True, slots=True)
class Terms:
    """What one machine does alone."""

    #: Tokens per second.
    rates: Parts
    #: The part of all rows whose keys and values have room, or NEVER.
    shares: Parts

    def parts(self, rate: float) -> list[list[list[float]]]:
        """What part of the work of a stage at this rate each does."""
        return [
            [
                [part if (part := own / rate) < share else share for own, share in zip(rates, shares, strict=True)]
                for rates, shares in zip(by_rate, by_share, strict=True)
            ]
            for by_rate, by_share in zip(self.rates, self.shares, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Found:
    """Stages in their order, and how many layers they carry together."""

    layers: int
    groups: tuple[Group, ...]


def alike(model: Model, layer_bytes: int) -> Model:
    """The model with layers that all work as the mean one does and weigh so much."""
    return replace(model, layers=(Layer(weight_bytes=layer_bytes, work=1.0),) * len(model.layers))


def shares(model: Model, load: Load, machines: Sequence[Machine]) -> list[list[list[float]]]:
    """As in `Terms`."""
    count = len(model.layers)
    return [
        [
            [1.0, *(_share(model, load, machine, *bounds) for bounds in ranges(count, place))]
            for place in (INNER, FIRST, LAST, WHOLE)
        ]
        for machine in machines
    ]


def _share(model: Model, load: Load, machine: Machine, first: int, end: int) -> float:
    return rows_held(model, load, machine, first, end) / load.concurrency or NEVER


def rates(model: Model, load: Load, machines: Sequence[Machine], flight: Flight) -> list[list[list[float]]]:
    """As in `Terms`."""
    return [
        [_rates(model, load, machine, flight, place) for place in (INNER, FIRST, LAST, WHOLE)] for machine in machines
    ]


def _rates(model: Model, load: Load, machine: Machine, flight: Flight, place: int) -> list[float]:
    bounds = ranges(len(model.layers), place)
    if not bounds:
        return [float("inf")]
    base_s = forward_s(model, load, machine.speed, *bounds[0], flight.rows)
    more_s = layer_s(load, machine.speed, flight.rows)
    each_s = [base_s + more_s * (end - first - bounds[0][1] + bounds[0][0]) for first, end in bounds]
    return [float("inf"), *worker_rates(model, load, machine, flight, *bounds[0], each_s)]


def ranges(layers: int, place: int) -> list[tuple[int, int]]:
    """Layers [first, end) that stand for a stage of 1, 2, … layers at the place; of the whole model always all."""
    if place == WHOLE:
        return [(0, layers)] * layers
    if place == FIRST:
        return [(0, end) for end in range(1, layers)]
    if place == LAST:
        return [(first, layers) for first in range(layers - 1, 0, -1)]
    return [(1, end) for end in range(2, layers)]


class Step(NamedTuple):
    """How a line's search came to a point."""

    begin: int
    has: int
    #: Whether the machines from `begin` on are a stage.
    used: bool


class Lattice:
    """All sets of a fleet's machines, each with all groups that can be taken out of it."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._sets: list[Group] = [*product(*(range(count + 1) for count in counts))]
        number = {machines: index for index, machines in enumerate(self._sets)}
        self._sizes = [sum(machines) for machines in self._sets]
        #: By set, from the second on: the numbers of what is left and of the group.
        self._pairs = [
            [
                (number[tuple(all_ - one for all_, one in zip(machines, group, strict=True))], number[group])
                for group in product(*(range(count + 1) for count in machines))
                if any(group)
            ]
            for machines in self._sets
        ]

    @staticmethod
    def fits(counts: Sequence[int]) -> bool:
        """Whether the fleet is small enough."""
        return prod((count + 1) * (count + 2) // 2 for count in counts) <= MOST_PAIRS

    def best(self, parts: Parts, *, workers: int, single: bool) -> Found:
        """Carry as many layers as can be, by stages that each do all of the work, with exactly so many `workers`.

        `single`: by stages of one machine each; else at least one stage has more.
        """
        carried = self._all_carried(parts)
        reach, before = self._inner(carried, workers, single)
        best, last = 0, (0, 0, False)
        for machines in (index for index, size in enumerate(self._sizes) if size == workers):
            for left, group in self._pairs[machines]:
                own = carried[group][LAST if left else WHOLE]
                shared = self._sizes[group] > 1
                for before_shared in (False,) if single or not left else (False, True):
                    if not own or (shared or before_shared) == single or not (reach[before_shared][left] or not left):
                        continue
                    if reach[before_shared][left] + own > best:
                        best, last = reach[before_shared][left] + own, (left, group, before_shared)
        return Found(best, self._unwound(before, last)) if best else Found(0, ())

    def without_ends(self, parts: Parts, place: int) -> int:
        """Layers that can be carried at most where one stage is at the `place` and all others are inner ones."""
        reach, _ = self._inner(self._all_carried(parts), sum(self._sets[-1]) + 1, False, place)
        return max(*reach[False], *reach[True])

    def _inner(
        self, carried: Sequence[Sequence[int]], workers: int, single: bool, begin: int = FIRST
    ) -> tuple[Reach, Origin]:
        """What all but the last stage carry at most, by whether one of them has several machines, and by set."""
        reach: Reach = ([0] * len(self._sets), [0] * len(self._sets))
        before: Origin = ([(0, 0, False)] * len(self._sets), [(0, 0, False)] * len(self._sets))
        for machines in range(1, len(self._sets)):
            if self._sizes[machines] >= workers:
                continue
            for left, group in self._pairs[machines]:
                own = carried[group][INNER if left else begin]
                several = self._sizes[group] > 1
                if not own or (single and several):
                    continue
                for was in (False, True) if left else (False,):
                    total, now = reach[was][left] + own, was or several
                    if (reach[was][left] or not left) and total > reach[now][machines]:
                        reach[now][machines], before[now][machines] = total, (left, group, was)
        return reach, before

    def _unwound(self, before: Origin, last: tuple[int, int, bool]) -> tuple[Group, ...]:
        left, group, shared = last
        groups = [group]
        while left:
            left, group, shared = before[shared][left]
            groups.append(group)
        return tuple(self._sets[group] for group in reversed(groups))

    def _all_carried(self, parts: Parts) -> list[list[int]]:
        return [[self._carried(parts, group, place) for place in (INNER, FIRST, LAST, WHOLE)] for group in self._sets]

    def _carried(self, parts: Parts, group: Group, place: int) -> int:
        """Layers that the group can carry there."""
        members = [(count, parts[kind][place]) for kind, count in enumerate(group) if count]
        if not members:
            return 0
        low, high = 0, len(members[0][1]) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if sum(count * part[middle] for count, part in members) >= 1 - SLACK:
                low = middle
            else:
                high = middle - 1
        return low


#: What a line's stages have among them so far: the first one, the last one.
BEGUN, ENDED = 1, 2


class Line:
    """A fleet's machines in a row: those that serve a stage together lie side by side."""

    def __init__(self, kinds: Sequence[int], different: int) -> None:
        """`kinds`: of each machine, of so many `different` ones."""
        self._kinds = kinds
        self._different = different

    def best(self, parts: Parts, *, single: bool) -> Found:
        """Carry as many layers as can be, by two stages or more that each do all of the work; machines may be idle.

        `single`: by stages of one machine each.
        """
        reach, origin = self._reach(parts, single)
        layers = reach[-1][BEGUN | ENDED]
        return Found(layers, self._unwound(origin)) if layers > 0 else Found(0, ())

    def may_carry(self, parts: Parts) -> bool:
        """Whether all layers are carried, roughly and quickly: False is sure.

        The parts of a stage's workers add up to 1, so that its layers are at most the sum of their layers x part.
        """
        most: list[float] = [
            max(
                max(map(mul, naturals(), own[INNER])),
                *(part * (len(own[FIRST]) - 1) for part in (own[FIRST][-1], own[LAST][-1])),
            )
            for own in parts
        ]
        return sum(most[kind] for kind in self._kinds) >= len(parts[0][WHOLE]) - 1 - SLACK

    def without_ends(self, parts: Parts, place: int) -> int:
        """As of `Lattice`."""
        return max(self._reach(parts, False)[0][-1][ENDED if place == LAST else BEGUN], 0)

    def _reach(self, parts: Parts, single: bool) -> tuple[list[list[int]], list[list[Step]]]:
        """By how many machines were looked at and by what there is among them: layers at most, and the latest step."""
        count = len(self._kinds)
        carried = {place: self._carried(parts, place, single) for place in (INNER, FIRST, LAST)}
        reach, origin = [[0, -1, -1, -1]], [[Step(0, 0, False)] * 4]
        for end in range(1, count + 1):
            here = list(reach[-1])
            steps = [Step(end - 1, has, False) for has in range(4)]
            for begin in range(end):
                inner, first, last = (carried[place][begin][end] for place in (INNER, FIRST, LAST))
                for has, layers in enumerate(reach[begin]):
                    if layers < 0:
                        continue
                    own = inner if has & BEGUN else first
                    if own and layers + own > here[has | BEGUN]:
                        here[has | BEGUN], steps[has | BEGUN] = layers + own, Step(begin, has, True)
                    if last and not has & ENDED and layers + last > here[has | ENDED]:
                        here[has | ENDED], steps[has | ENDED] = layers + last, Step(begin, has, True)
            reach.append(here)
            origin.append(steps)
        return reach, origin

    def _unwound(self, origin: Sequence[Sequence[Step]]) -> tuple[Group, ...]:
        groups: list[Group] = []
        last: list[Group] = []
        at, has = len(self._kinds), BEGUN | ENDED
        while at:
            step = origin[at][has]
            if step.used:
                members = self._kinds[step.begin : at]
                group = tuple(members.count(kind) for kind in range(self._different))
                (last if has & ENDED and not step.has & ENDED else groups).append(group)
            at, has = step.begin, step.has
        return (*reversed(groups), *last)

    def _carried(self, parts: Parts, place: int, single: bool) -> list[list[int]]:
        """Layers that the machines [begin, end) can carry there, by begin and end."""
        count, most = len(self._kinds), len(parts[0][place]) - 1
        sums = [[0.0, *accumulate(parts[kind][place][layers] for kind in self._kinds)] for layers in range(most + 1)]
        found = []
        for begin in range(count):
            row, layers = [0] * (count + 1), 0
            for end in range(begin + 1, min(begin + 1, count) + 1 if single else count + 1):
                while layers < most and sums[layers + 1][end] - sums[layers + 1][begin] >= 1 - SLACK:
                    layers += 1
                row[end] = layers
            found.append(row)
        return found


def orders(machines: Sequence[Machine], load: Load, rows: float) -> Iterator[list[int]]:
    """The kinds of all machines in a row, in ways that put those side by side that could serve a stage together."""
    speeds = [layer_s(load, machine.speed, rows) for machine in machines]
    memories = [machine.memory_bytes for machine in machines]
    kinds = range(len(machines))
    keys = (
        [speeds[kind] for kind in kinds],
        [-memories[kind] for kind in kinds],
        [memories[kind] * speeds[kind] for kind in kinds],
    )
    seen: list[list[int]] = []
    for key in keys:
        order = sorted(kinds, key=lambda kind: (key[kind], kind))
        if order not in seen:
            seen.append(order)
            yield [kind for kind in order for _ in range(machines[kind].count)]
