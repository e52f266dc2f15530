"""Both consoles of the command line, written to memory."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mqinfer import console


class Screen:
    """Both consoles, written to memory."""

    def __init__(self, *, terminal: bool) -> None:
        self.out = Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False, color_system=None)
        self.err = Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False, color_system=None)

    @staticmethod
    def text(of: Console) -> str:
        assert isinstance(of.file, io.StringIO)
        return of.file.getvalue()


def install(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> Screen:
    screen = Screen(terminal=terminal)
    monkeypatch.setattr(console, "out", screen.out)
    monkeypatch.setattr(console, "err", screen.err)
    return screen
