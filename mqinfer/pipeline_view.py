"""A pipeline as a person or a machine sees it: two surveys in; a table with what is wrong beneath it, or JSON, out.

Nothing is asked here; survey.py does. `status` shows it once, `top` again and again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mqinfer import console
from mqinfer.messages import Report
from mqinfer.observe import size
from mqinfer.plan import Plan
from mqinfer.survey import Rates, Survey
from mqinfer.transports.base import QueueState

HEADINGS = ("queue", "ready", "unacked", "workers", "rows/s", "tokens/s", "busy", "KV", "wait")
#: Where there is room for them.
MORE_HEADINGS = ("batch", "out/s", "packed")
WIDE_COLUMNS = 110
#: How a full bar of utilisation is drawn.
BAR_CELLS = 10
HOT = "bold red"


def status(plan: Plan, earlier: Survey, later: Survey, *, workers: bool = False) -> RenderableType:
    """One line a queue, with rates from the counters of two surveys; then what is wrong, or where it is bound."""
    view = _View(plan, earlier, later)
    table = view.table()
    view.add_requests(table)
    for stage in range(len(plan.stages)):
        table.add_row(f"stage {stage}", *view.stage(stage))
        if workers:
            view.add_workers(table, stage)
    table.add_row("dead letters", _ready(later.dead))
    return Group(Text(_title(plan)), table, *map(Text, remarks(earlier, later)))


def live(plan: Plan, earlier: Survey, later: Survey, note: str) -> RenderableType:
    """The pipeline from its requests to its results, the hot stage marked; `note` stands above it."""
    view = _View(plan, earlier, later, bars=True)
    bound = later.bound_stage(earlier)
    table = view.table()
    view.add_requests(table)
    for stage, spec in enumerate(plan.stages):
        hot = stage == bound
        table.add_row("   │")
        name = f"stage {stage} {console.layers(spec.first, spec.end)}" + (" ◀ hot" if hot else "")
        table.add_row(name, *view.stage(stage), style=HOT if hot else "bold")
        view.add_workers(table, stage)
    table.add_row("   ▼")
    table.add_row("results", style="bold")
    table.add_row("dead letters", _ready(later.dead), style=HOT if later.dead and later.dead.ready else None)
    return Group(Text(f"{_title(plan)}   {note}"), table, *map(Text, remarks(earlier, later)))


def show(view: RenderableType) -> None:
    """Put it on standard output."""
    console.widen_pipe()
    console.out.print(view, soft_wrap=False)


def remarks(earlier: Survey, later: Survey) -> Iterator[str]:
    """What a person should know, a sentence each."""
    bound = later.bound_stage(earlier)
    if complaint := later.complaint():
        yield complaint
    elif bound is not None:
        busy = later.rates(earlier, bound).busy
        yield f"bound at stage {bound}: the others wait for it, its workers compute {busy:.0%} of the time"
    else:
        yield "nothing is under way"
    for report in later.in_role("paused"):
        yield f"{report.id} of stage {report.stage} on {report.host} is paused ({report.facts.get('reason', '')})"
    if blocked_s := later.blocked_s():
        yield f"the broker has blocked publishers for {blocked_s:.0f} s since they are linked: memory or disk alarm"
    versions = sorted({version for report in later.reports.values() if (version := report.facts.get("version"))})
    if len(versions) > 1:
        yield f"actors of unlike versions serve this pipeline: {', '.join(versions)}"
    if later.dead is not None and later.dead.ready:
        yield "dead letters are bodies that nobody could use: `mqinfer dead list` says why"


def for_machines(plan: Plan, earlier: Survey, later: Survey) -> dict[str, Any]:
    """All that is known, in names that stay: see docs/operations.md."""
    return {
        "pipeline": plan.name,
        "digest": plan.digest,
        "requests": {"ready": _count(later.requests), "in_flight": later.in_flight()},
        "dead_letters": _count(later.dead),
        "bound_stage": later.bound_stage(earlier),
        "blocked": later.blocked,
        "complaint": later.complaint(),
        "coordinators": [_actor(report) for report in later.coordinators()],
        "stages": [
            {
                "stage": stage,
                "layers": [spec.first, spec.end],
                "ready": _count(later.stages[stage]),
                "rates": dataclasses.asdict(later.rates(earlier, stage)),
                "workers": [
                    _actor(report) | {"rates": dataclasses.asdict(later.rates_of(earlier, [report]))}
                    for report in later.workers(stage)
                ],
            }
            for stage, spec in enumerate(plan.stages)
        ],
    }


class _View:
    """What the rows of one table have in common."""

    def __init__(self, plan: Plan, earlier: Survey, later: Survey, *, bars: bool = False) -> None:
        self._plan = plan
        self._earlier = earlier
        self._later = later
        self._bars = bars
        self._wide = not console.out.is_terminal or console.out.width >= WIDE_COLUMNS

    def table(self) -> Table:
        """Empty."""
        return console.make_table(*HEADINGS, *(MORE_HEADINGS if self._wide else ()))

    def add_requests(self, table: Table) -> None:
        """The pipeline's door, and its coordinators."""
        later = self._later
        table.add_row("requests", _ready(later.requests), str(later.in_flight()), str(len(later.coordinators())))

    def add_workers(self, table: Table, stage: int) -> None:
        """One line each."""
        for report in sorted(self._later.workers(stage), key=lambda found: (found.host, found.id)):
            rates = self._later.rates_of(self._earlier, [report])
            where = f"  {report.host} {report.facts.get('device', '')}".rstrip()
            table.add_row(Text(where, style="dim"), "", *self._cells(rates, workers=""))

    def stage(self, stage: int) -> tuple[str, ...]:
        """The cells of the stage as a whole, beside its name."""
        rates = self._later.rates(self._earlier, stage)
        cells = self._cells(rates, workers=str(rates.workers)) if rates.workers else ("–", "0")
        return _ready(self._later.stages[stage]), *cells

    def _cells(self, rates: Rates, *, workers: str) -> tuple[str, ...]:
        cells = (
            f"{rates.unacknowledged:.0f}",
            workers,
            f"{rates.rows_per_s:.1f}",
            f"{rates.tokens_per_s:.1f}",
            f"{_bar(rates.busy)} {rates.busy:4.0%}" if self._bars else f"{rates.busy:.0%}",
            f"{rates.kv_used_bytes / max(rates.kv_budget_bytes, 1):.0%}",
            _seconds(rates.wait_s),
        )
        more = (
            f"{rates.batch_rows:.1f}",
            size(rates.out_bytes_per_s),
            f"{rates.compression:.2f}×" if rates.compression else "–",
        )
        return cells + more if self._wide else cells


def _title(plan: Plan) -> str:
    return f"{plan.name}, digest {plan.digest}"


def _ready(state: QueueState | None) -> str:
    return str(state.ready) if state else "–"


def _count(state: QueueState | None) -> int | None:
    return state.ready if state else None


def _bar(share: float) -> str:
    full = round(min(max(share, 0.0), 1.0) * BAR_CELLS)
    return "█" * full + "░" * (BAR_CELLS - full)


def _seconds(seconds: float) -> str:
    """For people: no more than six characters below a day."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.0f} s"


def _actor(report: Report) -> dict[str, Any]:
    return {"id": report.id, "host": report.host, "values": dict(report.values), "facts": dict(report.facts)}
