"""What several contenders of a case use in turn: opened for the first of them, closed after the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """A context that can be held by several at once."""

    def __init__(self, make: Callable[[], AbstractContextManager[T]]) -> None:
        self._make = make
        self._users = 0
        self._stack = ExitStack()
        self._value: T

    @contextmanager
    def held(self) -> Iterator[T]:
        """Raises: whatever `make` raises, for each that tries."""
        if not self._users:
            self._value = self._stack.enter_context(self._make())
        self._users += 1
        try:
            yield self._value
        finally:
            self._users -= 1
            if not self._users:
                self._stack.close()
