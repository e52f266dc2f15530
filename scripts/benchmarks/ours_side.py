"""A process of mqinfer that runs jobs as `mqinfer batch` does: files in, files out. See `ours`.

With --broker it is the producer alone, for a fleet of other processes; without, the whole pipeline in one process over
`memory://`. What its jobs' rows came to is told by the results that passed through, with the times they came.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.side import Channel
from mqinfer import checkpoint, survey
from mqinfer.batch_files import LineReader, Tag
from mqinfer.batch_job import BatchJob
from mqinfer.batch_output import OutputFile, Ticket
from mqinfer.batch_rows import Rows
from mqinfer.link import Connect
from mqinfer.messages import Request, Result
from mqinfer.observe import log_to_stderr
from mqinfer.openai_bodies import failed
from mqinfer.plan import Plan, read
from mqinfer.producer import Arrival, Producer
from mqinfer.queues import Topology, new_id
from mqinfer.settings import BatchSettings, WorkerSettings, load
from mqinfer.tokenizer import Tokenizer, hide_torch
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

#: How long answers are waited for when a fleet is asked how it is: as often it is asked.
SURVEY_S = 0.3


class WatchedRows(Rows):
    """Rows that remember, by line, the tokens of each result and when it was written."""

    def __init__(self, output: OutputFile, tokenizer: Tokenizer) -> None:
        super().__init__(output, tokenizer.decode_token)
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.times_s: dict[int, float] = {}

    async def land(self, arrivals: Sequence[Arrival]) -> list[int]:
        """As in Rows. Raises: RuntimeError where a row failed."""
        numbers = await super().land(arrivals)
        for message in (arrival.message for arrival in arrivals):
            if not isinstance(message, Result):
                continue
            if failed(message):
                raise RuntimeError(f"{message.id}: {message.error}")
            number = Tag.load(message.tag).number
            self.tokens[number], self.times_s[number] = message.output, time.time()
        return numbers


class Jobs:
    """Runs jobs of one pipeline; files in `folder`."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, connect: Connect, folder: Path) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._connect = connect
        self._folder = folder

    async def run(self, jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """All jobs, each `after_s` after the start; from the first one's to the last row on disk."""
        began_s, started_s = time.perf_counter(), time.time()
        rows = await asyncio.gather(*(self._job(job["rows"], job.get("after_s", 0.0)) for job in jobs))
        seconds = time.perf_counter() - began_s
        return {
            "seconds": seconds,
            "outputs": [[own.tokens[number] for number in sorted(own.tokens)] for own in rows],
            "started_s": started_s,
            "times_s": [[own.times_s[number] for number in sorted(own.times_s)] for own in rows],
        }

    async def _job(self, asked: Sequence[dict[str, Any]], after_s: float) -> WatchedRows:
        name = new_id("bench")
        prompts, output = self._folder / f"{name}.jsonl", self._folder / f"{name}-results.jsonl"
        lines = [{"custom_id": f"row-{index}", "ignore_eos": True, **row} for index, row in enumerate(asked)]
        prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        await asyncio.sleep(after_s)
        settings = load(BatchSettings)
        reader = LineReader(prompts, name, self._plan, self._tokenizer, settings)
        with contextlib.closing(OutputFile(output)) as file:
            rows = WatchedRows(file, self._tokenizer)
            ticket = Ticket(output.with_name(f"{output.name}.job"), name, self._plan.digest)
            batch = BatchJob(reader, rows, ticket, self._plan, window=settings.window)
            await batch.run(self._connect, asyncio.Event())
        return rows

    async def wait_for(self, workers: Sequence[int]) -> dict[str, Any]:
        """Returns when a coordinator and so many workers of each stage answer."""
        async with self._linked() as transport:
            while True:
                seen = await survey.take(transport, self._plan, wait_s=SURVEY_S)
                there = [len(seen.workers(stage)) for stage in range(len(self._plan.stages))]
                if seen.coordinators() and there == list(workers):
                    return {}

    async def run_watched(self, jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """As `run`; also the most that any worker's keys and values took meanwhile."""
        running = asyncio.ensure_future(self.run(jobs))
        most_bytes = 0.0
        async with self._linked() as transport:
            while not running.done():
                seen = await survey.take(transport, self._plan, wait_s=SURVEY_S)
                workers = [report for report in seen.reports.values() if report.role == "worker"]
                most_bytes = max([most_bytes, *(report.values["kv_used_bytes"] for report in workers)])
        return {**await running, "kv_used_bytes": most_bytes}

    async def fill(self, rows: Sequence[dict[str, Any]], count: int) -> dict[str, Any]:
        """Enqueue `count` requests made of the `rows` in turn; returns when coordinators hold them all."""
        job = new_id("bench")
        requests = (
            Request(
                id=f"{job}.{number}",
                job=job,
                plan=self._plan.digest,
                prompt=tuple(rows[number % len(rows)]["prompt"]),
                max_tokens=rows[number % len(rows)]["max_tokens"],
            )
            for number in range(count)
        )
        async with self._linked() as transport:
            producer = Producer(transport, Topology(self._plan.name), job)
            await producer.open()
            await producer.submit(requests)
            held = 0
            while held < count:
                held = (await survey.take(transport, self._plan, wait_s=SURVEY_S)).in_flight()
            return {"held": held}

    @contextlib.asynccontextmanager
    async def _linked(self) -> AsyncIterator[Transport]:
        transport = await self._connect()
        try:
            yield transport
        finally:
            await transport.close()


async def serve(channel: Channel, jobs: Jobs) -> None:
    """Answer until the pipe is closed."""
    while (question := await asyncio.to_thread(channel.read)) is not None:
        match question.pop("op"):
            case "run":
                answer = await jobs.run(**question)
            case "run-watched":
                answer = await jobs.run_watched(**question)
            case "wait-for":
                answer = await jobs.wait_for(**question)
            case "fill":
                answer = await jobs.fill(**question)
            case other:
                raise ValueError(other)
        channel.write(**answer)


async def produce(channel: Channel, plan: Plan, broker: str, folder: Path) -> None:
    """The producer of a fleet."""

    async def connect() -> Transport:
        return await open_transport(broker, name="mqinfer bench")

    tokenizer = Tokenizer.load(checkpoint.resolve_tokenizer(plan.model, plan.revision))
    await serve(channel, Jobs(plan, tokenizer, connect, folder))


async def embed(channel: Channel, plan: Plan, threads: int, folder: Path) -> None:
    """Everything in this process, as `mqinfer batch --model` has it."""
    from mqinfer import embedded

    checkpoint_folder = checkpoint.resolve(plan.model, plan.revision)
    tokenizer = Tokenizer.load(checkpoint_folder)
    settings = load(WorkerSettings, threads=threads, codec="raw")
    async with embedded.pipeline(plan, checkpoint_folder, tokenizer, settings) as connect:
        jobs = Jobs(plan, tokenizer, connect, folder)
        await jobs.wait_for(list(Counter(range(len(plan.stages))).values()))
        await serve(channel, jobs)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--broker")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    channel = Channel()
    settings = load(BatchSettings)
    log_to_stderr(level=settings.log_level, as_json=settings.log_json)
    plan = read(options.pipeline)
    with tempfile.TemporaryDirectory(prefix="mqinfer-bench-") as name:
        folder = Path(name)
        if options.broker:
            hide_torch()
            work = produce(channel, plan, options.broker, folder)
        else:
            work = embed(channel, plan, options.threads, folder)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)


if __name__ == "__main__":
    main()
