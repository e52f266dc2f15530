"""Memory and file descriptors of long-lived processes, for growth that a soak would show. Linux only (/proc)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from processes import Actor

PAGE_BYTES = 4096
#: What a process may grow by after the warm-up: the allocator's whims, connections that are just being replaced.
RSS_GROWTH_BYTES = 96 * 2**20
FDS_GROWTH = 12


@dataclass(frozen=True, slots=True)
class Size:
    """What a process takes."""

    rss_bytes: int
    fds: int


def measure(pid: int) -> Size | None:
    """None where it has ended."""
    proc = Path("/proc") / str(pid)
    try:
        pages = int((proc / "statm").read_text().split()[1])
        return Size(pages * PAGE_BYTES, len(list((proc / "fd").iterdir())))
    except (OSError, IndexError):
        return None


class Watch:
    """Measures processes again and again; a process that was started anew is another process."""

    def __init__(self, warm_up_s: float) -> None:
        self._warm_up_s = warm_up_s
        #: By pid: when it was seen first.
        self._seen_s: dict[int, float] = {}
        #: By pid: the actor's name and its size after the warm-up.
        self._first: dict[int, tuple[str, Size]] = {}
        self._last: dict[int, Size] = {}

    def look(self, actors: Iterable[Actor], now_s: float) -> None:
        """Measure those that have been known for longer than the warm-up."""
        for actor in actors:
            pid = actor.process.pid
            warm = now_s - self._seen_s.setdefault(pid, now_s) >= self._warm_up_s
            if warm and (size := measure(pid)):
                self._first.setdefault(pid, (actor.name, size))
                self._last[pid] = size

    def lines(self) -> list[str]:
        """Growth by process, for people."""
        return [
            f"{name} (pid {pid}): {first.rss_bytes / 2**20:.0f} -> {last.rss_bytes / 2**20:.0f} MiB, "
            f"{first.fds} -> {last.fds} file descriptors"
            for pid, (name, first) in sorted(self._first.items(), key=lambda item: item[1][0])
            if (last := self._last.get(pid))
        ]

    def grown(self) -> list[str]:
        """Processes that grew by more than is allowed."""
        found = []
        for pid, (name, first) in self._first.items():
            last = self._last.get(pid, first)
            if last.rss_bytes - first.rss_bytes > RSS_GROWTH_BYTES:
                found.append(f"{name} grew by {(last.rss_bytes - first.rss_bytes) / 2**20:.0f} MiB")
            if last.fds - first.fds > FDS_GROWTH:
                found.append(f"{name} has {last.fds - first.fds} file descriptors more")
        return found
