"""Which lines of a batch have their row, and the writing of rows: each line gets one, whatever comes twice.

Results are acked only after their rows are on disk. No reading of input, no queues beyond acking what came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from mqinfer.batch_files import OutputFile, Refusal, Tag, error_row, fingerprint, result_row
from mqinfer.messages import JobTotal, Result
from mqinfer.openai_bodies import TokenText, failed
from mqinfer.producer import Arrival


@dataclass(slots=True)
class Progress:
    """How far a job is, for people."""

    #: Lines in all; 0 while that is not known.
    total: int = 0
    answered: int = 0
    failed: int = 0
    output_tokens: int = 0
    #: Why nothing comes, where that is known.
    note: str = ""

    @property
    def done(self) -> int:
        """Lines that have a row."""
        return self.answered + self.failed


@dataclass(slots=True)
class LineSet:
    """A set of line numbers, one bit each."""

    _bits: bytearray = field(default_factory=bytearray)

    def add(self, number: int) -> bool:
        """Whether it is new."""
        byte, bit = divmod(number, 8)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 4096 - len(self._bits)))
        new = not self._bits[byte] >> bit & 1
        self._bits[byte] |= 1 << bit
        return new

    def __contains__(self, number: int) -> bool:
        byte, bit = divmod(number, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)


class Rows:
    """The rows of one job, on their way into its output file."""

    def __init__(self, output: OutputFile, token_text: TokenText) -> None:
        self._output = output
        self._token_text = token_text
        self._done = LineSet()
        for number in output.lines:
            self._done.add(number)
        self.progress = Progress(answered=output.answered, failed=output.failed)
        #: Set when a detached job says how many rows it has.
        self.total: Arrival | None = None

    def has(self, number: int, custom_id: str | None) -> bool:
        """Whether the line has its row."""
        return number in self._done or (custom_id is not None and fingerprint(custom_id) in self._output.ids)

    async def land(self, arrivals: Sequence[Arrival]) -> list[int]:
        """Write the results that are new, then ack them all; the numbers of their lines. Raises: OSError."""
        rows, numbers = [], []
        for message, _ in arrivals:
            if isinstance(message, Result):
                tag = Tag.load(message.tag)
                numbers.append(tag.number)
                if not self.has(tag.number, tag.custom_id):
                    self._done.add(tag.number)
                    rows.append(result_row(message, self._token_text))
                    self._count(message)
        if rows:
            await asyncio.to_thread(self._output.append, rows)
        for arrival in arrivals:
            if isinstance(arrival.message, JobTotal):
                self.total = arrival  # stays in the queue until the job is collected whole
                self.progress.total = arrival.message.total
            else:
                await arrival.delivery.ack()
        return numbers

    async def refuse(self, refusals: Sequence[Refusal]) -> None:
        """Write error rows for lines that can't be asked for. Raises: OSError."""
        rows = []
        for refusal in refusals:
            if not self.has(refusal.number, refusal.custom_id):
                self._done.add(refusal.number)
                rows.append(error_row(refusal.number, refusal.custom_id, refusal.why, code="invalid_request"))
                self.progress.failed += 1
        if rows:
            await asyncio.to_thread(self._output.append, rows)

    def _count(self, result: Result) -> None:
        self.progress.output_tokens += len(result.output)
        if failed(result):
            self.progress.failed += 1
        else:
            self.progress.answered += 1
