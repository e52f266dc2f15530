"""Cut a model's layers for given groups of machines, one stage for each: exact, pure, standard library only.

Which machines are grouped is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mqinfer.fleet_costs import Flight, Load, Machine, Model, flight, forward_s, rows_held, stage_rate, worker_rates
from mqinfer.fleet_search import SLACK, Group

#: How closely the best rate is searched.
FINE = 1.0005


class Cutter:
    """For one fleet; remembers what it has worked out."""

    def __init__(self, model: Model, load: Load, machines: Sequence[Machine]) -> None:
        self._model = model
        self._load = load
        self._machines = machines
        #: By kind, layers and flight.
        self._rates: dict[tuple[int, int, int, Flight], float] = {}
        self._shares: dict[tuple[int, int, int], float] = {}

    def cut(self, groups: Sequence[Group], least: float) -> tuple[float, tuple[int, ...]] | None:
        """Tokens per second and bounds of the best cut, with the groups in this order; None: it is below `least`."""
        spread = flight(sum(map(sum, groups)), len(groups), self._load)
        low = least or 1e-9
        bounds = self._bounds(groups, spread, low)
        if bounds is None:
            return None
        high = 2 * low
        while (higher := self._bounds(groups, spread, high)) is not None:
            low, high, bounds = high, 4 * high, higher
        while high > low * FINE:
            middle = (low * high) ** 0.5
            if (higher := self._bounds(groups, spread, middle)) is None:
                high = middle
            else:
                low, bounds = middle, higher
        stages = zip(groups, pairwise(bounds), strict=True)
        return min(self.stage_rate(group, *layers, spread) for group, layers in stages), bounds

    def stage_rate(self, group: Group, first: int, end: int, spread: Flight) -> float:
        """Tokens per second of the layers [first, end) served by the group."""
        kinds = [kind for kind, count in enumerate(group) for _ in range(count)]
        rates = [self.rate(kind, first, end, spread) for kind in kinds]
        return stage_rate(rates, [self._share(kind, first, end) for kind in kinds])

    def rate(self, kind: int, first: int, end: int, spread: Flight) -> float:
        """Tokens per second of one worker that never lacks work."""
        key = (kind, first, end, spread)
        if (known := self._rates.get(key)) is None:
            machine = self._machines[kind]
            busy_s = forward_s(self._model, self._load, machine.speed, first, end, spread.rows)
            [known] = worker_rates(self._model, self._load, machine, spread, first, end, [busy_s])
            self._rates[key] = known
        return known

    def _share(self, kind: int, first: int, end: int) -> float:
        """The part of all rows that one worker has room for."""
        key = (kind, first, end)
        if (known := self._shares.get(key)) is None:
            held = rows_held(self._model, self._load, self._machines[kind], first, end)
            known = self._shares[key] = held / self._load.concurrency
        return known

    def _bounds(self, groups: Sequence[Group], spread: Flight, rate: float) -> tuple[int, ...] | None:
        """Bounds with which every stage makes the rate, or None. Each stage takes as many layers as it can."""
        bounds, layers = [0], len(self._model.layers)
        for further in range(len(groups) - 1, 0, -1):
            group, first = groups[len(bounds) - 1], bounds[-1]
            low, high = first, layers - further
            while low < high:
                middle = (low + high + 1) // 2
                if self.makes(spread, rate, group, first, middle):
                    low = middle
                else:
                    high = middle - 1
            if low == first:
                return None
            bounds.append(low)
        return (*bounds, layers) if self.makes(spread, rate, groups[-1], bounds[-1], layers) else None

    def makes(self, spread: Flight, rate: float, group: Group, first: int, end: int) -> bool:
        """Whether the group makes the rate with the layers [first, end), and each of it holds a row at least."""
        done = 0.0
        for kind, count in enumerate(group):
            if count:
                share = self._share(kind, first, end)
                if not share:
                    return False
                done += count * min(self.rate(kind, first, end, spread) / rate, share)
        return done >= 1 - SLACK
