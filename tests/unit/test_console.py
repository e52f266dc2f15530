"""What people see: tables at 80 columns and in a pipe, progress on a terminal and in a file."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from fakes import make_plan
from screen import Screen

from mqinfer import console
from mqinfer.batch_rows import Progress
from mqinfer.checkpoint import StageCost
from mqinfer.observe import STAGE_LOADED, emit
from mqinfer.plan import StageSpec

LONG = "a-name-as-long-as-names-of-pipelines-may-be-and-then-longer-than-a-terminal-is-wide"


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
    table = console.make_table(LONG, LONG)
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
