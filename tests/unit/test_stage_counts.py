"""What a worker counts and tells of its forwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import pytest
from fakes import FakeEngine, make_plan
from hypothesis import given
from hypothesis import strategies as st

from mqinfer.messages import Miss, MissReason, Row, Step
from mqinfer.observe import ROW_MISSED, STEP_COMPUTED, add_sink
from mqinfer.queues import Topology
from mqinfer.stage_compute import Outgoing
from mqinfer.stage_counts import RATE_WINDOW_S, StageCounts
from mqinfer.stage_inbox import StageInbox, Taken, forwards
from mqinfer.transports.base import Transport
from mqinfer.transports.memory import open_memory

PLAN = make_plan("p")


@dataclass(frozen=True, slots=True)
class Came:
    """A delivery of which only the body matters."""

    body: bytes
    queue: str = "q"
    headers: Mapping[str, str] = field(default_factory=dict)
    redelivered: bool = False

    async def ack(self) -> None: ...
    async def requeue(self) -> None: ...


@pytest.fixture
def told() -> Iterator[list[tuple[str, Mapping[str, Any]]]]:
    events: list[tuple[str, Mapping[str, Any]]] = []
    forget = add_sink(lambda event, fields: events.append((event, fields)))
    yield events
    forget()


def taken(counts: tuple[int, ...], body_bytes: int = 100, arrived_s: float = 0.0) -> Taken:
    rows = tuple(Row(row=n, epoch=0, start=0, count=count, reserve=9) for n, count in enumerate(counts))
    step = Step(plan="d", owner="c", microbatch=0, number=0, stage=0, rows=rows)
    return Taken(step, Came(b"x" * body_bytes), arrived_s)


def out(body_bytes: int, hidden_bytes: int = 0, packed_bytes: int = 0) -> Outgoing:
    return Outgoing(b"y" * body_bytes, False, hidden_bytes=hidden_bytes, packed_bytes=packed_bytes)


def inbox(transport: Transport) -> StageInbox:
    return StageInbox(transport, Topology("p").worker("w"), Topology("p").stage(0))


def test_a_forward_is_counted_with_its_rows_bytes_and_waits(told: list[tuple[str, Mapping[str, Any]]]) -> None:
    counts = StageCounts(1)
    steps = [taken((3, 1), arrived_s=10.0), taken((2,), 50, arrived_s=11.5)]
    counts.computed(steps, [out(70, 400, 200), out(30, 100, 50)], 12.0, 12.25)
    expected = {"rows": 3, "tokens": 6, "in_bytes": 150, "out_bytes": 100, "hidden_bytes": 500, "packed_bytes": 250}
    sums = {"forwards": 1, "steps": 2, "busy_s": 0.25, "wait_s": 2.5, "tokens_squared": 36, "token_busy_s": 1.5}
    assert counts.values == {**sums, **expected}
    fields: dict[str, Any] = {"stage": 1, "microbatches": 2, "seconds": 0.25, "waits_s": [2.0, 0.5], **expected}
    fields["traceparents"] = ["", ""]
    assert told == [(STEP_COMPUTED, fields)]


def test_rows_that_are_given_up_are_counted_and_told_each(told: list[tuple[str, Mapping[str, Any]]]) -> None:
    counts = StageCounts(1)
    counts.missed([Miss(row=n, epoch=0, stage=1, reason=MissReason.ROOM) for n in range(3)])
    assert counts.values["misses"] == 3
    assert [(event, fields["row"], fields["reason"]) for event, fields in told] == [
        (ROW_MISSED, n, "room") for n in range(3)
    ]


async def test_a_worker_that_has_done_nothing_yet_reports_zeros_and_its_budget() -> None:
    now = StageCounts(0).now(FakeEngine(PLAN, 0), inbox(open_memory("counts")))  # type: ignore[arg-type]
    assert now["kv_budget_bytes"] == 10**9
    assert {name for name, value in now.items() if value} == {"kv_budget_bytes"}


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 999)), max_size=20))
def test_tokens_per_second_are_those_of_the_last_seconds(forwards: list[tuple[float, int]]) -> None:
    forwards.sort()
    now_s = 0.0
    counts = StageCounts(0, clock=lambda: now_s)
    for at_s, tokens in forwards:
        now_s = at_s
        counts.computed([taken((tokens,))], [out(1)], 0.0, 0.1)
    now_s = 30.0
    recent = sum(tokens for at_s, tokens in forwards if at_s > 30.0 - RATE_WINDOW_S)
    assert counts.tokens_per_s() == pytest.approx(recent / RATE_WINDOW_S)
    now_s = 30.0 + RATE_WINDOW_S
    assert counts.tokens_per_s() == 0


def seen(fixed_s: float, token_s: float) -> StageCounts:
    counts = StageCounts(0)
    for tokens in (8, 16, 24) * 100:
        counts.computed([taken((tokens,))], [out(1)], 0.0, fixed_s + token_s * tokens)
    return counts


def test_microbatches_share_a_forward_as_far_as_its_fixed_part_is_worth_it() -> None:
    three = [taken((8, 8)), taken((8, 8)), taken((8, 8))]
    assert StageCounts(0).worth_tokens() == inf
    assert len(forwards(three, seen(0.1, 0.0).worth_tokens())) == 1
    assert len(forwards(three, seen(0.003, 0.001).worth_tokens())) == 2
    assert len(forwards(three, seen(0.0, 0.01).worth_tokens())) == 3


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=12), st.floats(1, 200) | st.just(inf))
def test_every_step_runs_once_in_its_order_and_suspects_alone_after_the_others(
    steps: list[tuple[int, bool]], worth_tokens: float
) -> None:
    items = [
        item._replace(step=replace(item.step, number=number, alone=alone))
        for number, (count, alone) in enumerate(steps)
        for item in [taken((count,))]
    ]
    groups = forwards(items, worth_tokens)
    numbers = [item.step.number for group in groups for item in group]
    assert numbers == [item.step.number for item in sorted(items, key=lambda item: item.step.alone)]
    for group in groups:
        assert len(group) == 1 or not any(item.step.alone for item in group)
        assert sum(row.count for item in group[:-1] for row in item.step.rows) < worth_tokens


def test_a_stall_does_not_keep_microbatches_apart_for_ever() -> None:
    counts = StageCounts(0)
    for positions, seconds in [(256, 1.5), (16, 0.02), (256, 1.5), *[(16, 0.02)] * 1000]:
        counts.computed([taken((positions,))], [], 0.0, seconds)
    assert counts.worth_tokens() > 4 * 16


def test_the_first_forward_says_nothing_of_the_others() -> None:
    counts = StageCounts(0)
    counts.computed([taken((256,))], [], 0.0, 1.5)
    assert counts.worth_tokens() == inf
    counts.computed([taken((16,))], [], 0.0, 0.02)
    assert counts.worth_tokens() > 4 * 16
