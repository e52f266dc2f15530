"""What people see on the terminal: tables, and the progress of a job. rich is at home here."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mqinfer.batch_rows import Progress as JobProgress
from mqinfer.checkpoint import StageCost
from mqinfer.plan import Plan
from mqinfer.survey import Survey

#: How often the progress is drawn; and how often a line is written where it is not a terminal.
DRAW_S = 0.25
LINE_S = 10.0

out = Console()
err = Console(stderr=True)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def token_number(token: int) -> str:
    """Stands for a token's text where no tokenizer is at hand."""
    return f"token_id:{token}"


def plan_table(plan: Plan, costs: Sequence[StageCost]) -> Table:
    """One line a stage: layers, parameters, bytes, share of the cost, KV bytes a token."""
    table = Table(title=f"{plan.name}: {plan.model} in {plan.dtype}, {len(plan.stages)} stages, digest {plan.digest}")
    for heading in ("stage", "layers", "parameters", "bytes", "share of cost", "KV bytes/token"):
        table.add_column(heading, justify="right")
    for index, cost in enumerate(costs):
        spec = plan.stages[index]
        layers = f"{spec.first}–{spec.end - 1}"
        table.add_row(
            str(index),
            layers,
            f"{cost.parameters:,}",
            size(cost.weight_bytes),
            f"{cost.share:.1%}",
            f"{cost.kv_bytes_per_token:,}",
        )
    return table


def status_table(plan: Plan, earlier: Survey, later: Survey) -> Table:
    """One line a queue, with rates from the counters of two surveys."""
    table = Table(title=f"{plan.name} ({plan.digest})")
    for heading in ("", "ready", "unacked", "consumers", "rows/s", "tokens/s", "busy", "KV used"):
        table.add_column(heading, justify="left" if not heading else "right")
    held = later.in_flight()
    requests = later.requests
    table.add_row("requests", str(requests.ready if requests else "–"), str(held), str(len(later.coordinators())))
    bound = later.bound_stage(earlier)
    for stage, state in enumerate(later.stages):
        rates = later.rates(earlier, stage)
        table.add_row(
            f"stage {stage}" + (" ← bound here" if stage == bound else ""),
            str(state.ready if state else "–"),
            f"{rates.unacknowledged:.0f}",
            str(rates.workers),
            f"{rates.rows_per_s:.1f}",
            f"{rates.tokens_per_s:.1f}",
            f"{rates.busy:.0%}",
            f"{size(rates.kv_used_bytes)} of {size(rates.kv_budget_bytes)}",
        )
    table.add_row("dead letters", str(later.dead.ready if later.dead else "–"), "", "")
    return table


@asynccontextmanager
async def job_progress(progress: JobProgress, title: str) -> AsyncIterator[None]:
    """Show a job's progress on standard error while the body runs."""
    drawing = asyncio.create_task(_draw(progress, title) if err.is_terminal else _write_lines(progress, title))
    try:
        yield
    finally:
        drawing.cancel()
        await asyncio.wait({drawing})


async def _draw(progress: JobProgress, title: str) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed · {task.fields[rate]:.1f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[note]}"),
    )
    began_s = time.monotonic()
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(title, total=None, failed=0, rate=0.0, note="")
        try:
            while True:
                _update(bar, task, progress, began_s)
                await asyncio.sleep(DRAW_S)
        finally:
            _update(bar, task, progress, began_s)


def _update(bar: Progress, task: object, progress: JobProgress, began_s: float) -> None:
    bar.update(
        task,  # type: ignore[arg-type]
        total=progress.total or None,
        completed=progress.done,
        failed=progress.failed,
        rate=progress.output_tokens / max(time.monotonic() - began_s, 1e-3),
        note=progress.note,
    )


async def _write_lines(progress: JobProgress, title: str) -> None:
    began_s = time.monotonic()
    while True:
        await asyncio.sleep(LINE_S)
        rate = progress.output_tokens / (time.monotonic() - began_s)
        total = progress.total or "?"
        line = (
            f"{title}: {progress.done} of {total} done, {progress.failed} failed, {rate:.1f} tokens/s {progress.note}"
        )
        print(line.rstrip(), file=sys.stderr, flush=True)
