"""Fixtures for unit tests: what people see, on a terminal and in a pipe."""

from __future__ import annotations

import pytest
from screen import Screen, install


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return install(monkeypatch, terminal=True)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return install(monkeypatch, terminal=False)
