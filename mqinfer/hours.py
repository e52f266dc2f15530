"""Hours of the day, as in `--hours 20:00-07:00`: parsed, and whether a moment is in them. No clock of its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import time
from typing import NamedTuple


class Window(NamedTuple):
    """From `begin` until before `end`; over midnight where the end is not later."""

    begin: time
    end: time

    def covers(self, moment: time) -> bool:
        """Whether that moment of any day is in it."""
        if self.begin < self.end:
            return self.begin <= moment < self.end
        return moment >= self.begin or moment < self.end


@dataclass(frozen=True, slots=True)
class Hours:
    """One or several windows, every day; none at all: always."""

    windows: tuple[Window, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Hours:
        """ "20:00-07:00", or several with commas; "" is always. Raises: ValueError, a sentence for people."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return cls(tuple(_window(part) for part in parts))

    def covers(self, moment: time) -> bool:
        """Whether that moment of any day is in one of them."""
        return not self.windows or any(window.covers(moment) for window in self.windows)


def _window(text: str) -> Window:
    begin, dash, end = text.partition("-")
    try:
        window = Window(time.fromisoformat(begin.strip()), time.fromisoformat(end.strip()))
    except ValueError:
        window = None
    if not dash or window is None or window.begin.tzinfo or window.end.tzinfo:
        raise ValueError(f"{text!r} is no window of hours: write 20:00-07:00, in local time")
    return window
