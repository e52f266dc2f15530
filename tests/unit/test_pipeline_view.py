"""A pipeline as people and machines see it: the table of `status`, the picture of `top`, the JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace

from fakes import make_plan
from rich.console import Console
from screen import Screen

from mqinfer import pipeline_view
from mqinfer.messages import Report
from mqinfer.survey import Survey
from mqinfer.transports.base import QueueState

PLAN = make_plan("p")


def show(earlier: Survey, later: Survey, *, workers: bool = False) -> None:
    pipeline_view.show(pipeline_view.status(PLAN, earlier, later, workers=workers))


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
    show(busy_survey(0.0), busy_survey(1.0))
    shown = terminal.text(terminal.out)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert "99999" in shown
    assert "79999.2" in shown
    assert "bound at stage 0" in shown


def test_the_status_with_nothing_running_says_what_to_start(terminal: Screen) -> None:
    nothing = Survey(None, None, (None, None), {})
    show(nothing, nothing)
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
    show(idle, idle)
    assert "nothing is under way" in terminal.text(terminal.out)


def test_dead_letters_are_explained_where_there_are_any(terminal: Screen) -> None:
    show(busy_survey(0.0), busy_survey(1.0, dead=3))
    assert "dead letters are bodies that nobody could use" in terminal.text(terminal.out)


def test_an_alarm_of_the_broker_is_told_while_it_lasts_and_afterwards(terminal: Screen) -> None:
    blocked = Survey(QueueState(5, 0), None, (None, None), {}, blocked="low on memory")
    show(blocked, blocked)
    assert "the broker blocks publishers: memory or disk alarm (low on memory)" in Screen.text(terminal.out)
    after = Survey(None, None, (None, None), {"c": report("coordinator", -1, 0.0, blocked_s=31.2)})
    show(after, after)
    assert "the broker has blocked publishers for 31 s" in Screen.text(terminal.out)


def on_host(found: Report, host: str, **facts: str) -> Report:
    return replace(found, id=f"{found.id}-{host}", host=host, facts=facts)


def fleet_survey(clock_s: float) -> Survey:
    """Stage 1 is the hot one: two workers there, always busy; one worker on stage 0."""
    counts = {"rows": 30 * clock_s, "tokens": 60 * clock_s, "forwards": 10 * clock_s, "steps": 10 * clock_s}
    moved = {"out_bytes": 2048 * clock_s, "hidden_bytes": 300 * clock_s, "packed_bytes": 200 * clock_s}
    room = {"kv_used_bytes": 25, "kv_budget_bytes": 100, "unacknowledged": 1}
    workers = [
        on_host(
            report("worker", 0, clock_s, busy_s=clock_s / 5, wait_s=0.02 * clock_s, **counts, **moved, **room), "a"
        ),
        on_host(
            report("worker", 1, clock_s, busy_s=clock_s, wait_s=20 * clock_s, **counts, **room), "b", device="cuda:0"
        ),
        on_host(report("worker", 1, clock_s, busy_s=clock_s * 0.9, **room), "c", device="cuda:1"),
    ]
    reports = [*workers, report("coordinator", -1, clock_s, rows=12)]
    stages = (QueueState(0, 1), QueueState(7, 2))
    return Survey(QueueState(40, 1), QueueState(0, 0), stages, {found.id: found for found in reports})


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_with_workers_each_stands_under_its_stage_with_its_own_rates(terminal: Screen) -> None:
    show(fleet_survey(0.0), fleet_survey(2.0), workers=True)
    shown = lines(terminal.text(terminal.out))
    at = next(index for index, words in enumerate(shown) if words[:2] == ["stage", "1"])
    assert shown[at] == ["stage", "1", "7", "2", "2", "30.0", "60.0", "95%", "25%", "2", "s"]
    assert shown[at + 1] == ["b", "cuda:0", "1", "30.0", "60.0", "100%", "25%", "2", "s"]
    assert shown[at + 2] == ["c", "cuda:1", "1", "0.0", "0.0", "90%", "25%", "0", "ms"]


def test_in_a_pipe_there_is_room_for_batch_size_bytes_and_compression(pipe: Screen) -> None:
    show(fleet_survey(0.0), fleet_survey(2.0))
    shown = pipe.text(pipe.out)
    (stage,) = (line for line in lines(shown) if line[:2] == ["stage", "0"])
    assert stage[-6:] == ["2", "ms", "3.0", "2.0", "KiB", "1.50×"]
    assert "–" in next(line for line in shown.splitlines() if line.startswith("stage 1"))


def recorded(earlier: Survey, later: Survey, width: int = 120) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(pipeline_view.live(PLAN, earlier, later, "12:00:00"))
    return console.export_text()


def test_live_the_stages_stand_from_requests_to_results_and_the_hot_one_is_marked(terminal: Screen) -> None:
    shown = recorded(fleet_survey(0.0), fleet_survey(2.0))
    order = [
        shown.index(words) for words in ("12:00:00", "requests", "stage 0 [0, 1)", "stage 1 [1, 2) ◀ hot", "results")
    ]
    assert order == sorted(order)
    assert shown.count("◀") == 1
    assert "██████████ 100%" in shown
    assert "██░░░░░░░░  20%" in shown
    assert shown.index("  b cuda:0") > shown.index("stage 1")
    assert "bound at stage 1" in shown


def test_live_nothing_is_hot_where_nothing_is_under_way(terminal: Screen) -> None:
    nothing = Survey(None, None, (None, None), {})
    assert "◀" not in recorded(nothing, nothing)
    assert "no coordinator answers" in recorded(nothing, nothing)


def test_actors_of_unlike_versions_are_told(terminal: Screen) -> None:
    actors = [on_host(report("worker", stage, 0.0), str(stage), version=f"0.{stage}") for stage in (0, 1)]
    unlike = Survey(None, None, (None, None), {found.id: found for found in actors})
    show(unlike, unlike)
    assert "unlike versions serve this pipeline: 0.0, 0.1" in Screen.text(terminal.out)


def test_for_machines_all_of_it_is_json_with_the_rates_and_reports() -> None:
    told = json.loads(json.dumps(pipeline_view.for_machines(PLAN, fleet_survey(0.0), fleet_survey(2.0))))
    assert (told["pipeline"], told["bound_stage"], told["complaint"]) == ("p", 1, "")
    assert told["requests"] == {"ready": 40, "in_flight": 12}
    first, second = told["stages"]
    assert (first["layers"], first["ready"], second["ready"]) == ([0, 1], 0, 7)
    assert second["rates"]["workers"] == 2
    assert [(found["host"], found["facts"]["device"]) for found in second["workers"]] == [
        ("b", "cuda:0"),
        ("c", "cuda:1"),
    ]
    assert second["workers"][0]["rates"]["busy"] == 1.0
    assert second["workers"][1]["values"]["busy_s"] == 1.8


def test_for_machines_what_is_not_known_is_null() -> None:
    nothing = Survey(None, None, (None, None), {}, blocked="low on memory")
    told = pipeline_view.for_machines(PLAN, nothing, nothing)
    assert (told["dead_letters"], told["bound_stage"], told["stages"][0]["ready"]) == (None, None, None)
    assert told["blocked"] == "low on memory"
