"""The codec that a worker's own link makes the faster one."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mqinfer.codec_choice import LOSSLESS, RAW, RETRY_EVERY, CodecChoice

TENSOR_BYTES = 256 * 576 * 4
#: Bytes a second of packing, and what is left of a tensor's bytes.
PACKING, RATIO = {RAW: 3e10, LOSSLESS: 1.4e9}, {RAW: 1.0, LOSSLESS: 0.75}
FIXED_S = 0.0005
SLOW, FAST = 1e8, 1e10


def sent(choice: CodecChoice, link: float, bodies: int, tensor_bytes: int = TENSOR_BYTES) -> Counter[str]:
    """What was chosen for so many bodies over a link of so many bytes a second."""
    chosen: Counter[str] = Counter()
    for _ in range(bodies):
        codec = choice.choose(tensor_bytes)
        chosen[codec] += 1
        publish_s = FIXED_S + tensor_bytes * RATIO[codec] / link
        choice.note(codec, tensor_bytes, pack_s=tensor_bytes / PACKING[codec], publish_s=publish_s)
    return chosen


def test_over_a_slow_link_bodies_are_compressed() -> None:
    assert sent(CodecChoice(), SLOW, 320)[LOSSLESS] >= 300


def test_over_a_fast_link_they_are_not() -> None:
    assert sent(CodecChoice(), FAST, 320)[RAW] >= 300


def test_a_link_that_becomes_slow_is_noticed() -> None:
    choice = CodecChoice()
    sent(choice, FAST, 1000)
    sent(choice, SLOW, 4 * RETRY_EVERY)
    assert sent(choice, SLOW, 320)[LOSSLESS] >= 300


def test_a_link_that_becomes_fast_is_noticed() -> None:
    choice = CodecChoice()
    sent(choice, SLOW, 1000)
    sent(choice, FAST, 20 * RETRY_EVERY)
    assert sent(choice, FAST, 320)[RAW] >= 300


def test_a_body_that_the_broker_kept_waiting_for_a_minute_decides_nothing_for_long() -> None:
    choice = CodecChoice()
    sent(choice, SLOW, 1000)
    choice.note(LOSSLESS, TENSOR_BYTES, pack_s=0.0, publish_s=60.0)
    assert sent(choice, SLOW, 20 * RETRY_EVERY)[LOSSLESS] > 10 * RETRY_EVERY


def test_small_and_large_tensors_are_told_apart() -> None:
    choice = CodecChoice()
    small_bytes = 576 * 4
    for _ in range(320):
        large = choice.choose(TENSOR_BYTES)
        choice.note(large, TENSOR_BYTES, pack_s=0.0, publish_s=0.01 if large == RAW else 0.005)
        small = choice.choose(small_bytes)
        choice.note(small, small_bytes, pack_s=0.0, publish_s=0.001 if small == RAW else 0.002)
    assert (choice.choose(TENSOR_BYTES), choice.choose(small_bytes)) == (LOSSLESS, RAW)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.floats(0, 1e9), st.booleans())))
def test_it_always_chooses_one_of_the_two_whatever_came_back_or_did_not(bodies: list[tuple[int, float, bool]]) -> None:
    choice = CodecChoice()
    for tensor_bytes, seconds, confirmed in bodies:
        codec = choice.choose(tensor_bytes)
        assert codec in (RAW, LOSSLESS)
        if confirmed:
            choice.note(codec, tensor_bytes, pack_s=seconds, publish_s=seconds)
