"""Assignments that differ from another one by a single move: pure, standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mqinfer.fleet_search import Group


def idle(groups: Sequence[Group], counts: Group) -> Group:
    """Machines that serve nothing."""
    return tuple(count - sum(group[kind] for group in groups) for kind, count in enumerate(counts))


def neighbours(groups: tuple[Group, ...], counts: Group) -> Iterator[tuple[Group, ...]]:
    """A worker goes to another stage, comes from the idle or joins them; stages change places or merge."""
    places = [*groups, idle(groups, counts)]
    for source, target in ((a, b) for a in range(len(places)) for b in range(len(places)) if a != b):
        for kind, count in enumerate(places[source]):
            if count:
                moved = list(places)
                moved[source] = _with(moved[source], kind, -1)
                moved[target] = _with(moved[target], kind, 1)
                yield tuple(group for group in moved[:-1] if any(group))
    for one in range(len(groups)):
        for other in range(one + 1, len(groups)):
            swapped = list(groups)
            swapped[one], swapped[other] = groups[other], groups[one]
            yield tuple(swapped)
            merged = tuple(a + b for a, b in zip(groups[one], groups[other], strict=True))
            yield (*groups[:one], merged, *groups[one + 1 : other], *groups[other + 1 :])


def _with(group: Group, kind: int, change: int) -> Group:
    return (*group[:kind], group[kind] + change, *group[kind + 1 :])
