"""What is advised of one window, and when it is acted upon."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqinfer.forecast import Load, Speed, fit, tokens_per_s
from mqinfer.scaling import Advice, Change, Hysteresis, Limits, StageSeen, Why, Window, Worked, advise

WINDOW_S = 10.0
#: A busy machine is no failure.
FEWER = settings(max_examples=30)


def worked(forward_s: float, *, busy: float = 1.0, rows: float = 16.0, fixed: float = 0.5) -> Worked:
    """A consumer whose forwards of about so many rows take so long; half of them have a fifth more."""
    forwards = busy * WINDOW_S / forward_s
    sizes = (0.8 * rows, 1.2 * rows)
    seconds = [forward_s * (fixed + (1 - fixed) * size / rows) for size in sizes]
    return Worked(
        seconds=WINDOW_S,
        busy_s=busy * WINDOW_S,
        forwards=forwards,
        steps=forwards,
        rows=forwards * rows,
        tokens=forwards * rows,
        tokens_squared=forwards / 2 * sum(size * size for size in sizes),
        token_busy_s=forwards / 2 * sum(size * took_s for size, took_s in zip(sizes, seconds, strict=True)),
    )


def seen(*consumers: Worked) -> StageSeen:
    return StageSeen(consumers=len(consumers), worked=consumers)


def window(*stages: StageSeen, rows: float = 64, microbatches: float = 4, **more: object) -> Window:
    made = Window(stages=stages, coordinators=1, rows=rows, requests=100, microbatches=microbatches)
    return replace(made, **more)  # type: ignore[arg-type]


#: The second stage takes four times as long as the others, and every microbatch of a trip goes through it.
HOT = window(
    seen(worked(0.025, busy=0.25, fixed=0.1)),
    seen(worked(0.1, fixed=0.1)),
    seen(worked(0.025, busy=0.25, fixed=0.1)),
    microbatches=3,
)


def test_the_stage_that_the_others_wait_for_is_to_have_one_consumer_more() -> None:
    advice = advise(HOT)
    assert (advice.change, advice.why, advice.stage) == (Change.UP, Why.BOUND, 1)
    assert 0.3 < advice.gain <= 1.0
    assert advice.gain == advice.gains[1] == max(advice.gains.values())


def test_with_one_stage_relieved_the_next_slowest_one_bounds_the_gain() -> None:
    near = window(seen(worked(0.1, fixed=0.1)), seen(worked(0.08, busy=0.8, fixed=0.1)), microbatches=2)
    far = window(seen(worked(0.1, fixed=0.1)), seen(worked(0.02, busy=0.2, fixed=0.1)), microbatches=2)
    assert advise(near).gains[0] < advise(far).gains[0]


def test_where_a_forward_costs_the_same_for_fewer_rows_one_more_consumer_brings_less() -> None:
    def gain(fixed: float) -> float:
        hot, cold = worked(0.1, fixed=fixed), worked(0.025, busy=0.25, fixed=fixed)
        return advise(window(seen(hot), seen(cold), microbatches=2)).gains[0]

    assert gain(0.95) < gain(0.5) < gain(0.05)


def test_a_consumer_that_nobody_needs_may_go() -> None:
    few = worked(0.01, busy=0.03, fixed=0.1)
    advice = advise(window(seen(worked(0.1, fixed=0.1)), seen(few, few, few), microbatches=6), {0: Limits(1, 1)})
    assert (advice.change, advice.why, advice.stage) == (Change.DOWN, Why.SPARE, 1)
    assert advice.gain > -0.05


def test_a_stage_at_its_most_is_said_to_be_bound_and_stays() -> None:
    advice = advise(HOT, {1: Limits(1, 1)})
    assert (advice.change, advice.why, advice.stage) == (Change.NONE, Why.AT_MOST, 1)


def test_a_stage_that_nobody_serves_comes_first_and_needs_no_forecast() -> None:
    advice = advise(window(seen(worked(0.1)), seen()))
    assert (advice.change, advice.why, advice.stage, advice.gains) == (Change.UP, Why.UNSERVED, 1, {})


def test_a_stage_below_its_least_is_filled_even_when_nothing_is_under_way() -> None:
    advice = advise(window(seen(worked(0.1)), rows=0, requests=0), {0: Limits(2, 3)})
    assert (advice.change, advice.why, advice.stage) == (Change.UP, Why.BELOW_LEAST, 0)


def test_a_stage_that_may_have_none_gets_one_only_when_there_is_work() -> None:
    nobody = {0: Limits(0, 3)}
    assert advise(window(seen(), rows=0, requests=0), nobody).why is Why.IDLE
    assert advise(window(seen(), rows=0, requests=1), nobody).why is Why.UNSERVED


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"blocked": "low on memory"}, Why.BLOCKED),
        ({"coordinators": 0}, Why.NO_COORDINATOR),
        ({"rows": 0, "requests": 0}, Why.IDLE),
        ({"coordinator_busy": 0.95}, Why.COORDINATOR),
    ],
)
def test_nothing_is_advised_where_no_consumer_helps_and_it_is_said_why(change: dict[str, object], why: Why) -> None:
    advice = advise(replace(HOT, **change))  # type: ignore[arg-type]
    assert (advice.change, advice.why) == (Change.NONE, why)


def test_trips_that_spend_their_time_beyond_all_consumers_are_told_so() -> None:
    hardly = worked(0.02, busy=0.02, fixed=0.5)
    advice = advise(window(seen(hardly), seen(hardly), microbatches=2))
    assert (advice.change, advice.why) == (Change.NONE, Why.ELSEWHERE)


def test_stages_that_all_take_as_long_are_balanced() -> None:
    fair = worked(0.1, busy=0.9, fixed=0.9)
    assert advise(window(seen(fair), seen(fair), seen(fair), microbatches=3)).why is Why.BALANCED


def test_consumers_that_have_not_computed_yet_say_nothing_and_are_not_asked_for_again() -> None:
    assert advise(window(seen(worked(0.1)), seen(Worked(seconds=WINDOW_S)))).why is Why.UNSEEN
    fresh = replace(HOT.stages[1], consumers=3)
    more = advise(replace(HOT, stages=(HOT.stages[0], fresh, HOT.stages[2]), microbatches=8))
    assert more.gains[1] < advise(HOT).gains[1]


def test_a_stage_s_rates_count_consumers_that_were_seen_once_as_the_others() -> None:
    stage = replace(seen(worked(0.1), worked(0.1)), consumers=3)
    assert stage.rate("forwards") == pytest.approx(3 * worked(0.1).forwards / WINDOW_S)
    assert StageSeen(consumers=2).rate("rows") == 0.0


# The line through a consumer's forwards


@given(st.floats(0, 1), st.floats(1e-4, 0.1), st.integers(1, 20), st.integers(1, 10))
def test_forwards_of_many_sizes_show_what_a_position_costs(
    fixed_s: float, token_s: float, least: int, apart: int
) -> None:
    sizes = range(least, least + 50 * apart, apart)
    seconds = [fixed_s + token_s * size for size in sizes]
    mean = sum(sizes) / len(sizes)
    speed = fit(
        forwards=len(sizes),
        tokens=sum(sizes),
        busy_s=sum(seconds),
        tokens_squared=sum(size * size for size in sizes),
        token_busy_s=sum(size * took_s for size, took_s in zip(sizes, seconds, strict=True)),
    )
    assert speed is not None
    assert speed.token_s == pytest.approx(token_s, abs=0.1 * speed.seconds(mean) / mean)
    assert speed.seconds(mean) == pytest.approx(sum(seconds) / len(sizes))


def test_forwards_that_were_all_alike_are_taken_to_be_half_fixed() -> None:
    speed = fit(forwards=10, tokens=160, busy_s=1.0, tokens_squared=2560, token_busy_s=16.0)
    assert speed == Speed(pytest.approx(0.05), pytest.approx(0.05 / 16))


def test_no_forward_makes_no_line() -> None:
    assert fit(forwards=0, tokens=0, busy_s=0, tokens_squared=0, token_busy_s=0) is None


def test_one_microbatch_in_one_consumer_s_hands_takes_its_forward_and_the_way() -> None:
    rate = tokens_per_s([[Speed(0.1, 0.0)]], Load(1, 32, hop_s=0.05))
    assert rate == pytest.approx(32 / 0.2, rel=0.1)


@FEWER
@given(st.lists(st.floats(0.01, 0.2), min_size=1, max_size=4), st.integers(1, 8))
def test_no_forecast_passes_the_slowest_stage_s_bound(seconds: list[float], microbatches: int) -> None:
    rate = tokens_per_s([[Speed(0.0, each)] for each in seconds], Load(microbatches, 1.0))
    assert 0 < rate < 1.15 / max(seconds)
    assert rate == tokens_per_s([[Speed(0.0, each)] for each in seconds], Load(microbatches, 1.0))


# Whatever is seen

consumers = st.builds(worked, st.floats(0.005, 0.5), busy=st.floats(0, 1), rows=st.floats(1, 64), fixed=st.floats(0, 1))
stages = st.builds(lambda there: seen(*there), st.lists(consumers, max_size=3))
windows = st.builds(
    lambda seen_stages, rows, microbatches, coordinators: window(
        *seen_stages, rows=rows, microbatches=microbatches, coordinators=coordinators
    ),
    st.lists(stages, min_size=1, max_size=3),
    st.integers(0, 200),
    st.floats(0, 12),
    st.integers(0, 2),
)
bounds = st.builds(lambda least, more: Limits(least, least + more), st.integers(0, 3), st.integers(0, 3))


@FEWER
@given(windows, st.lists(bounds, min_size=3, max_size=3))
def test_no_advice_passes_the_limits_or_takes_a_stage_s_last_consumer(seen_window: Window, of: list[Limits]) -> None:
    advice = advise(seen_window, dict(enumerate(of)))
    if advice.change is Change.NONE:
        return
    assert advice.stage is not None
    there, limits = seen_window.stages[advice.stage].consumers, of[advice.stage]
    if advice.change is Change.UP:
        assert there + 1 <= limits.most
    else:
        assert there - 1 >= max(limits.least, 1)


# Hysteresis

UP = Advice(change=Change.UP, why=Why.BOUND, stage=1, gain=0.5)
DOWN = replace(UP, change=Change.DOWN, why=Why.SPARE)
NONE = replace(UP, change=Change.NONE, why=Why.BALANCED)


def test_only_what_several_windows_in_a_row_say_is_acted_upon() -> None:
    hysteresis = Hysteresis(confirm=3)
    said = [UP, UP, NONE, UP, UP, DOWN, UP, UP, replace(UP, stage=0), UP, UP, UP]
    assert [hysteresis.lasting(advice, now_s) for now_s, advice in enumerate(said)] == [False] * 11 + [True]


def test_a_stage_just_scaled_is_left_alone_while_others_may_change() -> None:
    hysteresis = Hysteresis(confirm=1, cooldown_s=60)
    assert hysteresis.lasting(UP, 100)
    assert not hysteresis.lasting(UP, 159)
    assert hysteresis.lasting(replace(UP, stage=0), 159)
    assert hysteresis.lasting(UP, 160)


def test_what_was_said_before_a_change_counts_no_more() -> None:
    hysteresis = Hysteresis(confirm=2, cooldown_s=0)
    assert [hysteresis.lasting(UP, now_s) for now_s in range(4)] == [False, True, False, True]


advices = st.builds(
    lambda change, stage: replace(UP, change=change, stage=stage), st.sampled_from(Change), st.integers(0, 2)
)


@given(st.lists(st.tuples(advices, st.integers(0, 30)), max_size=80), st.integers(1, 4), st.integers(0, 100))
def test_a_stage_changes_once_in_a_cool_down_at_most(
    said: list[tuple[Advice, int]], confirm: int, cooldown_s: int
) -> None:
    hysteresis, now_s, changed = Hysteresis(confirm=confirm, cooldown_s=cooldown_s), 0, {}
    for index, (advice, later_s) in enumerate(said):
        now_s += later_s
        if hysteresis.lasting(advice, now_s):
            recent = [(one.change, one.stage) for one, _ in said[index - confirm + 1 : index + 1]]
            assert recent == [(advice.change, advice.stage)] * confirm
            assert now_s - changed.get(advice.stage, float("-inf")) >= cooldown_s
            changed[advice.stage] = now_s
