"""A batch job's input, output and ticket in memory, in the place of files: what outlives a producer's process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from mqinfer.batch_files import Chunk, Tag, fingerprint
from mqinfer.batch_job import BatchJob
from mqinfer.batch_output import Ticket
from mqinfer.batch_rows import Rows
from mqinfer.messages import Request
from mqinfer.openai_bodies import COMPLETIONS
from mqinfer.plan import Plan
from mqinfer.queues import new_id
from simulation.oracle import text_of

CHUNK_LINES = 4


class SimTokenizer:
    """One token is one character."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens."""
        return text_of(tokens)

    def decode_token(self, token: int) -> str:
        """The text of one token."""
        return text_of([token])


@dataclass(slots=True)
class Disk:
    """What is written stays."""

    rows: list[bytes] = field(default_factory=list)
    ticket: dict[str, object] = field(default_factory=dict)
    #: Every job that was begun for it.
    jobs: list[str] = field(default_factory=list)


@dataclass(slots=True)
class MemoryOutput:
    """Has the interface of an OutputFile."""

    disk: Disk
    answered: int = 0
    failed: int = 0
    ids: set[int] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)

    @classmethod
    def open(cls, disk: Disk) -> MemoryOutput:
        """Knows what is there, as a later run of a batch does."""
        output = cls(disk)
        for raw in disk.rows:
            row = json.loads(raw)
            output.ids.add(fingerprint(row["custom_id"]))
            output.failed += row["error"] is not None
            output.answered += row["error"] is None
        return output

    def append(self, rows: list[bytes]) -> None:
        """Written whole or not at all; torn rows are OutputFile's business and tested there."""
        self.disk.rows += rows


@dataclass(slots=True)
class MemoryTicket(Ticket):
    """A Ticket on the simulated disk."""

    disk: Disk = field(default_factory=Disk)

    @classmethod
    def open(cls, disk: Disk, plan: Plan) -> MemoryTicket:
        """The one of an earlier run, or a new one."""
        if not disk.ticket:
            disk.jobs.append(new_id("job"))
            return cls(None, disk.jobs[-1], plan.digest, disk=disk)
        return cls(None, str(disk.ticket["job"]), plan.digest, int(str(disk.ticket["enqueued"])), disk=disk)

    def save(self) -> None:
        """See Ticket."""
        self.disk.ticket = {"job": self.job, "enqueued": self.enqueued}

    def remove(self) -> None:
        """See Ticket."""
        self.disk.ticket = {}


@dataclass(frozen=True, slots=True)
class SimReader:
    """Has the interface of a LineReader: requests of one job."""

    job: str
    plan: Plan
    #: (custom_id, prompt, max_tokens) of each line.
    lines: Sequence[tuple[str, tuple[int, ...], int]]
    path: Path = Path("prompts")

    def chunks(self, has: Callable[[int, str | None], bool], size: int = CHUNK_LINES) -> Iterator[Chunk]:
        """See LineReader."""
        numbered = iter(enumerate(self.lines, 1))
        while batch := list(islice(numbered, size)):
            todo = {number: self._request(number, *line) for number, line in batch if not has(number, line[0])}
            yield Chunk(todo, [], batch[-1][0], "")

    def _request(self, number: int, name: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
        return Request(
            id=f"{self.job}.{number}",
            job=self.job,
            plan=self.plan.digest,
            tag=Tag(number, name, COMPLETIONS, "sim").dump(),
            prompt=prompt,
            max_tokens=max_tokens,
        )


class SimBatch(BatchJob):
    """Tells when it finds that the fleet has lost its requests."""

    lost: Callable[[], None] = staticmethod(lambda: None)

    async def _enqueue_again(self) -> None:
        self.lost()
        await super()._enqueue_again()


def batch_job(
    disk: Disk,
    plan: Plan,
    lines: Sequence[tuple[str, tuple[int, ...], int]],
    window: int,
    lost: Callable[[], None],
) -> BatchJob:
    """One run of a batch over that disk: what `mqinfer batch` makes of its files."""
    ticket = MemoryTicket.open(disk, plan)
    reader = SimReader(ticket.job, plan, lines)
    rows = Rows(MemoryOutput.open(disk), SimTokenizer().decode_token)  # type: ignore[arg-type]
    batch = SimBatch(reader, rows, ticket, plan, window=window)  # type: ignore[arg-type]
    batch.lost = lost
    return batch
