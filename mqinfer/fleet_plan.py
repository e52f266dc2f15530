"""Cut a model for a fleet of unlike machines, and say which of them serve which stage: pure, standard library only.

`plan_fleet` looks for the most tokens per second by the arithmetic of `fleet_costs.py`: for each number of busy workers
(it decides how many rows a forward has) a search over the rate, each time asking `fleet_search.py` for groups of
machines that carry all layers at that rate; then the layers are cut exactly for the groups found, and single workers
are moved. Of a small fleet with unlike layers, `fleet_order.py` finds groups for the real layers too.
Within 5% of all possibilities for small fleets (tests/unit/test_fleet_plan.py), a good choice for large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product

from mqinfer import fleet_moves, fleet_order, fleet_search
from mqinfer.fleet_costs import Flight, Load, Machine, Model, flight, rows_held
from mqinfer.fleet_cut import Cutter
from mqinfer.fleet_search import Found, Group, Lattice, Line, Terms

#: A plan must be better by so much to take the place of another.
GAIN = 1.002
#: How closely the rate is searched for groups; the cuts of those that are found are searched more closely.
GROUPS_FINE = 1.005
#: Between numbers of workers that are looked at in large fleets; of many kinds, each look takes longer.
WORKERS_STEP, MANY_KINDS_STEP, MANY_KINDS = 1.25, 1.5, 16
#: Moves of single workers that are tried.
MOST_MOVES = 500

Find = Callable[[float], Found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The workers of one kind of machine at one stage."""

    machine: int
    count: int
    #: Rows that each has room for, and the bytes to give their keys and values.
    rows: int
    kv_bytes: int
    #: Tokens per second of each where it never lacks work.
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """The layers [first, end) and who serves them."""

    first: int
    end: int
    serving: tuple[Serving, ...]
    #: What it could do if the other stages were quicker.
    tokens_per_s: float

    @property
    def workers(self) -> int:
        """How many there are."""
        return sum(serving.count for serving in self.serving)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """Cuts and assignment."""

    stages: tuple[StagePlan, ...]
    #: How rows are spread.
    flight: Flight
    #: Machines that serve nothing, by kind.
    idle: Group

    @property
    def tokens_per_s(self) -> float:
        """Predicted: of the slowest stage."""
        return min(stage.tokens_per_s for stage in self.stages)

    @property
    def bound(self) -> int:
        """The stage that the others wait for."""
        return min(range(len(self.stages)), key=lambda stage: self.stages[stage].tokens_per_s)


@dataclass(frozen=True, slots=True)
class Shortage:
    """The fleet can't hold the model with its rows."""

    #: With so many bytes more in one further machine, beside its working space, it could.
    short_bytes: int


def plan_fleet(model: Model, load: Load, machines: Sequence[Machine]) -> FleetPlan | Shortage:
    """The best that was found, or what is lacking."""
    largest = max(layer.weight_bytes for layer in model.layers)
    mean = -(-model.weight_sums[-1] // len(model.layers))
    planner = _Planner(model, load, machines, mean)
    if not planner.search() and mean < largest:  # groups that hold mean layers may not hold the real ones
        planner = _Planner(model, load, machines, largest)
        planner.search()
    return planner.plan(unlike=len(set(model.layers)) > 1)


class _Planner:
    """One search."""

    def __init__(self, model: Model, load: Load, machines: Sequence[Machine], layer_bytes: int) -> None:
        """`layer_bytes`: what every layer is taken to weigh while machines are grouped."""
        self._model = model
        self._load = load
        self._machines = machines
        self._alike = fleet_search.alike(model, layer_bytes)
        self._counts = tuple(machine.count for machine in machines)
        self._shares = fleet_search.shares(self._alike, load, machines)
        self._lattice = Lattice(self._counts) if Lattice.fits(self._counts) else None
        #: Tokens per second, groups and bounds of their stages.
        self._best: tuple[float, tuple[Group, ...], tuple[int, ...]] = (0.0, (), ())
        self._cutter = Cutter(model, load, machines)
        #: Bytes for which such layers have no room.
        self._lacking = 0

    def search(self) -> bool:
        """Look among groups that hold such layers. Whether some hold the real ones."""
        self._lacking = self._short_bytes()
        if not self._lacking:
            for terms, find in self._lattice_searches(self._lattice) if self._lattice else self._line_searches():
                self._climb(terms, find)
        return bool(self._best[0])

    def plan(self, *, unlike: bool) -> FleetPlan | Shortage:
        """What has been found, made better; or what is lacking."""
        if unlike and sum(self._counts) <= fleet_order.MOST_MACHINES:
            for terms, find in self._order_searches():
                self._climb(terms, find)
        self._polish()
        if self._best[0]:
            return self._plan_of(*self._best[1:])
        if not unlike:
            return Shortage(self._lacking or self._alike.layers[0].weight_bytes)
        alone = fleet_order.short_bytes(self._model, self._load, self._machines)
        return Shortage(min(self._lacking or alone, alone))

    # -- searching the rate ----------------------------------------------------------------------

    def _lattice_searches(self, lattice: Lattice) -> Iterator[tuple[Terms, Find]]:
        for workers, single, spread in self._flights(range(1, sum(self._counts) + 1)):
            terms = self._terms(spread)
            yield terms, partial(_in_lattice, lattice, terms, workers, single)

    def _line_searches(self) -> Iterator[tuple[Terms, Find]]:
        total = sum(self._counts)
        sizes = [total]
        step = WORKERS_STEP if len(self._machines) <= MANY_KINDS else MANY_KINDS_STEP
        while sizes[-1] > 1:
            sizes.append(min(sizes[-1] - 1, int(sizes[-1] / step)))
        for workers, single, spread in self._flights(sizes):
            terms = self._terms(spread)
            busy = self._foremost(terms, workers)
            self._offer((busy,))
            for line in self._lines(busy, spread):
                yield terms, partial(_on_line, line, terms, single)
                if single:  # their order is all the same then
                    break

    def _order_searches(self) -> Iterator[tuple[Terms, Find]]:
        layers = len(self._model.layers)
        for workers, single, spread in self._flights(range(1, sum(self._counts) + 1)):

            def find(rate: float, spread: Flight = spread, workers: int = workers, single: bool = single) -> Found:
                makes = partial(self._cutter.makes, spread, rate)
                return fleet_order.carry(makes, layers, self._counts, workers=workers, single=single)

            yield self._terms(spread), find

    def _flights(self, sizes: Iterable[int]) -> Iterator[tuple[int, bool, Flight]]:
        """Of so many busy workers: each with a stage of its own (True), or some that share one."""
        for workers, single in product(sizes, (True, False)):
            if (single and workers <= len(self._model.layers)) or (not single and workers > 1):
                yield workers, single, flight(workers, workers if single else 1, self._load)

    def _foremost(self, terms: Terms, workers: int) -> Group:
        """The machines that carry the most."""
        inner = fleet_search.INNER
        merits = [
            max(
                (
                    at * rate * share
                    for at, (rate, share) in enumerate(zip(by_rate[inner], by_share[inner], strict=True))
                    if at
                ),
                default=0.0,
            )
            for by_rate, by_share in zip(terms.rates, terms.shares, strict=True)
        ]
        left, kept = workers, [0] * len(self._machines)
        for kind in sorted(range(len(self._machines)), key=lambda kind: -merits[kind]):
            kept[kind] = min(self._counts[kind], left)
            left -= kept[kind]
        return tuple(kept)

    def _lines(self, busy: Group, spread: Flight) -> Iterator[Line]:
        machines = [replace(machine, count=count) for machine, count in zip(self._machines, busy, strict=True)]
        for kinds in fleet_search.orders(machines, self._load, spread.rows):
            yield Line(kinds, len(self._machines))

    def _terms(self, spread: Flight) -> Terms:
        return Terms(fleet_search.rates(self._alike, self._load, self._machines, spread), self._shares)

    def _climb(self, terms: Terms, find: Find) -> None:
        """The highest rate at which all layers are carried, if it is above the best one so far."""
        layers = len(self._model.layers)
        high = sum(
            count * max(rate for place in by_rate for rate in place[1:])
            for count, by_rate in zip(self._counts, terms.rates, strict=True)
        )
        low = self._best[0] * GAIN or high * 1e-6
        found = find(low)
        if found.layers < layers:
            return
        while high > low * GROUPS_FINE:
            middle = (low * high) ** 0.5
            higher = find(middle)
            if higher.layers < layers:
                high = middle
            else:
                low, found = middle, higher
        self._offer(found.groups)

    def _offer(self, groups: tuple[Group, ...]) -> bool:
        """Cut the layers for these groups, one after another; whether that is the best so far."""
        found = self._cutter.cut(groups, self._best[0] * GAIN)
        if found is not None:
            self._best = (found[0], groups, found[1])
        return found is not None

    # -- the rest ----------------------------------------------------------------------------------

    def _polish(self) -> None:
        """Move single workers and whole stages as long as that helps."""
        left, moved = MOST_MOVES, True
        while moved and self._best[0]:
            moved = False
            for groups in fleet_moves.neighbours(self._best[1], self._counts):
                left -= 1
                if left < 0:
                    return
                if 0 < len(groups) <= len(self._model.layers) and self._offer(groups):
                    moved = True
                    break

    def _short_bytes(self) -> int:
        """What a further machine would have to take, whatever the others leave; 0: they leave nothing."""
        layers = len(self._model.layers)
        layer_bytes = self._alike.layers[0].weight_bytes
        layer_bytes += self._load.kv_tokens * self._load.concurrency * self._model.kv_layer_token_room_bytes
        whole_bytes = self._model.fixed_bytes(0, layers) - self._model.weight_sums[-1] - self._model.working_bytes
        ends_bytes = {
            fleet_search.FIRST: self._model.head_bytes + self._model.head_working_bytes,
            fleet_search.LAST: self._model.embedding_bytes,
        }
        searches = self._holders()
        placed = max(self._held_whole(search) for search in searches)
        lacking = [layers * layer_bytes + whole_bytes, *([(layers - placed) * layer_bytes] if placed else [])]
        for place, own_bytes in ends_bytes.items():
            if carried := max(search.without_ends(self._shares, place) for search in searches):
                lacking.append(max(layers - carried, 1) * layer_bytes + own_bytes)
        return 0 if placed >= layers else min(lacking)

    def _holders(self) -> Sequence[Lattice | Line]:
        if self._lattice:
            return [self._lattice]
        kinds = fleet_search.orders(self._machines, self._load, 1.0)
        return [Line(order, len(self._machines)) for order in kinds]

    def _held_whole(self, search: Lattice | Line) -> int:
        """Layers that have room, head and embedding beside them."""
        layers = len(self._model.layers)
        if isinstance(search, Line):
            shares = (share[fleet_search.WHOLE][-1] for share in self._shares)
            whole = sum(count * max(share, 0) for count, share in zip(self._counts, shares, strict=True))
            return layers if whole >= 1 - fleet_search.SLACK else search.best(self._shares, single=False).layers
        most = 0
        for workers in range(sum(self._counts), 0, -1):
            for single in (False, True):
                most = max(most, search.best(self._shares, workers=workers, single=single).layers)
                if most >= layers:
                    return most
        return most

    def _plan_of(self, groups: Sequence[Group], bounds: Sequence[int]) -> FleetPlan:
        spread = flight(sum(map(sum, groups)), len(groups), self._load)
        stages = [
            StagePlan(
                first=first,
                end=end,
                serving=tuple(
                    self._serving(kind, count, first, end, spread) for kind, count in enumerate(group) if count
                ),
                tokens_per_s=self._cutter.stage_rate(group, first, end, spread),
            )
            for group, (first, end) in zip(groups, pairwise(bounds), strict=True)
        ]
        return FleetPlan(stages=tuple(stages), flight=spread, idle=fleet_moves.idle(groups, self._counts))

    def _serving(self, kind: int, count: int, first: int, end: int, spread: Flight) -> Serving:
        machine = self._machines[kind]
        row_bytes = self._load.kv_tokens * self._model.kv_layer_token_bytes * (end - first)
        most_bytes = row_bytes * (self._load.concurrency + 1)  # a row that grows is there twice
        room_bytes = machine.memory_bytes - self._model.fixed_bytes(first, end)
        return Serving(
            machine=kind,
            count=count,
            rows=rows_held(self._model, self._load, machine, first, end),
            kv_bytes=min(room_bytes // self._model.kv_copies, most_bytes),
            tokens_per_s=self._cutter.rate(kind, first, end, spread),
        )


def _in_lattice(lattice: Lattice, terms: Terms, workers: int, single: bool, rate: float) -> Found:
    return lattice.best(terms.parts(rate), workers=workers, single=single)


def _on_line(line: Line, terms: Terms, single: bool, rate: float) -> Found:
    parts = terms.parts(rate)
    return line.best(parts, single=single) if line.may_carry(parts) else Found(0, ())
