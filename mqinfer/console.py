"""What people see on the terminal: sentences, tables, and the progress of a job. rich is at home here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mqinfer.batch_rows import Progress as JobProgress
from mqinfer.checkpoint import StageCost
from mqinfer.dead_letters import Letter
from mqinfer.fleet_costs import Load, Machine
from mqinfer.fleet_plan import FleetPlan
from mqinfer.host_profile import HostProfile
from mqinfer.observe import STAGE_LOADED, add_sink, size
from mqinfer.plan import Plan

#: How often the progress is drawn; and how often a line is written where it is not a terminal.
DRAW_S = 0.25
LINE_S = 10.0
#: Where nothing is cut off: in a pipe or a file lines may be as long as they like.
PIPE_COLUMNS = 10_000

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)


def say(sentence: str) -> None:
    """Put a sentence on standard error, as it is."""
    err.print(sentence, markup=False, soft_wrap=True)


def show(title: str, table: Table) -> None:
    """Put a table on standard output."""
    widen_pipe()
    out.print(title, markup=False, soft_wrap=True)
    out.print(table)


def widen_pipe() -> None:
    """Where standard output is no terminal, nothing that is put there is cut off."""
    if not out.is_terminal:
        out.width = PIPE_COLUMNS


def token_number(token: int) -> str:
    """Stands for a token's text where no tokenizer is at hand."""
    return f"token_id:{token}"


def make_table(*headings: str) -> Table:
    """The first column on the left, numbers on the right; no wider than it must be."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="right" if at else "left", no_wrap=True)
    return table


def show_plan(plan: Plan, costs: Sequence[StageCost]) -> None:
    """One line a stage: layers, parameters, bytes, share of the cost, KV bytes a token."""
    table = make_table("stage", "layers", "parameters", "bytes", "share of cost", "KV bytes/token")
    for index, cost in enumerate(costs):
        table.add_row(
            str(index),
            layers(cost.stage.first, cost.stage.end),
            f"{cost.parameters:,}",
            size(cost.weight_bytes),
            f"{cost.share:.1%}",
            f"{cost.kv_bytes_per_token:,}",
        )
    total = sum(cost.weight_bytes for cost in costs)
    show(f"{plan.name}: {plan.model} in {plan.dtype}, {size(total)}, digest {plan.digest}", table)


def layers(first: int, end: int) -> str:
    """Half-open, as in the plan's file."""
    return f"[{first}, {end})"


def show_fleet_plan(plan: Plan, found: FleetPlan, machines: Sequence[Machine], load: Load) -> None:
    """One line a stage: layers, who serves it, what it can do; then what is predicted."""
    table = make_table("stage", "layers", "machines", "rows", "tokens/s", "bound")
    table.columns[2].justify = "left"
    for index, stage in enumerate(found.stages):
        who = ", ".join(f"{serving.count} × {machines[serving.machine].name}" for serving in stage.serving)
        rows = sum(serving.count * serving.rows for serving in stage.serving)
        mark = "◀" if index == found.bound else ""
        table.add_row(str(index), layers(stage.first, stage.end), who, str(rows), f"{stage.tokens_per_s:.1f}", mark)
    show(f"{plan.name}: {plan.model} in {plan.dtype}, digest {plan.digest}", table)
    for sentence in _fleet_remarks(found, machines, load):
        out.print(sentence, markup=False, soft_wrap=True)


def show_one_more(name: str, rate: float, now: float) -> None:
    """What one more such machine would bring."""
    out.print(f"one more {name}: {rate:.1f} tokens/s ({rate / now - 1:+.0%})", markup=False, soft_wrap=True)


def _fleet_remarks(found: FleetPlan, machines: Sequence[Machine], load: Load) -> Iterator[str]:
    yield (
        f"predicted: {found.tokens_per_s:.1f} tokens/s, bound at stage {found.bound}, with {load.concurrency} rows in "
        f"flight of {load.context_tokens} positions, {load.prompt_tokens} of them prompt; "
        f"{found.flight.rows:.1f} rows in a forward"
    )
    if any(found.idle):
        idle = zip(found.idle, machines, strict=True)
        yield "idle: " + ", ".join(f"{count} × {machine.name}" for count, machine in idle if count)


def show_profile(profile: HostProfile) -> None:
    """One line a part of the model: milliseconds by rows that decode."""
    table = make_table("milliseconds", *(f"{rows} rows" for rows, _ in profile.layer))
    parts = {"forward": profile.forward, "layer": profile.layer, "head": profile.head, "embedding": profile.embedding}
    for name, points in parts.items():
        table.add_row(name, *(f"{1e3 * seconds:.3f}" for _, seconds in points))
    show(f"{profile.host}, {profile.device}: {profile.model} in {profile.dtype}, {profile.layers} layers", table)
    words = [f"a prompt's token {1e3 * profile.layer_prefill_token_s:.4f} ms a layer"]
    words.append(f"{size(profile.memory_bytes)} free" if profile.memory_bytes else "memory not known")
    if profile.link is not None:
        words.append(f"a hop {1e3 * profile.link.hop_s:.2f} ms and {size(round(profile.link.bytes_per_s))}/s")
    out.print("; ".join(words), markup=False, soft_wrap=True)


def show_dead(name: str, letters: Sequence[Letter], total: int) -> None:
    """One line a dead letter, the oldest first."""
    table = make_table("number", "bytes", "kind", "from", "reason")
    for column in table.columns[2:]:
        column.justify = "left"
    for letter in letters:
        words = (letter.kind or "unreadable", letter.queue or "–", letter.reason or "–")
        table.add_row(str(letter.number), size(letter.body_bytes), *map(Text, words))
    show(f"{name}: {total} dead letters", table) if letters else say(f"{name}: no dead letters")
    if letters and total > len(letters):
        say(f"{total - len(letters)} more: give a higher --limit")


def show_letter(letter: Letter) -> None:
    """One fact a line."""
    facts = {
        "number": str(letter.number),
        "reason": letter.reason or "–",
        "from": letter.queue or "–",
        "bytes": f"{letter.body_bytes:,}",
        "kind": letter.kind or "unreadable",
        **letter.facts(),
        "begins with": letter.prefix().hex(" "),
    }
    for name, value in facts.items():
        out.print(f"{name}: {value}", markup=False, soft_wrap=True)


@contextmanager
def stages_told() -> Iterator[None]:
    """While the body runs, say of each stage that is loaded what it took."""
    forget = add_sink(_tell_loaded)
    try:
        yield
    finally:
        forget()


def _tell_loaded(event: str, fields: Mapping[str, Any]) -> None:
    if event == STAGE_LOADED:
        say(
            f"stage {fields['stage']}, layers {fields['layers']}: {size(fields['weight_bytes'])} of weights "
            f"in {fields['seconds']:.1f} s, memory grew by {size(fields['peak_bytes'])}, "
            f"up to {size(fields['kv_bytes'])} more for keys and values"
        )


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
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[words]}"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("left"),
    )
    words = _Words(progress)
    with Progress(*columns, console=err, expand=True) as bar:
        task = bar.add_task(title, total=progress.total or None, completed=progress.done, words=words.now())
        try:
            while True:
                _update(bar, task, progress, words)
                await asyncio.sleep(DRAW_S)
        finally:
            _update(bar, task, progress, words)


def _update(bar: Progress, task: TaskID, progress: JobProgress, words: _Words) -> None:
    words.tell_note()
    bar.update(task, total=progress.total or None, completed=progress.done, words=words.now())


async def _write_lines(progress: JobProgress, title: str) -> None:
    words = _Words(progress)
    while True:
        await asyncio.sleep(LINE_S)
        words.tell_note()
        say(f"{title}: {words.now()}{words.left()}")


class _Words:
    """A job's progress in words, with the rate since this was made."""

    def __init__(self, progress: JobProgress, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._clock = clock
        self._began_s = clock()
        self._done_before = progress.done
        self._note = ""

    def now(self) -> str:
        """Done, failed, tokens per second."""
        progress = self._progress
        rate = progress.output_tokens / max(self._clock() - self._began_s, 1e-3)
        return f"{progress.done}/{progress.total or '?'} done, {progress.failed} failed, {rate:.1f} tokens/s"

    def left(self) -> str:
        """The time that is left if it goes on as since the beginning; "" where nothing can be said."""
        done = self._progress.done - self._done_before
        rest = self._progress.total - self._progress.done
        if done < 1 or rest < 0:
            return ""
        minutes, seconds = divmod(round(rest * (self._clock() - self._began_s) / done), 60)
        return f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left"

    def tell_note(self) -> None:
        """Say why nothing comes, once."""
        if self._progress.note != self._note:
            self._note = self._progress.note
            if self._note:
                say(self._note)
