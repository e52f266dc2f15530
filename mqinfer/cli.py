"""The command line: reads flags, calls `commands`, turns errors into a sentence and an exit code. Nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from mqinfer import __version__, commands, console
from mqinfer.errors import MqinferError
from mqinfer.link import first
from mqinfer.observe import ACTOR_FAILED, emit, log_to_stderr
from mqinfer.settings import BatchSettings, CoordinatorSettings, S, Settings, WorkerSettings, load

app = typer.Typer(
    name="mqinfer",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
queues_app = typer.Typer(no_args_is_help=True, help="Declare, purge or delete the queues of a pipeline.")
app.add_typer(queues_app, name="queues")

Broker = Annotated[
    str | None,
    typer.Option(help="amqp://user:password@host:port/vhost, or MQINFER_BROKER.", show_default="the local broker"),
]
Pipeline = Annotated[
    Path | None, typer.Option("--pipeline", "-p", help="The plan's file (`mqinfer plan`), or MQINFER_PIPELINE.")
]
Config = Annotated[
    Path | None, typer.Option(envvar="MQINFER_CONFIG", help="A TOML file of settings; flags and environment go first.")
]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error, or MQINFER_LOG_LEVEL.")]
LogJson = Annotated[bool | None, typer.Option("--log-json", help="Log lines as JSON objects.")]
LocalModel = Annotated[
    str | None, typer.Option("--model", help="Where the checkpoint is on this machine, if not where the plan says.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:0 …, or MQINFER_DEVICE.", show_default="cpu")]
KvBytes = Annotated[
    str | None,
    typer.Option(
        help="The most that keys and values may take, such as 4GiB, or MQINFER_KV_BYTES.", show_default="1GiB"
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads of the compute, or MQINFER_THREADS.", show_default="one for each core")
]
Codec = Annotated[
    str | None,
    typer.Option(help="raw, lossless, int8 or int8+zstd: how hidden states travel on.", show_default="lossless"),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Results, one line per custom_id.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mqinfer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch inference of language models too big for any one of your GPUs, over RabbitMQ.

    A model's layers are cut into stages, with one queue for each. To try it in one process:

        mqinfer batch prompts.jsonl -o results.jsonl --model PATH_OR_ID --stages 3
    """


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A Hugging Face checkpoint: a local folder or a hub id.")],
    stages: Annotated[int | None, typer.Option(help="How many stages of equal cost.")] = None,
    cut: Annotated[str | None, typer.Option(help="Cut before these layers instead, such as 10,20.")] = None,
    dtype: Dtype = "float32",
    name: Annotated[str | None, typer.Option(help="The pipeline's name, part of its queues' names.")] = None,
    revision: Annotated[str, typer.Option(help="The hub repository's branch, tag or commit.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here.")] = None,
) -> None:
    """Cut a model into stages of equal cost, without loading its weights.

    Example:

        mqinfer plan Qwen/Qwen3-32B --stages 4 --dtype bfloat16 -o pipeline.toml
    """
    commands.make_plan(model, stages=stages, cut=cut, dtype=dtype, name=name, revision=revision, output=output)


@app.command()
def batch(
    prompts: Annotated[Path, typer.Argument(help="JSON lines: OpenAI's batch format, or {custom_id, prompt, …}.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Results, one line per custom_id.")] = None,
    broker: Broker = None,
    pipeline: Pipeline = None,
    model: Annotated[str | None, typer.Option(help="Without a broker: a local folder or a hub id.")] = None,
    stages: Annotated[int, typer.Option(help="Without a broker: how many stages.")] = 1,
    dtype: Dtype = "float32",
    device: Device = None,
    kv_bytes: KvBytes = None,
    threads: Threads = None,
    detach: Annotated[bool, typer.Option("--detach", help="Enqueue, print the job's id and leave.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again where the row is an error.")] = False,
    window: Annotated[int | None, typer.Option(help="Requests under way at most.", show_default="2048")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="For lines that don't say.", show_default="256")] = None,
    temperature: Annotated[float | None, typer.Option(help="For lines that don't say.", show_default="0")] = None,
    config: Config = None,
    log_level: LogLevel = None,
    log_json: LogJson = None,
) -> None:
    """Answer a file of prompts: in this process, or with --broker by a running fleet.

    Run it again with the same output file and only what has no row yet is done. Exit code 0: every line has
    a result; 3: some rows are errors; 130: stopped by Ctrl-C. Examples:

        mqinfer batch prompts.jsonl -o results.jsonl --model ./SmolLM2-135M-Instruct --stages 3

        mqinfer batch prompts.jsonl -o results.jsonl -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    logs = {"log_level": log_level or os.environ.get("MQINFER_LOG_LEVEL", "warning"), "log_json": log_json}
    flags = {"broker": broker, "pipeline": pipeline, "window": window, "max_tokens": max_tokens}
    settings = _load(BatchSettings, config, **flags, **logs, temperature=temperature)
    if not prompts.is_file():
        raise MqinferError(f"there is no file {prompts}")
    if detach:
        _run(lambda stop: commands.detach(prompts, settings, stop=stop))
    if output is None:
        raise MqinferError("say where the results go, with -o FILE (or --detach)")
    if broker is not None or (model is None and "broker" in settings.model_fields_set):
        _run(lambda stop: commands.batch_over_broker(prompts, output, settings, retry_errors=retry_errors, stop=stop))
    local = commands.LocalPipeline(model, stages, dtype)
    worker = load(WorkerSettings, file=config, device=device, kv_bytes=kv_bytes, threads=threads, codec="raw")
    _run(
        lambda stop: commands.batch_here(prompts, output, settings, worker, local, retry_errors=retry_errors, stop=stop)
    )


@app.command()
def results(
    job: Annotated[str, typer.Argument(help="The id that `mqinfer batch --detach` printed.")],
    output: Output,
    broker: Broker = None,
    pipeline: Annotated[
        Path | None, typer.Option("--pipeline", "-p", help="For the texts of logprobs: the plan's file.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the rest, or take only what is there.")] = True,
    config: Config = None,
    log_level: LogLevel = "warning",
) -> None:
    """Collect the results of a detached job, from any machine.

    Example:

        mqinfer results job-3f9a0c1d2e -o results.jsonl --broker amqp://guest:guest@localhost/
    """
    settings = _load(BatchSettings, config, broker=broker, pipeline=pipeline, log_level=log_level)
    _run(lambda stop: commands.results(job, output, settings, wait=wait, stop=stop))


@app.command()
def worker(
    stage: Annotated[int, typer.Option(help="Which stage of the plan, from 0.")],
    pipeline: Pipeline = None,
    broker: Broker = None,
    device: Device = None,
    kv_bytes: KvBytes = None,
    threads: Threads = None,
    codec: Codec = None,
    model: LocalModel = None,
    config: Config = None,
    log_level: LogLevel = None,
    log_json: LogJson = None,
) -> None:
    """Serve one stage: load its layers, join its queue, work. SIGTERM drains.

    Start as many as you like on a stage; nobody has to be told. Example:

        mqinfer worker -p pipeline.toml --stage 1 --broker amqp://guest:guest@localhost/ --device cuda:0
    """
    flags = {"pipeline": pipeline, "broker": broker, "device": device, "kv_bytes": kv_bytes, "threads": threads}
    settings = _load(WorkerSettings, config, **flags, codec=codec, log_level=log_level, log_json=log_json)
    _run(lambda stop: commands.worker(settings, stage, model, stop=stop))


@app.command()
def coordinator(
    pipeline: Pipeline = None,
    broker: Broker = None,
    rows: Annotated[int | None, typer.Option(help="Requests computed at the same time.", show_default="128")] = None,
    model: LocalModel = None,
    config: Config = None,
    log_level: LogLevel = None,
    log_json: LogJson = None,
) -> None:
    """Lease requests, send them around the stages, publish results. Needs no GPU; start one or several.

    Example:

        mqinfer coordinator -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    flags = {"pipeline": pipeline, "broker": broker, "rows": rows, "log_level": log_level, "log_json": log_json}
    settings = _load(CoordinatorSettings, config, **flags)
    _run(lambda stop: commands.coordinator(settings, model, stop=stop))


@app.command()
def status(pipeline: Pipeline = None, broker: Broker = None, config: Config = None) -> None:
    """Show each stage's queue, consumers and rates, and where the pipeline is bound.

    Example:

        mqinfer status -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    settings = _load(Settings, config, pipeline=pipeline, broker=broker)
    _run(lambda stop: commands.status(settings))


@queues_app.command("declare")
def queues_declare(pipeline: Pipeline = None, broker: Broker = None, config: Config = None) -> None:
    """Make the queues of a pipeline. Actors do it too; this is for checking what the broker allows.

    Example:

        mqinfer queues declare -p pipeline.toml
    """
    settings = _load(Settings, config, pipeline=pipeline, broker=broker)
    _run(lambda stop: commands.queues_declare(settings))


@queues_app.command("purge")
def queues_purge(pipeline: Pipeline = None, broker: Broker = None, config: Config = None, yes: Yes = False) -> None:
    """Throw away every waiting request and dead letter of a pipeline. Results of jobs stay.

    Example:

        mqinfer queues purge -p pipeline.toml
    """
    _empty(_load(Settings, config, pipeline=pipeline, broker=broker), delete=False, yes=yes)


@queues_app.command("delete")
def queues_delete(pipeline: Pipeline = None, broker: Broker = None, config: Config = None, yes: Yes = False) -> None:
    """Delete the queues of a pipeline with all that waits in them. Results of jobs stay.

    Example:

        mqinfer queues delete -p pipeline.toml
    """
    _empty(_load(Settings, config, pipeline=pipeline, broker=broker), delete=True, yes=yes)


def _empty(settings: Settings, *, delete: bool, yes: bool) -> None:
    contents = asyncio.run(commands.queues_contents(settings))
    if lost := {name: count for name, count in contents.items() if count}:
        for name, count in lost.items():
            console.err.print(f"{name}: {count} messages", highlight=False)
        if not yes:
            typer.confirm("Lose them?", abort=True)
    _run(lambda stop: commands.queues_empty(settings, delete=delete))


def _load(kind: type[S], config: Path | None, **flags: Any) -> S:
    settings = load(kind, file=config, **flags)
    log_to_stderr(level=settings.log_level, as_json=settings.log_json)
    return settings


def _run(command: Callable[[asyncio.Event], Coroutine[Any, Any, int]]) -> None:
    """Run to the end and exit with what it returns. SIGTERM or Ctrl-C asks it to stop; a second one leaves at once."""

    async def run() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def asked(number: int) -> None:
            if stop.is_set():
                os._exit(128 + number)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked, number)
        return await command(stop)

    with asyncio.Runner(loop_factory=_new_loop) as runner:
        raise typer.Exit(runner.run(run()))


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


def main() -> None:
    """The entry point: errors become one sentence on standard error and exit code 2 (1 for a defect of ours)."""
    try:
        app()
    except* (MqinferError, OSError) as group:
        console.err.print(f"mqinfer: {first(group)}", style="red", highlight=False, markup=False)
        sys.exit(2)
    except* Exception as group:
        emit(ACTOR_FAILED, actor=" ".join(sys.argv[1:2]), error=repr(first(group)))
        raise
