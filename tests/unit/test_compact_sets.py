"""Sets that take little memory are sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mqinfer.batch_files import fingerprint
from mqinfer.compact_sets import FingerprintSet, LineSet


@given(st.lists(st.integers(0, 100_000), max_size=50))
def test_a_set_of_lines_is_a_set(numbers: list[int]) -> None:
    lines, known = LineSet(), set()
    for number in numbers:
        assert lines.add(number) == (number not in known)
        known.add(number)
    assert all(number in lines for number in known)
    assert 100_001 not in lines


#: Many that want the same place in the table, and those at its ends.
NUMBERS = st.one_of(st.integers(1, 2**64 - 1), st.integers(1, 80), st.integers(1, 80).map(lambda high: high << 32 | 63))


@given(st.lists(NUMBERS, max_size=200), st.integers(0, 300))
def test_a_set_of_fingerprints_is_a_set(numbers: list[int], expect: int) -> None:
    compact, known = FingerprintSet(expect), set()
    for number in numbers:
        assert (number in compact) == (number in known)
        assert compact.add(number) == (number not in known)
        known.add(number)
    assert all(number in compact for number in known)
    assert len(compact) == len(known)


def test_it_grows_and_the_fingerprint_0_is_one_too() -> None:
    compact = FingerprintSet()
    numbers = [0, *(fingerprint(str(at)) for at in range(10_000))]
    assert all(compact.add(number) for number in numbers)
    assert not any(compact.add(number) for number in numbers)
    assert all(number in compact for number in numbers)
    assert fingerprint("another") not in compact


def table_bytes(compact: FingerprintSet) -> int:
    return compact._table.itemsize * len(compact._table)


def test_it_takes_ten_bytes_for_each_that_it_expects_and_not_more_when_they_have_come() -> None:
    compact = FingerprintSet(expect=10_000)
    for at in range(10_000):
        compact.add(fingerprint(str(at)))
    assert table_bytes(compact) <= 10 * 10_000 + 8
    assert table_bytes(FingerprintSet(expect=10**12)) < 50 * 2**20
