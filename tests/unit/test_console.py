"""What people see: tables at 80 columns and in a pipe, progress on a terminal and in a file."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator

import pytest
from fakes import make_plan
from rich.console import Console

from mqinfer import console
from mqinfer.batch_rows import Progress
from mqinfer.checkpoint import StageCost
from mqinfer.messages import Report
from mqinfer.observe import STAGE_LOADED, emit
from mqinfer.plan import StageSpec
from mqinfer.survey import Survey
from mqinfer.transports.base import QueueState

LONG = "a-name-as-long-as-names-of-pipelines-may-be-and-then-longer-than-a-terminal-is-wide"


class Screen:
    """Both consoles, written to memory."""

    def __init__(self, *, terminal: bool) -> None:
        self.out = Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False, color_system=None)
        self.err = Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False, color_system=None)

    @staticmethod
    def text(of: Console) -> str:
        assert isinstance(of.file, io.StringIO)
        return of.file.getvalue()


def install(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> Screen:
    screen = Screen(terminal=terminal)
    monkeypatch.setattr(console, "out", screen.out)
    monkeypatch.setattr(console, "err", screen.err)
    return screen


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return install(monkeypatch, terminal=True)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return install(monkeypatch, terminal=False)


def report(role: str, stage: int, clock_s: float, **values: float) -> Report:
    return Report(role=role, id=f"{role}-{stage}", host="h", stage=stage, clock_s=clock_s, values=values)


def busy_survey(clock_s: float, dead: int = 0) -> Survey:
    """Counters as large as they get in practice."""
    state = QueueState(ready=99_999, consumers=12)
    count = 8888.8 * clock_s
    workers = [
        report(
            "worker",
            stage,
            clock_s,
            rows=count,
            tokens=count * 9,
            busy_s=clock_s,
            unacknowledged=64,
            kv_used_bytes=2**33,
            kv_budget_bytes=2**33,
        )
        for stage in (0, 1)
    ]
    reports = {found.id: found for found in (*workers, report("coordinator", -1, clock_s, rows=65_535))}
    return Survey(state, QueueState(dead, 0), (state, state), reports)


def test_the_status_of_a_busy_pipeline_fits_into_80_columns(terminal: Screen) -> None:
    console.show_status(make_plan("p"), busy_survey(0.0), busy_survey(1.0))
    shown = terminal.text(terminal.out)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert "99999" in shown
    assert "79999.2" in shown
    assert "bound at stage 0" in shown


def test_the_status_with_nothing_running_says_what_to_start(terminal: Screen) -> None:
    nothing = Survey(None, None, (None, None), {})
    console.show_status(make_plan("p"), nothing, nothing)
    shown = terminal.text(terminal.out)
    assert "no coordinator answers" in shown
    assert [line.split()[:3] for line in shown.splitlines() if line.startswith("stage")] == [
        ["stage", "0", "–"],
        ["stage", "1", "–"],
    ]


def test_the_status_of_an_idle_pipeline_says_so(terminal: Screen) -> None:
    idle = busy_survey(0.0)
    reports = {**idle.reports, "coordinator--1": report("coordinator", -1, 0.0, rows=0)}
    idle = Survey(idle.requests, idle.dead, idle.stages, reports)
    console.show_status(make_plan("p"), idle, idle)
    assert "nothing is under way" in terminal.text(terminal.out)


def test_dead_letters_are_explained_where_there_are_any(terminal: Screen) -> None:
    console.show_status(make_plan("p"), busy_survey(0.0), busy_survey(1.0, dead=3))
    assert "dead letters are bodies that nobody could use" in terminal.text(terminal.out)


def test_an_alarm_of_the_broker_is_told_while_it_lasts_and_afterwards(terminal: Screen) -> None:
    blocked = Survey(QueueState(5, 0), None, (None, None), {}, blocked="low on memory")
    console.show_status(make_plan("p"), blocked, blocked)
    assert "the broker blocks publishers: memory or disk alarm (low on memory)" in Screen.text(terminal.out)
    after = Survey(None, None, (None, None), {"c": report("coordinator", -1, 0.0, blocked_s=31.2)})
    console.show_status(make_plan("p"), after, after)
    assert "the broker has blocked publishers for 31 s" in Screen.text(terminal.out)


def costs() -> Iterator[StageCost]:
    for stage in make_plan("p").stages:
        yield StageCost(
            stage=StageSpec(first=stage.first, end=stage.end),
            parameters=32_000_000_000,
            weight_bytes=64 * 2**30,
            share=0.5,
            kv_bytes_per_token=131_072,
        )


def test_a_plan_is_shown_with_its_sizes(terminal: Screen) -> None:
    console.show_plan(make_plan("p"), list(costs()))
    shown = terminal.text(terminal.out)
    assert "p: fake in float32, 128.0 GiB, digest " in shown
    assert "[0, 1)  32,000,000,000  64.0 GiB" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_nothing_is_cut_off_in_a_pipe(pipe: Screen) -> None:
    table = console._table(LONG, LONG)
    table.add_row(LONG, LONG)
    console.show(LONG * 2, table)
    console.say(LONG * 2)
    assert pipe.text(pipe.out).count(LONG) == 6
    assert "…" not in pipe.text(pipe.out)
    assert pipe.text(pipe.err) == LONG * 2 + "\n"


def test_brackets_in_a_path_are_no_markup(pipe: Screen) -> None:
    console.say("can't read [bold]/x[/]")
    assert pipe.text(pipe.err) == "can't read [bold]/x[/]\n"


def test_a_stage_that_is_loaded_is_told_in_mebibytes(pipe: Screen) -> None:
    loaded = {"stage": 1, "layers": "[2, 4)", "weight_bytes": 3 * 2**20, "peak_bytes": 2**22, "kv_bytes": 2**30}
    with console.stages_told():
        emit(STAGE_LOADED, seconds=1.25, **loaded)
    emit(STAGE_LOADED, seconds=1.25, **loaded)
    assert pipe.text(pipe.err) == (
        "stage 1, layers [2, 4): 3.0 MiB of weights in 1.2 s, memory grew by 4.0 MiB, "
        "up to 1.0 GiB more for keys and values\n"
    )


async def shown_until(screen: Screen, words: str) -> str:
    async with asyncio.timeout(10):
        while words not in screen.text(screen.err):
            await asyncio.sleep(0.001)
    return screen.text(screen.err)


async def test_without_a_terminal_a_line_is_written_now_and_then(pipe: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_S", 0.01)
    progress = Progress(total=10, answered=2)
    async with console.job_progress(progress, "p.jsonl"):
        await shown_until(pipe, "p.jsonl: 2/10 done, 0 failed")
        progress.answered, progress.failed, progress.output_tokens = 5, 1, 100
        shown = await shown_until(pipe, "p.jsonl: 6/10 done, 1 failed")
    assert "tokens/s" in shown
    assert " left" in shown
    assert all(line.startswith("p.jsonl: ") for line in shown.splitlines())


async def test_on_a_terminal_a_bar_is_drawn_in_one_line(terminal: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "DRAW_S", 0.01)
    progress = Progress(total=10)
    async with console.job_progress(progress, "p.jsonl"):
        progress.answered = 6
        await shown_until(terminal, "6/10 done, 0 failed")


async def test_why_nothing_comes_is_said_once(pipe: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_S", 0.01)
    progress = Progress(note="no worker serves stage 1")
    async with console.job_progress(progress, "p.jsonl"):
        await shown_until(pipe, "p.jsonl: 0/? done")
        progress.answered = 1
        shown = await shown_until(pipe, "p.jsonl: 1/? done")
    assert shown.count("no worker serves stage 1") == 1


def test_the_time_left_counts_from_the_beginning_of_this_run() -> None:
    now_s = 100.0
    progress = Progress(total=3600 + 12, answered=2)
    words = console._Words(progress, lambda: now_s)
    assert words.left() == ""
    progress.answered, now_s = 12, 110.0
    assert words.left() == ", 1:00:00 left"
