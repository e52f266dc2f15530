"""What one more machine of a kind would bring to a fleet that has a plan: pure, standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from mqinfer.fleet_costs import Load, Machine, Model
from mqinfer.fleet_cut import Cutter
from mqinfer.fleet_plan import FleetPlan, plan_fleet
from mqinfer.fleet_search import Group

#: Of up to so many kinds each is planned for anew; of more, which takes a second each, it joins the plan there is.
MANY_KINDS = 16


def one_more(model: Model, load: Load, machines: Sequence[Machine], plan: FleetPlan) -> Iterator[float]:
    """Tokens per second with one further machine, by kind of machine; each is worked out when it is asked for."""
    cutter = Cutter(model, load, machines)
    for kind, machine in enumerate(machines):
        if len(machines) > MANY_KINDS:
            yield _joined(cutter, plan, kind, len(machines), len(model.layers))
            continue
        larger = [*machines[:kind], replace(machine, count=machine.count + 1), *machines[kind + 1 :]]
        found = plan_fleet(model, load, larger)
        yield max(plan.tokens_per_s, found.tokens_per_s if isinstance(found, FleetPlan) else 0.0)


def _joined(cutter: Cutter, plan: FleetPlan, kind: int, kinds: int, layers: int) -> float:
    """Tokens per second of the plan, cut anew, with one more of the kind at a stage of its own or another's."""
    groups = [_group(((serving.machine, serving.count) for serving in stage.serving), kinds) for stage in plan.stages]
    best, alone = plan.tokens_per_s, _group([(kind, 1)], kinds)
    helped = ((*groups[:at], _both(group, alone), *groups[at + 1 :]) for at, group in enumerate(groups))
    longer = ((*groups[:at], alone, *groups[at:]) for at in range(len(groups) + 1) if len(groups) < layers)
    for tried in (*helped, *longer):
        if (found := cutter.cut(tried, best)) is not None:
            best = max(best, found[0])
    return best


def _group(counts: Iterable[tuple[int, int]], kinds: int) -> Group:
    by_kind = dict(counts)
    return tuple(by_kind.get(kind, 0) for kind in range(kinds))


def _both(one: Group, other: Group) -> Group:
    return tuple(a + b for a, b in zip(one, other, strict=True))
