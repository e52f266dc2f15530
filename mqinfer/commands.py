"""What each command does: settings and files in, actors run, a sentence or a table out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mqinfer import checkpoint, console, systemd
from mqinfer import plan as plans
from mqinfer.actuators import Actuator, Commands, Systemd
from mqinfer.autoscaler import Autoscaler
from mqinfer.batch_files import LineReader
from mqinfer.batch_job import BatchJob, collect, enqueue_all
from mqinfer.batch_output import OutputFile, Ticket
from mqinfer.batch_rows import Progress, Rows
from mqinfer.coordinator import Coordinator
from mqinfer.coordinator_counts import Trace, untraced
from mqinfer.errors import SettingsError
from mqinfer.link import Connect
from mqinfer.observe import size
from mqinfer.plan import Plan
from mqinfer.queues import new_id
from mqinfer.reports import actor_facts
from mqinfer.running import INTERRUPTED, unless_stopped
from mqinfer.settings import (
    AutoscalerSettings,
    BatchSettings,
    CoordinatorSettings,
    Settings,
    WorkerSettings,
    otlp_variable,
)
from mqinfer.tokenizer import Tokenizer
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

#: Tells the metrics what their actor would report, and its facts.
Attach = Callable[[Callable[[], Mapping[str, float]], Mapping[str, str]], None]
#: Exit codes; also running.INTERRUPTED.
ALL_ANSWERED, SOME_ERRORS, MORE_TO_COME = 0, 3, 4


@dataclass(frozen=True, slots=True)
class Local:
    """A pipeline to run in this process: of a plan's file, or of a model and how to cut it."""

    plan: Path | None
    #: Beside a plan: where its checkpoint is, if not where the plan says.
    model: str | None
    stages: int | None
    dtype: str | None


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


async def batch_here(
    prompts: Path,
    output: Path,
    settings: BatchSettings,
    worker: WorkerSettings,
    local: Local,
    *,
    retry_errors: bool,
    stop: asyncio.Event,
) -> int:
    """The embedded default: coordinator and all stages in this process. The exit code."""
    try:
        from mqinfer import embedded
    except ImportError as error:
        raise SettingsError(f"running the model here needs mqinfer[worker] ({error})") from error
    plan, folder, tokenizer = await unless_stopped(stop, asyncio.to_thread(_ready, worker, local))
    with contextlib.closing(OutputFile(output, retry_errors=retry_errors)) as file:
        rows = Rows(file, tokenizer.decode_token)
        job = new_id("batch")
        reader = LineReader(prompts, job, plan, tokenizer, settings)
        batch = BatchJob(reader, rows, Ticket(None, job, plan.digest), plan, window=settings.window)
        loaded = asyncio.Event()

        async def run() -> None:
            with console.stages_told():
                async with embedded.pipeline(plan, folder, tokenizer, worker) as connect:
                    loaded.set()
                    await _show(batch, rows, reader, connect, stop)

        await unless_stopped(stop, run(), loaded)
    return _verdict(batch, rows, output)


def _ready(worker: WorkerSettings, local: Local) -> tuple[Plan, Path, Tokenizer]:
    """All that can be found wrong before weights are read."""
    plan = _local_plan(local)
    folder = checkpoint.resolve(local.model or plan.model, plan.revision)
    if local.plan is not None:
        checkpoint.verify(folder, plan)
    check_room(plan, range(len(plan.stages)), folder, worker)
    return plan, folder, Tokenizer.load(folder)


def _local_plan(local: Local) -> Plan:
    if local.plan is not None:
        if local.stages is not None or local.dtype is not None:
            raise SettingsError("the plan's file says the stages and the dtype: leave out --stages and --dtype")
        return plans.read(local.plan)
    if local.model is None:
        raise SettingsError("say which model: --model PATH_OR_ID, or --pipeline FILE (or --broker for a fleet)")
    dtype, stages = local.dtype or "float32", 1 if local.stages is None else local.stages
    return checkpoint.make_plan(local.model, stages=stages, dtype=dtype)[0]


def check_room(plan: Plan, stages: Sequence[int], folder: Path, settings: WorkerSettings) -> None:
    """Raises: SettingsError where the device is not there, or these stages can't have the memory that they need."""
    from mqinfer import device
    from mqinfer.kv_cache import ROUND_TOKENS
    from mqinfer.packed_linear import room_bytes

    device.check(settings.device)
    facts = checkpoint.facts(str(folder))
    costs = [checkpoint.stage_table(plan, facts)[stage] for stage in stages]
    row_bytes = sum(cost.kv_bytes_per_token for cost in costs) * ROUND_TOKENS
    if settings.kv_bytes < row_bytes:
        raise SettingsError(
            f"--kv-bytes {size(settings.kv_bytes)} does not hold one row: already the keys and values of "
            f"{ROUND_TOKENS} positions take {size(row_bytes)}"
        )
    weight_bytes = sum(cost.weight_bytes for cost in costs)
    if settings.device == "cpu":
        head = facts.anatomy.head if len(plan.stages) - 1 in stages else 0
        weight_bytes = room_bytes(weight_bytes, itemsize=plan.itemsize, hidden_size=plan.hidden_size, head=head)
    device.check_room(settings.device, weight_bytes, settings.kv_bytes)


async def batch_over_broker(
    prompts: Path, output: Path, settings: BatchSettings, model: str | None, *, retry_errors: bool, stop: asyncio.Event
) -> int:
    """Enqueue to the running fleet and gather the results. The exit code."""
    plan = read_plan(settings)
    tokenizer = await unless_stopped(stop, asyncio.to_thread(_tokenizer, plan, model))
    with contextlib.closing(OutputFile(output, retry_errors=retry_errors)) as file:
        rows = Rows(file, tokenizer.decode_token)
        ticket, abandoned = Ticket.beside(output, prompts, job=new_id("job"), plan=plan.digest)
        if retry_errors:
            ticket.enqueued = 0  # what failed is in nobody's hands
        reader = LineReader(prompts, ticket.job, plan, tokenizer, settings)
        batch = BatchJob(reader, rows, ticket, plan, window=settings.window, abandoned=abandoned)
        await _show(batch, rows, reader, connecting(settings, "batch"), stop)
    return _verdict(batch, rows, output)


def _tokenizer(plan: Plan, model: str | None) -> Tokenizer:
    return Tokenizer.load(checkpoint.resolve_tokenizer(model or plan.model, plan.revision))


async def _show(batch: BatchJob, rows: Rows, reader: LineReader, connect: Connect, stop: asyncio.Event) -> None:
    rows.progress.total = await asyncio.to_thread(reader.count)
    async with console.job_progress(rows.progress, reader.path.name):
        await batch.run(connect, stop)


def _verdict(batch: BatchJob, rows: Rows, output: Path) -> int:
    progress = rows.progress
    told = f"{progress.answered} answered, {progress.failed} failed"
    if not batch.finished:
        left, aim = (
            ("but the job's queue is left on the broker", "remove it")
            if batch.answered
            else ("the rest is not done", "go on")
        )
        console.say(f"stopped: {told}, {left}. Run the same command again to {aim}.")
        return INTERRUPTED
    console.say(f"done: {told} -> {output}")
    return SOME_ERRORS if progress.failed else ALL_ANSWERED


async def detach(prompts: Path, settings: BatchSettings, model: str | None, *, stop: asyncio.Event) -> int:
    """Print the job's id, enqueue all. The exit code."""
    plan = read_plan(settings)
    tokenizer = await unless_stopped(stop, asyncio.to_thread(_tokenizer, plan, model))
    job = new_id("job")
    reader = LineReader(prompts, job, plan, tokenizer, settings)
    progress = Progress(total=await asyncio.to_thread(reader.count))
    connect = connecting(settings, "batch")
    console.out.print(job)  # first: whatever happens, what is enqueued can be collected
    async with console.job_progress(progress, "enqueueing"):
        whole = await enqueue_all(reader, plan, job, lambda: unless_stopped(stop, connect()), progress, stop)
    if not whole:
        console.say(f"stopped after {progress.done} lines: the job is those")
    console.say(f"{progress.done} lines enqueued; collect with: mqinfer results {job} -o RESULTS.jsonl")
    return ALL_ANSWERED if whole else INTERRUPTED


async def results(job: str, output: Path, settings: BatchSettings, *, wait: bool, stop: asyncio.Event) -> int:
    """Collect a detached job. The exit code."""
    token_text = console.token_number
    if settings.pipeline is not None:
        tokenizer = await unless_stopped(stop, asyncio.to_thread(_tokenizer, read_plan(settings), None))
        token_text = tokenizer.decode_token
    with contextlib.closing(OutputFile(output, job=job)) as file:
        rows = Rows(file, token_text)
        async with console.job_progress(rows.progress, job):
            whole = await collect(job, rows, connecting(settings, "results"), stop, wait=wait)
    progress = rows.progress
    told = f"{progress.answered} answered, {progress.failed} failed of {progress.total or '?'}"
    if not whole:
        console.say(f"{told}; the rest has not come yet: run the same command again")
        return INTERRUPTED if stop.is_set() else MORE_TO_COME
    console.say(f"done: {told} -> {output}")
    return SOME_ERRORS if progress.failed else ALL_ANSWERED


async def coordinator(settings: CoordinatorSettings, model: str | None, *, stop: asyncio.Event) -> int:
    """Coordinate. The exit code."""
    plan = read_plan(settings)
    tokenizer = await unless_stopped(stop, asyncio.to_thread(_tokenizer, plan, model))
    with measured(settings, plan) as attach, traced("coordinator", plan) as trace:
        coordinating = Coordinator(plan, tokenizer, settings, connecting(settings, "coordinator"), trace)
        attach(lambda: coordinating.values(), actor_facts(plan))
        async with systemd.kept_informed(systemd.loop_turns, stop):
            await coordinating.run(stop)
    return 0


@contextlib.contextmanager
def measured(settings: Settings, plan: Plan, stage: int | None = None) -> Iterator[Attach]:
    """Metrics of a worker of `stage`, or of a coordinator, are served while the body runs, where a port is set."""
    if not settings.metrics_port:
        yield lambda values, facts: None
        return
    try:
        from mqinfer import metrics
    except ImportError as error:
        raise SettingsError(f"--metrics-port needs mqinfer[metrics] ({error})") from error
    made = metrics.CoordinatorMetrics(plan.name) if stage is None else metrics.WorkerMetrics(plan.name, stage)
    with metrics.served(made, settings.metrics_address, settings.metrics_port):
        yield made.attach


@contextlib.contextmanager
def traced(role: str, plan: Plan) -> Iterator[Trace]:
    """Spans are sent while the body runs, where OpenTelemetry's own variables say where to."""
    variable = otlp_variable()
    if not variable:
        yield untraced
        return
    try:
        from mqinfer import tracing
    except ImportError as error:
        raise SettingsError(f"{variable} is set, and traces need mqinfer[otel] ({error})") from error
    with tracing.exported(role, plan.name) as traces:
        yield traces.trace


async def autoscale(settings: AutoscalerSettings, *, stop: asyncio.Event) -> int:
    """Scale stages. The exit code."""
    scaling = Autoscaler(read_plan(settings), settings, connecting(settings, "autoscaler"), _actuator(settings))
    async with systemd.kept_informed(systemd.loop_turns, stop):
        await scaling.run(stop)
    return 0


def _actuator(settings: AutoscalerSettings) -> Actuator | None:
    """How it acts; None: not at all. Raises: SettingsError."""
    if settings.systemd + bool(settings.up or settings.down) + settings.dry_run == 0:
        raise SettingsError("say how to start and stop workers: --systemd, or --up and --down; or --dry-run")
    if settings.systemd and (settings.up or settings.down):
        raise SettingsError("either --systemd, or --up and --down")
    if bool(settings.up) != bool(settings.down):
        raise SettingsError("--up and --down go together: what is started must be stopped some day")
    timeout_s = settings.command_timeout_s
    acting: Actuator | None = None
    if settings.up:
        acting = Commands(settings.up, settings.down, hosts=settings.hosts, timeout_s=timeout_s)
    elif settings.systemd:
        acting = Systemd(timeout_s=timeout_s)
    return None if settings.dry_run else acting
