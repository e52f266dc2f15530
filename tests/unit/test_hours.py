"""Hours of the day in which a worker works."""

from datetime import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqinfer.hours import Hours


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("20:00-07:00", ["20:00", "23:59:59", "00:00", "06:59"], ["07:00", "12:00", "19:59:59"]),
        ("09:00-17:30", ["09:00", "17:29"], ["08:59", "17:30", "00:00"]),
        ("22:00-23:00, 01:00-02:00", ["22:30", "01:30"], ["23:00", "00:30", "02:00"]),
        ("00:00-00:00", ["00:00", "12:00", "23:59"], []),
        ("", ["00:00", "13:37"], []),
    ],
)
def test_a_moment_is_inside_from_the_beginning_until_before_the_end(
    text: str, inside: list[str], outside: list[str]
) -> None:
    hours = Hours.parse(text)
    assert all(hours.covers(time.fromisoformat(moment)) for moment in inside)
    assert not any(hours.covers(time.fromisoformat(moment)) for moment in outside)


@pytest.mark.parametrize("text", ["20:00", "20:00-", "-07:00", "20-7", "8pm-7am", "20:00-25:00", "20:00+01:00-07:00"])
def test_what_is_no_window_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="write 20:00-07:00"):
        Hours.parse(text)


@given(st.times(), st.times(), st.times())
def test_what_one_window_leaves_out_its_opposite_covers(begin: time, end: time, moment: time) -> None:
    if begin == end:
        return
    window = Hours.parse(f"{begin.isoformat()}-{end.isoformat()}")
    opposite = Hours.parse(f"{end.isoformat()}-{begin.isoformat()}")
    assert window.covers(moment) != opposite.covers(moment)
