"""Several figures that one scenario shows: each is a contender, and the scenario is played once in a round."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from benchmarks.measure import Contender


@dataclass(slots=True)
class Rounds:
    """Who asks first in a round has it played, the others get what it has shown; also those of other cases."""

    #: Gives all figures by name.
    play: Callable[[], Mapping[str, float]]
    _shown: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))

    def contenders(self, *names: str) -> list[Contender]:
        """One for each of these figures."""
        return [Contender(name, partial(self._ready, name)) for name in names]

    @contextmanager
    def _ready(self, name: str) -> Iterator[Callable[[], float]]:
        yield lambda: self._next(name)

    def _next(self, name: str) -> float:
        if not self._shown[name]:
            for shown, value in self.play().items():
                self._shown[shown].append(value)
        return self._shown[name].popleft()
