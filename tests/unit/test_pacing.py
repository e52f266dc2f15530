"""How much prefill a step carries beside rows that decode, learnt from what forwards took."""

import math
import sys

from hypothesis import example, given
from hypothesis import strategies as st

from mqinfer.batching import Pending
from mqinfer.pacing import LEAST_TOKENS, Pace

MOST = 256
HIDDEN_SIZE = 576
DECODING = [Pending(50, 51)] * 16
LONG = [Pending(0, 4000)]


def paced(fixed_s: float, token_s: float) -> Pace:
    """Has seen decode steps and full ones of a stage that takes so long."""
    pace = Pace(HIDDEN_SIZE)
    for tokens in (MOST, 16, 16, 16):
        pace.note(tokens, fixed_s + token_s * tokens, token_s)
    return pace


def test_without_observations_a_step_is_full() -> None:
    assert Pace(HIDDEN_SIZE).step_tokens(DECODING + LONG, MOST) == MOST


def test_rows_that_decode_keep_two_thirds_of_their_rate_beside_one_long_prefill() -> None:
    fixed_s, token_s = 0.06, 0.0035
    tokens = paced(fixed_s, token_s).step_tokens(DECODING + LONG, MOST)
    decode_s, both_s = fixed_s + token_s * 16, fixed_s + token_s * tokens
    assert 0.66 < decode_s / both_s < 0.72


def test_a_prompts_later_positions_take_longer_and_a_step_has_fewer_of_them() -> None:
    pace = paced(0.06, 0.0005)
    first, later = (pace.step_tokens([*DECODING, Pending(at, 4000)], MOST) - 16 for at in (0, 4 * HIDDEN_SIZE))
    assert later == first // 2
    shared = pace.step_tokens([*DECODING, Pending(0, 4000), Pending(4 * HIDDEN_SIZE, 4000)], MOST) - 16
    assert shared == later


def test_where_positions_ride_along_for_nothing_a_step_is_full() -> None:
    assert paced(0.020, 1e-5).step_tokens(DECODING + LONG, MOST) == MOST
    assert paced(0.020, 0.0).step_tokens(DECODING + LONG, MOST) == MOST


def test_a_few_rows_that_decode_do_not_hold_up_many_that_prefill() -> None:
    many = [Pending(0, 100)] * 28
    assert paced(0.06, 0.0035).step_tokens(DECODING[:4] + many, MOST) == MOST


def test_a_step_of_prefills_alone_is_full() -> None:
    assert paced(0.06, 0.0035).step_tokens(LONG, MOST) == MOST


def test_a_prefill_goes_on_however_slow_it_is() -> None:
    assert paced(0.001, 0.5).step_tokens([Pending(50, 51), *LONG], MOST) >= 1 + LEAST_TOKENS


def test_a_worker_that_stalled_does_not_slow_prefills_down_for_ever() -> None:
    pace = Pace(HIDDEN_SIZE)
    pace.note(600, 5.0, 5.0 / 600)
    assert pace.step_tokens(DECODING + LONG, MOST) < MOST
    for _ in range(40):
        pace.note(16, 0.020, 1e-6)
    assert pace.step_tokens(DECODING + LONG, MOST) == MOST


@example([(1, 1e-320, 1e-320), (2, 2e-320, 0.0)], [5], 64)
@example([(1, 0.1, 0.1), (2, sys.float_info.max, sys.float_info.max)], [5], 64)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**31), st.floats(0, sys.float_info.max), st.floats(0, sys.float_info.max)),
        max_size=50,
    ),
    st.lists(st.integers(1, 5000), min_size=1, max_size=20),
    st.integers(1, 4096),
)
def test_whatever_was_seen_a_step_has_room_for_somebody_and_never_passes_its_bound(
    seen: list[tuple[int, float, float]], needs: list[int], most: int
) -> None:
    pace = Pace(HIDDEN_SIZE)
    for tokens, seconds, token_s in seen:
        pace.note(tokens, seconds, token_s)
    assert 1 <= pace.step_tokens([*DECODING[:1], *(Pending(0, need) for need in needs)], most) <= most


def test_positions_are_worth_a_forward_where_what_it_costs_anyway_is_a_ninth_of_it() -> None:
    assert 155 < paced(0.020, 0.001).worth_tokens() < 165
    assert paced(0.0, 0.001).worth_tokens() == 1.0
    assert Pace(HIDDEN_SIZE).worth_tokens() == math.inf
