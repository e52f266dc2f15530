"""What an autoscaler does with advice: which consumer it starts and stops, when, and what it tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from fakes import make_plan

from mqinfer import observe
from mqinfer.actuators import ActionFailed, Actuator, Consumer
from mqinfer.autoscaler import NOBODY_TO_STOP, Autoscaler, stage_limits, to_start, to_stop
from mqinfer.batching import busy_target
from mqinfer.errors import SettingsError
from mqinfer.messages import Report
from mqinfer.settings import AutoscalerSettings, load
from mqinfer.survey import Survey
from mqinfer.transports.base import QueueState, Transport


def worker(stage: int, instance: str, host: str) -> Report:
    name = f"{host}/{instance}"
    return Report(role="worker", id=name, host=host, stage=stage, clock_s=0.0, facts={"instance": instance})


def seen(*reports: Report, stages: int = 2, blocked: str = "") -> Survey:
    return Survey(None, None, (None,) * stages, {report.id: report for report in reports}, blocked)


def fleet(at_s: float, first: Sequence[str] = ("",), second: Sequence[str] = ("",)) -> Survey:
    """Two stages at work since the clocks began, with consumers of these instances; the second takes far longer."""
    stages, seconds = (first, second), (0.02, 0.1)
    per_s = min(len(there) / each_s for there, each_s in zip(stages, seconds, strict=True))
    workers = [
        computing(stage, f"{number}", instance, at_s, per_s / len(there), each_s)
        for stage, (there, each_s) in enumerate(zip(stages, seconds, strict=True))
        for number, instance in enumerate(there)
    ]
    values = {"rows": 64.0, "microbatch_rows": 64.0, "microbatches": float(busy_target([len(first), len(second)]))}
    coordinator = Report(role="coordinator", id="c", host="h", stage=-1, clock_s=at_s, values=values)
    return seen(*workers, coordinator)


def computing(stage: int, number: str, instance: str, at_s: float, per_s: float, each_s: float) -> Report:
    """A consumer with so many forwards a second of 32 positions, some more, some less; nearly all of each is theirs."""
    count = per_s * at_s
    values = {
        "busy_s": each_s * count,
        "forwards": count,
        "steps": count,
        "rows": 32 * count,
        "tokens": 32 * count,
        "tokens_squared": 1300 * count,
        "token_busy_s": 40 * each_s * count,
    }
    facts = {"instance": instance}
    name = f"s{stage}-{number}"
    return Report(role="worker", id=name, host="h", stage=stage, clock_s=at_s, values=values, facts=facts)


class Acting:
    """An actuator that notes what it is told, and fails where it is told so."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts
        self.done: list[tuple[str, str]] = []
        self.broken = ""

    async def start(self, consumer: Consumer) -> None:
        self._note("start", consumer)

    async def stop(self, consumer: Consumer) -> None:
        self._note("stop", consumer)

    def _note(self, what: str, consumer: Consumer) -> None:
        self.done.append((what, consumer.instance))
        if self.broken:
            raise ActionFailed(self.broken)


async def no_link() -> Transport:
    raise AssertionError("nothing here is sent")


def scaler(acting: Actuator | None, **settings: Any) -> Autoscaler:
    given = {"window_s": 10, "look_s": 5, "cooldown_s": 60, "max_consumers": 3} | settings
    return Autoscaler(make_plan("p"), load(AutoscalerSettings, **given), no_link, acting)


@pytest.fixture
def told() -> Iterator[list[tuple[str, Mapping[str, Any]]]]:
    """What is emitted of scaling."""
    events: list[tuple[str, Mapping[str, Any]]] = []
    forget = observe.add_sink(lambda event, fields: events.append((event, fields)) if "scale" in event else None)
    yield events
    forget()


def decided(told: list[tuple[str, Mapping[str, Any]]], **wanted: Any) -> list[Mapping[str, Any]]:
    found = [fields for event, fields in told if event == observe.SCALE_DECIDED]
    return [fields for fields in found if all(fields[name] == value for name, value in wanted.items())]


async def test_a_hot_stage_gets_one_consumer_once_several_looks_agree(told: list[Any]) -> None:
    acting = Acting()
    scaling = scaler(acting)
    for at_s in (5.0, 10.0, 15.0, 20.0):
        await scaling.look(fleet(at_s), at_s)
        assert acting.done == []
    await scaling.look(fleet(25.0), 25.0)
    assert acting.done == [("start", "1-auto1")]
    (decision,) = decided(told, acts=True)
    assert (decision["change"], decision["stage"], decision["why"]) == ("up", 1, "bound")
    assert decision["gain"] > 0.1
    assert (decision["consumers"], decision["busy"]) == ([1, 1], [0.2, 1.0])
    assert [fields["acts"] for fields in decided(told)] == [False, False, True]


async def test_a_stage_is_left_alone_until_its_new_consumer_has_come_and_a_cool_down_more(told: list[Any]) -> None:
    acting = Acting()
    scaling = scaler(acting)
    for at_s in range(0, 600, 5):
        await scaling.look(fleet(at_s), at_s)
    assert acting.done == [("start", "1-auto1")]
    for at_s in range(600, 655, 5):
        await scaling.look(fleet(at_s, second=["", "1-auto1"]), at_s)
    assert acting.done == [("start", "1-auto1")]
    for at_s in range(655, 720, 5):
        await scaling.look(fleet(at_s, second=["", "1-auto1"]), at_s)
    assert acting.done == [("start", "1-auto1"), ("start", "1-auto2")]
    assert (observe.SCALE_SETTLED, "1-auto1") in [(event, fields.get("instance")) for event, fields in told]


async def test_a_dry_run_tells_what_it_would_do_and_does_nothing(told: list[Any]) -> None:
    scaling = scaler(None)
    for at_s in range(0, 60, 5):
        await scaling.look(fleet(at_s), at_s)
    (decision,) = decided(told, acts=True)
    assert (decision["dry_run"], decision["change"], decision["stage"]) == (True, "up", 1)
    assert {event for event, _ in told} == {observe.SCALE_DECIDED}


async def test_a_command_that_fails_is_told_and_tried_again_later_and_later(told: list[Any]) -> None:
    acting = Acting()
    acting.broken = "no such unit"
    scaling = scaler(acting)
    for at_s in range(0, 200, 5):
        await scaling.look(fleet(at_s), at_s)
    failures = [fields for event, fields in told if event == observe.SCALE_FAILED]
    assert [fields["retry_s"] for fields in failures][:3] == [15, 30, 60]
    assert {fields["error"] for fields in failures} == {"no such unit"}
    acting.broken = ""
    for at_s in range(200, 400, 5):
        await scaling.look(fleet(at_s), at_s)
    assert set(acting.done) == {("start", "1-auto1")}
    assert len(acting.done) == len(failures) + 1


async def test_a_consumer_that_never_comes_is_told_and_another_name_is_tried(told: list[Any]) -> None:
    acting = Acting()
    scaling = scaler(acting, patience_s=100)
    for at_s in range(0, 300, 5):
        await scaling.look(fleet(at_s), at_s)
    assert acting.done[:2] == [("start", "1-auto1"), ("start", "1-auto2")]
    assert any("nothing has come of it in 100 s" in str(fields.get("error")) for _, fields in told)


async def test_after_a_restart_it_goes_on_from_what_the_survey_shows() -> None:
    acting = Acting()
    scaling = scaler(acting)
    for at_s in range(0, 30, 5):
        await scaling.look(fleet(at_s, second=["", "1-auto1"]), at_s)
    assert acting.done == [("start", "1-auto2")]


async def test_a_spare_consumer_is_stopped_and_its_own_first(told: list[Any]) -> None:
    acting = Acting()
    scaling = scaler(acting, limits=["1=1:1"])
    for at_s in range(0, 30, 5):
        await scaling.look(fleet(at_s, first=["", "0-auto1", "0-a"]), at_s)
    assert acting.done == [("stop", "0-auto1")]
    assert decided(told, acts=True)[0]["why"] == "spare"


async def test_the_last_consumer_of_a_stage_is_never_stopped_even_where_none_is_asked_for() -> None:
    acting = Acting()
    scaling = scaler(acting, min_consumers=0, max_consumers=1)
    for at_s in range(0, 100, 5):
        await scaling.look(fleet(at_s), at_s)
    assert acting.done == []


async def test_what_nobody_can_stop_by_name_is_told(told: list[Any]) -> None:
    acting = Acting()
    scaling = scaler(acting, limits=["1=1:1"])
    for at_s in range(0, 30, 5):
        await scaling.look(fleet(at_s, first=["", "", ""]), at_s)
    assert acting.done == []
    assert NOBODY_TO_STOP in [fields["error"] for event, fields in told if event == observe.SCALE_FAILED]


async def test_while_the_broker_is_blocked_nobody_is_taken_for_gone() -> None:
    acting = Acting()
    scaling = scaler(acting)
    for at_s in range(0, 100, 5):
        await scaling.look(seen(blocked="low on memory"), at_s)
    assert acting.done == []


def test_a_new_consumer_has_the_lowest_number_that_nobody_has_and_goes_to_the_emptiest_host() -> None:
    found = seen(worker(0, "0-auto1", "a"), worker(0, "0-auto3", "b"), worker(1, "1-auto2", "b"))
    assert to_start(found, 0, ["b", "a", "c"], set()) == Consumer(stage=0, n="auto2", host="c")
    assert to_start(found, 0, ["b", "a"], {"0-auto2"}) == Consumer(stage=0, n="auto4", host="a")
    assert to_start(found, 1, [], set()) == Consumer(stage=1, n="auto1")


def test_the_newest_of_an_autoscaler_s_own_goes_first_and_nobody_on_another_host() -> None:
    workers = [worker(0, "0-auto2", "a"), worker(0, "0-auto10", "b"), worker(0, "0", "a"), worker(0, "01-x", "a")]
    assert to_stop(seen(*workers), 0, []) == Consumer(stage=0, n="auto10", host="b")
    assert to_stop(seen(*workers), 0, ["a"]) == Consumer(stage=0, n="auto2", host="a")
    assert to_stop(seen(*workers[2:]), 0, ["a"]) == Consumer(stage=0, n="", host="a")
    assert to_stop(seen(*workers[3:]), 0, []) is None


def test_where_all_but_one_are_leaving_already_nobody_is_stopped() -> None:
    workers = {report.id: report for report in (worker(0, "0-auto1", "a"), worker(0, "0-a", "a"))}
    assert to_stop(Survey(None, None, (QueueState(0, 1), None), workers), 0, []) is None
    assert to_stop(Survey(None, None, (QueueState(0, 2), None), workers), 0, []) == Consumer(
        stage=0, n="auto1", host="a"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_consumers": 5}, "stage 0 can't have 5 consumers at least and 4 at most"),
        ({"limits": "7=1:2"}, "the plan has stages 0 to 1, not 7"),
        ({"limits": "1=3:2"}, "stage 1 can't have 3"),
    ],
)
def test_limits_that_can_not_be_kept_are_told(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        stage_limits(load(AutoscalerSettings, **given), 2)


def test_limits_of_single_stages_go_before_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQINFER_LIMITS", "1=2:8")
    monkeypatch.setenv("MQINFER_HOSTS", "gpu1, gpu2")
    settings = load(AutoscalerSettings)
    assert {stage: (each.least, each.most) for stage, each in stage_limits(settings, 2).items()} == {
        0: (1, 4),
        1: (2, 8),
    }
    assert settings.hosts == ("gpu1", "gpu2")
