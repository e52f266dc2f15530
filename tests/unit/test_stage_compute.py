"""A step's way through one stage without I/O, around a fake engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from fakes import HIDDEN, FakeEngine, make_plan

from mqinfer.forecast import Speed
from mqinfer.messages import Miss, MissReason, Row, Sampling, Step, StepDone
from mqinfer.stage_compute import StageCompute
from mqinfer.tensor_codec import pack
from mqinfer.wire import decode

PLAN = make_plan("p", stages=2)
ROWS = (Row(row=0, epoch=0, start=0, count=2, reserve=9), Row(row=1, epoch=0, start=0, count=1, reserve=9))


def compute(stage: int, codec: str = "lossless", **fake: Any) -> StageCompute:
    return StageCompute(PLAN, stage, FakeEngine(PLAN, stage, **fake), codec=codec, threads=1)  # type: ignore[arg-type]


def first_step(**more: Any) -> Step:
    fields: dict[str, Any] = {"rows": ROWS, "tokens": (5, 6, 7), "stage": 0}
    return Step(**({"plan": PLAN.digest, "owner": "c", "microbatch": 3, "number": 0} | fields | more))


def second_step(hidden: torch.Tensor, **more: Any) -> Step:
    return first_step(stage=1, tokens=(), hidden=pack(hidden, "raw"), route=("w0",), **more)


def test_a_first_trip_goes_on_with_the_worker_on_its_route() -> None:
    (out,) = compute(0).run([first_step()], "w0")
    onward = decode(out.body)
    assert not out.ends
    assert isinstance(onward, Step)
    assert (onward.stage, onward.route, onward.tokens, onward.rows) == (1, ("w0",), (), ROWS)
    assert onward.hidden is not None
    assert onward.hidden.shape == (3, HIDDEN)


def test_what_hidden_states_take_is_told_before_and_after_they_are_packed() -> None:
    (out,) = compute(0, "int8").run([first_step()], "w0")
    assert out.hidden_bytes == 3 * HIDDEN * 4
    assert out.packed_bytes == 4 * HIDDEN + 3 * (2 * HIDDEN + 4 + HIDDEN)  # docs/wire.md
    (end,) = compute(1).run([second_step(torch.ones(3, HIDDEN))], "w1")
    assert (end.hidden_bytes, end.packed_bytes) == (0, 0)


def test_a_later_trip_keeps_its_route() -> None:
    (out,) = compute(0).run([first_step(route=("w0", "w1"))], "w0")
    onward = decode(out.body)
    assert isinstance(onward, Step)
    assert onward.route == ("w0", "w1")


def test_a_worker_that_leaves_says_so_in_every_step() -> None:
    (out,) = compute(0).run([first_step()], "w0", True)
    onward = decode(out.body)
    assert isinstance(onward, Step)
    assert onward.closing


def test_owners_are_told_what_the_slowest_worker_takes_for_as_many_positions_as_the_step_has() -> None:
    tokens = sum(row.count for row in ROWS)
    (first,) = compute(0).run([first_step()], "w0", speed=Speed(0.5, 0.25))
    onward = decode(first.body)
    assert isinstance(onward, Step)
    assert (onward.slowest_s, onward.slowest_tokens, onward.slowest_token_s) == (0.5 + 0.25 * tokens, tokens, 0.25)
    told = {"slowest_s": 1.25, "slowest_tokens": 2, "slowest_token_s": 0.25}
    for speed, slowest in (
        (Speed(9.0, 0.0), (9.0, tokens, 0.25)),
        (Speed(0.0, 0.375), (1.25, 2, 0.375)),
        (Speed(0.0, 0.125), (1.25, 2, 0.25)),
        (None, (1.25, 2, 0.25)),
    ):
        (last,) = compute(1).run([second_step(torch.ones(3, HIDDEN), **told)], "w1", speed=speed)
        end = decode(last.body)
        assert isinstance(end, StepDone)
        assert (end.slowest_s, end.slowest_tokens, end.slowest_token_s) == slowest


def test_the_last_stage_ends_the_trip_with_the_tokens_drawn() -> None:
    rows = (replace(ROWS[0], sampling=Sampling()), ROWS[1])
    (out,) = compute(1).run([second_step(torch.ones(3, HIDDEN), rows=rows)], "w1")
    end = decode(out.body)
    assert out.ends
    assert isinstance(end, StepDone)
    assert [sampled.row for sampled in end.sampled] == [0]
    assert end.route == ("w0", "w1")


def test_a_step_of_which_all_rows_are_missed_ends_here_with_the_misses_of_all_stages() -> None:
    earlier = Miss(row=9, epoch=0, stage=0, reason=MissReason.ROOM)
    (out,) = compute(1, broken=True).run([second_step(torch.ones(3, HIDDEN), misses=(earlier,))], "w1")
    end = decode(out.body)
    assert isinstance(end, StepDone)
    assert {miss.row for miss in end.misses} == {0, 1, 9}
    assert out.computed == 0


def test_a_tensor_that_can_not_be_read_costs_only_its_own_step() -> None:
    wrong = second_step(torch.ones(3, HIDDEN + 1), misses=(Miss(row=9, epoch=0, stage=0, reason=MissReason.ROOM),))
    right = replace(second_step(torch.ones(3, HIDDEN)), owner="other")
    bad, good = compute(1).run([wrong, right], "w1")
    assert bad.unreadable
    assert not good.unreadable
    end = decode(bad.body)
    assert isinstance(end, StepDone)
    assert {(miss.row, miss.reason) for miss in end.misses} == {
        (0, MissReason.COMPUTE),
        (1, MissReason.COMPUTE),
        (9, MissReason.ROOM),
    }


def test_hidden_states_that_the_codec_can_not_carry_are_misses() -> None:
    stage = compute(0, codec="int8")
    run = stage.engine.run

    def infinite(works: Any) -> Any:
        return [replace(done, hidden=torch.full((3, HIDDEN), float("inf"))) for done in run(works)]

    stage.engine.run = infinite  # type: ignore[method-assign]
    (out,) = stage.run([first_step()], "w0")
    assert out.ends
    assert {miss.reason for miss in out.misses} == {MissReason.COMPUTE}


def test_rows_that_are_released_are_forgotten_before_the_step_runs() -> None:
    stage = compute(0)
    stage.run([first_step()], "w0")
    assert stage.engine.cached_rows == 2
    row = Row(row=2, epoch=0, start=0, count=1, reserve=4)
    stage.run([first_step(rows=(row,), tokens=(5,), release=((0, 0), (1, 0)))], "w0")
    assert stage.engine.cached_rows == 1


def test_hidden_states_that_are_not_finite_make_the_step_unreadable() -> None:
    for value in (float("nan"), float("inf")):
        hidden = torch.ones(3, HIDDEN)
        hidden[1, 2] = value
        (out,) = compute(1).run([second_step(hidden)], "w1")
        end = decode(out.body)
        assert isinstance(end, StepDone)
        assert out.unreadable == "the hidden states are not finite"
        assert {miss.reason for miss in end.misses} == {MissReason.COMPUTE}


def test_auto_sends_on_what_came_out_the_sooner_and_nothing_but_exact_codecs() -> None:
    stage, used = compute(0, codec="auto"), []
    for _ in range(60):
        (out,) = stage.run([first_step()], "w0")
        onward = decode(out.body)
        assert isinstance(onward, Step)
        assert onward.hidden is not None
        used.append(onward.hidden.codec)
        stage.published(out, 10.0 if onward.hidden.codec == "raw" else 1.0)
    assert set(used) == {"raw", "lossless"}
    assert used[10:].count("lossless") >= 45
