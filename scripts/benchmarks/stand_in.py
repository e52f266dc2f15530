"""Stands in for a fleet that answers every request at once: what is measured then is who asks.

As a process of its own for a broker; or, as a side, with the asker over `memory://`. See `memory`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from pathlib import Path

import uvloop

from benchmarks.side import Channel
from mqinfer import checkpoint
from mqinfer.batch_files import LineReader
from mqinfer.batch_job import BatchJob
from mqinfer.batch_output import OutputFile, Ticket
from mqinfer.batch_rows import Rows
from mqinfer.messages import FinishReason, Request, Result
from mqinfer.plan import Plan, read
from mqinfer.queues import Topology, new_id, results
from mqinfer.settings import BatchSettings, load
from mqinfer.tokenizer import Tokenizer, hide_torch
from mqinfer.transports import open_transport
from mqinfer.transports.base import Delivery, Transport
from mqinfer.wire import decode, encode

#: Requests being answered at the same time.
AT_ONCE = 64
#: Tokens and text of each answer.
OUTPUT, TEXT = tuple(range(1000, 1016)), "sixteen tokens that make an answer of about this length, here"


async def answer_all(transport: Transport, plan: Plan) -> None:
    """Until cancelled."""
    requests = Topology(plan.name).requests
    inbox: asyncio.Queue[Delivery] = asyncio.Queue()
    for spec in (Topology(plan.name).dead, requests):
        await transport.declare(spec)
    await transport.consume(requests.name, prefetch=2 * AT_ONCE, sink=inbox.put_nowait)

    async def answer() -> None:
        while True:
            delivery = await inbox.get()
            request = decode(delivery.body)
            if not isinstance(request, Request):
                raise TypeError(f"a {type(request).__name__} among requests")
            await transport.publish(results(request.job).name, encode(_result(request)), persistent=True)
            await delivery.ack()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(answer())


def _result(request: Request) -> Result:
    return Result(
        id=request.id,
        job=request.job,
        tag=request.tag,
        finish_reason=FinishReason.LENGTH,
        prompt_tokens=len(request.prompt),
        output=OUTPUT,
        text=TEXT,
    )


async def over_broker(plan: Plan, broker: str) -> None:
    """Answer until killed."""
    await answer_all(await open_transport(broker, name="mqinfer bench stand-in"), plan)


async def batch_here(plan: Plan, prompts: Path, output: Path) -> int:
    """The job of a whole file, as `mqinfer batch` does it, with its answers from here; rows that were answered."""
    url = f"memory://{new_id('bench')}"

    async def connect() -> Transport:
        return await open_transport(url)

    tokenizer = Tokenizer.load(checkpoint.resolve_tokenizer(plan.model, plan.revision))
    settings = load(BatchSettings)
    ticket, _ = Ticket.beside(output, prompts, job=new_id("job"), plan=plan.digest)
    reader = LineReader(prompts, ticket.job, plan, tokenizer, settings)
    with contextlib.closing(OutputFile(output)) as file:
        rows = Rows(file, tokenizer.decode_token)
        batch = BatchJob(reader, rows, ticket, plan, window=settings.window)
        answering = asyncio.ensure_future(answer_all(await connect(), plan))
        try:
            await batch.run(connect, asyncio.Event())
        finally:
            answering.cancel()
    return rows.progress.answered


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--broker")
    options = parser.parse_args()
    hide_torch()
    plan = read(options.pipeline)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if options.broker:
            runner.run(over_broker(plan, options.broker))
        channel = Channel()
        while (question := channel.read()) is not None:
            answered = runner.run(batch_here(plan, Path(question["prompts"]), Path(question["output"])))
            channel.write(answered=answered)


if __name__ == "__main__":
    main()
