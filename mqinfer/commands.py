"""What each command does: settings and files in, actors run, a sentence or a table out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from mqinfer import checkpoint, console, survey
from mqinfer import plan as plans
from mqinfer.batch_files import LineReader, OutputFile, Ticket, count_lines
from mqinfer.batch_job import BatchJob, collect, enqueue_all
from mqinfer.batch_rows import Progress, Rows
from mqinfer.coordinator import Coordinator
from mqinfer.errors import SettingsError, Unroutable
from mqinfer.link import Connect
from mqinfer.plan import Plan
from mqinfer.queues import Topology, new_id
from mqinfer.settings import BatchSettings, CoordinatorSettings, Settings, WorkerSettings
from mqinfer.tokenizer import Tokenizer
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

#: Exit codes.
ALL_ANSWERED, SOME_ERRORS, INTERRUPTED = 0, 3, 130
#: Between the two looks from which `status` takes its rates.
STATUS_S = 1.0


@dataclass(frozen=True, slots=True)
class LocalPipeline:
    """A pipeline to run in this process: a plan's file, or a model and how to cut it."""

    model: str | None
    stages: int
    dtype: str


def read_plan(settings: Settings) -> Plan:
    """Raises: SettingsError, PlanError."""
    if settings.pipeline is None:
        raise SettingsError("give the plan's file with --pipeline (make one with `mqinfer plan`)")
    return plans.read(settings.pipeline)


def connecting(settings: Settings, actor: str) -> Connect:
    """How this actor opens its link."""

    async def connect() -> Transport:
        return await open_transport(settings.broker, name=f"mqinfer {actor}", heartbeat_s=settings.heartbeat_s)

    return connect


@contextlib.asynccontextmanager
async def linked(settings: Settings, actor: str) -> AsyncIterator[Transport]:
    """One link for a short command."""
    transport = await connecting(settings, actor)()
    try:
        yield transport
    finally:
        await transport.close()


# -- plan ----------------------------------------------------------------------------------------


def make_plan(
    model: str, *, stages: int | None, cut: str | None, dtype: str, name: str | None, revision: str, output: Path | None
) -> None:
    """Print the plan's table, write its file."""
    cuts = None
    if cut is not None:
        try:
            cuts = [int(layer) for layer in cut.split(",")]
        except ValueError:
            raise SettingsError(f"--cut {cut!r}: write layer numbers such as 10,20") from None
    if (stages is None) == (cuts is None):
        raise SettingsError("say either --stages N or --cut A,B,…")
    plan, facts = checkpoint.make_plan(model, stages=stages, cuts=cuts, dtype=dtype, name=name, revision=revision)
    console.out.print(console.plan_table(plan, checkpoint.stage_table(plan, facts)))
    if output is not None:
        plans.write(plan, output)
        console.err.print(f"wrote {output}")


# -- batch ---------------------------------------------------------------------------------------


async def batch_here(
    prompts: Path,
    output: Path,
    settings: BatchSettings,
    worker: WorkerSettings,
    local: LocalPipeline,
    *,
    retry_errors: bool,
    stop: asyncio.Event,
) -> int:
    """The embedded default: coordinator and all stages in this process. The exit code."""
    try:
        from mqinfer import embedded
    except ImportError as error:
        raise SettingsError(f"running the model here needs mqinfer[worker] ({error})") from error
    plan = _local_plan(settings, local)
    folder = checkpoint.resolve(local.model or plan.model, plan.revision)
    tokenizer = Tokenizer.load(folder)
    with contextlib.closing(OutputFile(output, retry_errors=retry_errors)) as file:
        rows = Rows(file, tokenizer.decode_token)
        job = new_id("batch")
        reader = LineReader(prompts, job, plan, tokenizer, settings)
        ticket = Ticket(None, job, plan.digest)
        batch = BatchJob(reader, rows, ticket, plan, window=settings.window, resumed=False)
        async with embedded.pipeline(plan, folder, tokenizer, worker, console.err.print) as connect:
            await _show(batch, rows, prompts, connect, stop)
    return _verdict(batch, rows, output)


def _local_plan(settings: BatchSettings, local: LocalPipeline) -> Plan:
    if local.model is None:
        if settings.pipeline is None:
            raise SettingsError("say which model: --model PATH_OR_ID, or --pipeline FILE (or --broker for a fleet)")
        return read_plan(settings)
    if "pipeline" in settings.model_fields_set and settings.pipeline is not None:
        return read_plan(settings)
    plan, _ = checkpoint.make_plan(local.model, stages=local.stages, cuts=None, dtype=local.dtype, name=None)
    return plan


async def batch_over_broker(
    prompts: Path, output: Path, settings: BatchSettings, *, retry_errors: bool, stop: asyncio.Event
) -> int:
    """Enqueue to the running fleet and gather the results. The exit code."""
    plan = read_plan(settings)
    tokenizer = Tokenizer.load(checkpoint.resolve_tokenizer(plan.model, plan.revision))
    with contextlib.closing(OutputFile(output, retry_errors=retry_errors)) as file:
        rows = Rows(file, tokenizer.decode_token)
        ticket, resumed = Ticket.beside(output, job=new_id("job"), plan=plan.digest)
        reader = LineReader(prompts, ticket.job, plan, tokenizer, settings)
        batch = BatchJob(reader, rows, ticket, plan, window=settings.window, resumed=resumed)
        await _show(batch, rows, prompts, connecting(settings, "batch"), stop)
    return _verdict(batch, rows, output)


async def _show(batch: BatchJob, rows: Rows, prompts: Path, connect: Connect, stop: asyncio.Event) -> None:
    rows.progress.total = await asyncio.to_thread(count_lines, prompts)
    async with console.job_progress(rows.progress, prompts.name):
        await batch.run(connect, stop)


def _verdict(batch: BatchJob, rows: Rows, output: Path) -> int:
    progress = rows.progress
    told = f"{progress.answered} answered, {progress.failed} failed"
    if not batch.finished:
        console.err.print(f"stopped: {told}, the rest is not done. Run the same command again to go on.")
        return INTERRUPTED
    console.err.print(f"done: {told} -> {output}")
    return SOME_ERRORS if progress.failed else ALL_ANSWERED


async def detach(prompts: Path, settings: BatchSettings, *, stop: asyncio.Event) -> int:
    """Enqueue all, print the job's id. The exit code."""
    plan = read_plan(settings)
    tokenizer = Tokenizer.load(checkpoint.resolve_tokenizer(plan.model, plan.revision))
    job = new_id("job")
    progress = Progress(total=await asyncio.to_thread(count_lines, prompts))
    reader = LineReader(prompts, job, plan, tokenizer, settings)
    async with console.job_progress(progress, "enqueueing"):
        whole = await enqueue_all(reader, plan, job, connecting(settings, "batch"), progress, stop)
    console.out.print(job, highlight=False)
    if not whole:
        console.err.print(f"stopped after {progress.done} lines: the job is those")
    console.err.print(f"{progress.done} lines enqueued; collect with: mqinfer results {job} -o RESULTS.jsonl")
    return ALL_ANSWERED if whole else INTERRUPTED


async def results(job: str, output: Path, settings: BatchSettings, *, wait: bool, stop: asyncio.Event) -> int:
    """Collect a detached job. The exit code."""
    plan = read_plan(settings) if settings.pipeline is not None else None
    token_text = console.token_number
    if plan is not None:
        token_text = Tokenizer.load(checkpoint.resolve_tokenizer(plan.model, plan.revision)).decode_token
    with contextlib.closing(OutputFile(output)) as file:
        rows = Rows(file, token_text)
        async with console.job_progress(rows.progress, job):
            whole = await collect(job, rows, connecting(settings, "results"), stop, wait=wait)
    progress = rows.progress
    told = f"{progress.answered} answered, {progress.failed} failed of {progress.total or '?'}"
    if not whole:
        console.err.print(f"{told}; the rest has not come yet: run the same command again")
        return INTERRUPTED
    console.err.print(f"done: {told} -> {output}")
    return SOME_ERRORS if progress.failed else ALL_ANSWERED


# -- actors --------------------------------------------------------------------------------------


async def worker(settings: WorkerSettings, stage: int, model: str | None, *, stop: asyncio.Event) -> int:
    """Load a stage and serve it. The exit code."""
    try:
        from mqinfer.stage_worker import StageWorker, load_compute
    except ImportError as error:
        raise SettingsError(f"a worker needs mqinfer[worker] ({error})") from error
    plan = read_plan(settings)
    if not 0 <= stage < len(plan.stages):
        raise SettingsError(f"the plan has stages 0 to {len(plan.stages) - 1}, not {stage}")
    folder = checkpoint.resolve(model or plan.model, plan.revision)
    checkpoint.verify(folder, plan)
    compute = await asyncio.to_thread(load_compute, plan, stage, folder, settings, console.err.print)
    await StageWorker(plan, stage, compute, settings, connecting(settings, f"worker {stage}")).run(stop)
    return 0


async def coordinator(settings: CoordinatorSettings, model: str | None, *, stop: asyncio.Event) -> int:
    """Coordinate. The exit code."""
    plan = read_plan(settings)
    tokenizer = Tokenizer.load(checkpoint.resolve_tokenizer(model or plan.model, plan.revision))
    await Coordinator(plan, tokenizer, settings, connecting(settings, "coordinator")).run(stop)
    return 0


# -- operators -----------------------------------------------------------------------------------


async def status(settings: Settings) -> int:
    """Print the table. The exit code."""
    plan = read_plan(settings)
    async with linked(settings, "status") as transport:
        earlier = await survey.take(transport, plan)
        await asyncio.sleep(STATUS_S)
        later = await survey.take(transport, plan)
    console.out.print(console.status_table(plan, earlier, later))
    if complaint := later.complaint():
        console.out.print(complaint)
    return 0


async def queues_declare(settings: Settings) -> int:
    """Make the queues that outlive every process. The exit code."""
    plan = read_plan(settings)
    async with linked(settings, "queues") as transport:
        for spec in Topology(plan.name).shared(len(plan.stages)):
            await transport.declare(spec)
            console.out.print(spec.name, highlight=False)
    return 0


async def queues_contents(settings: Settings) -> dict[str, int]:
    """How many messages wait in each queue that outlives every process."""
    plan = read_plan(settings)
    contents = {}
    async with linked(settings, "queues") as transport:
        for spec in Topology(plan.name).shared(len(plan.stages)):
            state = await transport.inspect(spec.name)
            if state is not None:
                contents[spec.name] = state.ready
    return contents


async def queues_empty(settings: Settings, *, delete: bool) -> int:
    """Purge or delete the queues. The exit code."""
    async with linked(settings, "queues") as transport:
        for name in await queues_contents(settings):
            with contextlib.suppress(Unroutable):  # somebody else was quicker
                lost = await (transport.delete(name) if delete else transport.purge(name))
                console.out.print(f"{name}: {'deleted' if delete else 'purged'}, {lost} messages lost", highlight=False)
    return 0
