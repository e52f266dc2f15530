"""A batch job: lines are fed to the fleet through a window, results are written as they come.

The output file is the truth, the results queue holds what is not in it yet, and the ticket beside the file
says which lines were enqueued: whatever dies, the next run goes on from there. See docs/architecture.md.
"""

from __future__ import annotations

import asyncio

from mqinfer import survey
from mqinfer.batch_files import Chunk, LineReader, Refusal, Tag
from mqinfer.batch_output import Ticket
from mqinfer.batch_rows import Progress, Rows
from mqinfer.errors import SettingsError
from mqinfer.link import Connect, keep_linked
from mqinfer.messages import FinishReason, JobTotal, Result
from mqinfer.plan import Plan
from mqinfer.producer import Producer
from mqinfer.queues import Topology
from mqinfer.transports.base import Transport

#: With nothing coming for so long, it is looked whether the fleet still has the job's requests.
STALL_S = 10.0
#: So many looks in a row must find nothing before lines are enqueued again.
STALL_LOOKS = 4
#: Results handed over ahead of being written.
COLLECT_PREFETCH = 1024
#: Who does not want to wait takes what comes until nothing comes for so long.
NO_WAIT_S = 2.0


class BatchJob:
    """One run of `mqinfer batch`."""

    def __init__(
        self, reader: LineReader, rows: Rows, ticket: Ticket, plan: Plan, *, window: int, abandoned: str = ""
    ) -> None:
        """`abandoned`: an earlier job of the same output file, whose results nobody will collect."""
        self._reader = reader
        self._rows = rows
        self._ticket = ticket
        self._plan = plan
        self._window = window
        self._chunks = reader.chunks(rows.has)
        #: Taken from the reader, not yet surely enqueued.
        self._pending: Chunk | None = None
        self._fed = False
        #: Lines up to here are in the fleet's hands from an earlier run.
        self._presumed = ticket.enqueued
        self._abandoned = abandoned
        #: Numbers of enqueued lines without a row; at most the window and one chunk.
        self._flying: set[int] = set()
        self._changed = asyncio.Condition()
        #: Every line has its row, and the job's queue and ticket are gone.
        self.finished = False

    @property
    def answered(self) -> bool:
        """Whether every line has its row."""
        return self._fed and not self._flying

    async def run(self, connect: Connect, stop: asyncio.Event) -> None:
        """Until every line has its row or `stop` is set. Raises: Refused; OutputError or RequestError in a group."""

        async def session(transport: Transport) -> None:
            self._flying = {number for number in self._flying if not self._rows.has(number, None)}
            producer = Producer(transport, Topology(self._plan.name), self._ticket.job)
            if self._abandoned:
                await Producer(transport, Topology(self._plan.name), self._abandoned).forget()
            await asyncio.to_thread(self._ticket.save)  # before the job's queue is there: nobody else would remove it
            await producer.open()
            await producer.listen(prefetch=self._window)
            async with asyncio.TaskGroup() as tasks:
                loops = (
                    transport.closed(),
                    self._collect(producer),
                    self._feed(producer),
                    self._watch(transport, producer),
                    self._wake_when(stop),
                )
                background = [tasks.create_task(loop) for loop in loops]
                async with self._changed:
                    await self._changed.wait_for(lambda: self.answered or stop.is_set())
                for task in background:
                    task.cancel()
            if self.answered:
                await producer.forget()
                self._ticket.remove()
                self.finished = True

        try:
            await keep_linked("batch", connect, session, stop)
        finally:
            await self._rows.settle()

    async def _feed(self, producer: Producer) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(self._may_feed)
            self._pending = self._pending or next(self._chunks, None)
            if self._pending is None:
                self._fed = True
            else:
                await self._enqueue(producer, self._pending)
                self._pending = None
            await self._tell()

    def _may_feed(self) -> bool:
        """What was not surely enqueued over the last link is in the window already, and goes out again first."""
        return not self._fed and (self._pending is not None or len(self._flying) < self._window)

    async def _enqueue(self, producer: Producer, chunk: Chunk) -> None:
        await self._rows.refuse(chunk.refusals)
        self._flying.update(number for number in chunk.requests if not self._rows.has(number, None))
        if chunk.last > self._ticket.announced:  # before, so that a run after our death knows whose lines they are
            self._ticket.announced, self._ticket.digest = chunk.last, chunk.digest
            await asyncio.to_thread(self._ticket.save)
        await producer.submit(request for number, request in chunk.requests.items() if number > self._presumed)
        self._ticket.enqueued = max(self._ticket.enqueued, chunk.last)
        await asyncio.to_thread(self._ticket.save)

    async def _collect(self, producer: Producer) -> None:
        async for arrivals in producer.arrivals():
            self._flying.difference_update(await self._rows.land(arrivals))
            self._rows.progress.note = ""
            await self._tell()

    async def _watch(self, transport: Transport, producer: Producer) -> None:
        """When nothing comes, say why; when the fleet has lost what was enqueued, enqueue it again."""
        looks, before = 0, -1
        while True:
            await asyncio.sleep(STALL_S)
            if self._rows.progress.done != before or not self._flying:
                looks, before = 0, self._rows.progress.done
                continue
            seen = await survey.take(transport, self._plan)
            self._rows.progress.note = seen.complaint()
            gone = seen.holds_nothing() and not await producer.waiting()
            looks = looks + 1 if gone else 0
            if looks >= STALL_LOOKS:
                looks = 0
                await self._enqueue_again()

    async def _enqueue_again(self) -> None:
        self._presumed = 0
        self._flying.clear()
        self._chunks = self._reader.chunks(self._rows.has)
        self._fed = False
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wake_when(self, stop: asyncio.Event) -> None:
        await stop.wait()
        await self._tell()


async def enqueue_all(
    reader: LineReader, plan: Plan, job: str, connect: Connect, progress: Progress, stop: asyncio.Event
) -> bool:
    """Enqueue every line and leave; bad lines become results at once. False where `stop` was set before the end.

    The job is then the lines that were enqueued until that. Raises: TransportError.
    """
    transport = await connect()
    try:
        producer = Producer(transport, Topology(plan.name), job)
        await producer.open()
        whole = await _enqueue_until(stop, reader, producer, progress)
        await producer.put(JobTotal(job=job, total=progress.done))
        return whole
    finally:
        await transport.close()


async def _enqueue_until(stop: asyncio.Event, reader: LineReader, producer: Producer, progress: Progress) -> bool:
    for chunk in reader.chunks(lambda number, custom_id: False):
        await producer.submit(chunk.requests.values())
        for refusal in chunk.refusals:
            await producer.put(_failure(producer.job, refusal))
        progress.answered += len(chunk.requests)
        progress.failed += len(chunk.refusals)
        if stop.is_set():
            return False
    return True


def _failure(job: str, refusal: Refusal) -> Result:
    return Result(
        id=f"{job}.{refusal.number}",
        job=job,
        tag=Tag(refusal.number, refusal.custom_id, "", "").dump(),
        finish_reason=FinishReason.ERROR,
        prompt_tokens=0,
        error_code="invalid_request",
        error=refusal.why,
    )


async def collect(job: str, rows: Rows, connect: Connect, stop: asyncio.Event, *, wait: bool) -> bool:
    """Write a detached job's results; True when all of them have come and the job is forgotten.

    With `wait` until then or until `stop` is set, otherwise only what is there.
    Raises: Refused; OutputError, Unroutable (in a group) where the job does not exist.
    """
    whole = False
    topology = Topology("collect")  # of a pipeline that need not be known: only for dead letters

    async def session(transport: Transport) -> None:
        nonlocal whole
        producer = Producer(transport, topology, job)
        rows.total = None  # it comes again over this link
        if await producer.waiting() is None:
            raise SettingsError(f"there is no job {job}: it was collected already, or never enqueued on this broker")
        await producer.listen(prefetch=COLLECT_PREFETCH)
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(transport.closed())
            ended = tasks.create_task(_collect_all(producer, rows, wait=wait))
            halt = tasks.create_task(stop.wait())
            await asyncio.wait({ended, halt}, return_when=asyncio.FIRST_COMPLETED)
            whole = ended.done() and ended.result()
            for task in (watch, ended, halt):
                task.cancel()
        if whole:
            await producer.forget()

    try:
        await keep_linked("results", connect, session, stop)
    finally:
        await rows.settle()
    return whole


async def _collect_all(producer: Producer, rows: Rows, *, wait: bool) -> bool:
    def whole() -> bool:
        return rows.total is not None and rows.progress.done >= rows.progress.total

    arrivals = producer.arrivals()
    while not whole():
        try:
            async with asyncio.timeout(None if wait else NO_WAIT_S):
                await rows.land(await anext(arrivals))
        except TimeoutError:
            return False
    return True
