"""Which lines of a batch have their row, and the writing of rows: each line gets one, whatever comes twice.

Results are acked only after their rows are on disk. No reading of input, no queues beyond acking what came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mqinfer.batch_files import Refusal, Tag, error_row, fingerprint, result_row
from mqinfer.batch_output import OutputFile
from mqinfer.messages import JobTotal, Result
from mqinfer.observe import BODY_REFUSED, emit
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


class Rows:
    """The rows of one job, on their way into its output file."""

    def __init__(self, output: OutputFile, token_text: TokenText) -> None:
        self._output = output
        self._token_text = token_text
        self._done = output.lines
        self._writing = asyncio.Lock()
        self.progress = Progress(answered=output.answered, failed=output.failed)
        #: Set when a detached job says how many rows it has.
        self.total: Arrival | None = None

    def has(self, number: int, custom_id: str | None) -> bool:
        """Whether the line has its row."""
        return number in self._done or (custom_id is not None and fingerprint(custom_id) in self._output.ids)

    async def land(self, arrivals: Sequence[Arrival]) -> list[int]:
        """Write the results that are new, then ack them all; the numbers of their lines. Raises: OutputError."""
        results = [arrival.message for arrival in arrivals if isinstance(arrival.message, Result)]
        tagged = [(tag, result) for result in results if (tag := _tag(result)) is not None]
        await asyncio.shield(self._write_results(tagged))
        for arrival in arrivals:
            if isinstance(arrival.message, JobTotal):
                self.total = arrival  # stays in the queue until the job is collected whole
                self.progress.total = arrival.message.total
            else:
                await arrival.delivery.ack()
        return [tag.number for tag, _ in tagged]

    async def refuse(self, refusals: Sequence[Refusal]) -> None:
        """Write error rows for lines that can't be asked for. Raises: OutputError."""
        await asyncio.shield(self._write_refusals(refusals))

    async def settle(self) -> None:
        """Returns when no row is being written: then the file may be closed."""
        async with self._writing:
            return

    # A write goes on when its caller is cancelled, and the next one waits for it: what is noted as done is on disk.

    async def _write_results(self, results: Sequence[tuple[Tag, Result]]) -> None:
        async with self._writing:
            new = {tag.number: (tag, result) for tag, result in results if not self.has(tag.number, tag.custom_id)}
            await self._append({n: result_row(result, self._token_text) for n, (_, result) in new.items()})
            for _, result in new.values():
                self.progress.output_tokens += len(result.output)
                self.progress.failed += failed(result)
                self.progress.answered += not failed(result)

    async def _write_refusals(self, refusals: Sequence[Refusal]) -> None:
        async with self._writing:
            new = {item.number: item for item in refusals if not self.has(item.number, item.custom_id)}
            await self._append(
                {n: error_row(n, item.custom_id, item.why, code="invalid_request") for n, item in new.items()}
            )
            self.progress.failed += len(new)

    async def _append(self, rows: Mapping[int, bytes]) -> None:
        if rows:
            await asyncio.to_thread(self._output.append, list(rows.values()))
        for number in rows:
            self._done.add(number)


def _tag(result: Result) -> Tag | None:
    """Where the result belongs; None, and a word in the log, for one that nobody of ours asked for."""
    try:
        return Tag.load(result.tag)
    except (ValueError, TypeError):
        emit(BODY_REFUSED, queue=result.job, reason="a result that is of no line", bytes=len(result.tag))
        return None
