"""Bugs to be planted, each of which the simulation must find: that it can fail is shown by making it fail."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

BUGS: dict[str, "Bug"] = {}


@dataclass(frozen=True, slots=True)
class Bug:
    plant: Callable[[], AbstractContextManager[object]]
