"""The command line: reads flags, calls `commands`, turns errors into a sentence and an exit code. Nothing else.

What a command needs is imported when it runs, so that `--help` is there at once, and so that a command without compute
can say so (`hide_torch`) before transformers looks for torch. Commands on queues and dead letters are cli_queues.py,
those that make plans cli_plan.py, those that scale stages cli_scaling.py, those that lend devices cli_workers.py.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from mqinfer import __version__, cli_plan, cli_scaling, cli_workers, flags
from mqinfer.cli_queues import dead_app, queues_app
from mqinfer.errors import MqinferError, SettingsError
from mqinfer.launch import load_settings, operator, run
from mqinfer.running import unless_stopped

app = typer.Typer(
    name="mqinfer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(queues_app, name="queues")
app.add_typer(dead_app, name="dead")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mqinfer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Batch inference of language models too big for any one of your GPUs, over RabbitMQ.

    A model's layers are cut into stages, with one queue for each. To try it in one process, without RabbitMQ:

    \b
      mqinfer batch prompts.jsonl -o results.jsonl --model PATH_OR_ID --stages 3
    """


cli_plan.add_to(app)


@app.command()
def batch(
    prompts: flags.Prompts,
    output: flags.ResultsOrNone = None,
    broker: flags.Broker = None,
    pipeline: flags.Pipeline = None,
    model: flags.BatchModel = None,
    stages: flags.BatchStages = None,
    dtype: flags.BatchDtype = None,
    device: flags.Device = None,
    kv_bytes: flags.KvBytes = None,
    threads: flags.Threads = None,
    detach: flags.Detach = False,
    retry_errors: flags.RetryErrors = False,
    window: flags.Window = None,
    max_tokens: flags.MaxTokens = None,
    temperature: flags.Temperature = None,
    config: flags.Config = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
) -> None:
    """Answer a file of prompts, here or by a fleet.

    Without --broker the model runs in this process. With it, a running fleet does the work; also where MQINFER_BROKER
    or the settings file names a broker, unless --model is given.

    Run it again with the same output file and only what has no row yet is done. Exit codes:

    \b
      0    every line has a result
      2    it could not be begun, or the output can't be written: when it can, run it again
      3    some rows are errors
      130  stopped by Ctrl-C

    Examples:

    \b
      mqinfer batch prompts.jsonl -o results.jsonl --model ./SmolLM2-135M-Instruct --stages 3
      mqinfer batch prompts.jsonl -o results.jsonl -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    from mqinfer import commands
    from mqinfer.settings import BatchSettings, WorkerSettings, load

    given = {"broker": broker, "pipeline": pipeline, "window": window, "max_tokens": max_tokens}
    settings = load_settings(
        BatchSettings, config, **given, temperature=temperature, log_level=log_level, log_json=log_json
    )
    here = not detach and broker is None and (model is not None or "broker" not in settings.model_fields_set)
    worker = load(WorkerSettings, file=config, device=device, kv_bytes=kv_bytes, threads=threads, codec="raw")
    if not here and (stages, dtype, device, kv_bytes, threads) != (None,) * 5:
        raise SettingsError(
            "--stages, --dtype, --device, --kv-bytes and --threads are for running here, not for a fleet"
        )
    if not prompts.is_file():
        raise SettingsError(f"there is no file {prompts}")
    if (output is None) != detach:
        raise SettingsError("say where the results go: either -o FILE or --detach")
    if output is None:
        run(lambda stop: commands.detach(prompts, settings, model, stop=stop))
    elif here:
        local = commands.Local(settings.pipeline if model is None else pipeline, model, stages, dtype)
        job = partial(commands.batch_here, prompts, output, settings, worker, local, retry_errors=retry_errors)
        run(lambda stop: job(stop=stop), with_torch=True)
    else:
        job = partial(commands.batch_over_broker, prompts, output, settings, model, retry_errors=retry_errors)
        run(lambda stop: job(stop=stop))


@app.command()
def results(
    job: flags.Job,
    output: flags.Results,
    broker: flags.Broker = None,
    pipeline: flags.ResultsPlan = None,
    wait: flags.Wait = True,
    config: flags.Config = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
) -> None:
    """Collect the results of a detached job, from any machine.

    Exit codes are those of batch, and 4: with --no-wait, where the rest has not come yet. Example:

    \b
      mqinfer results job-3f9a0c1d2e -o results.jsonl --broker amqp://guest:guest@localhost/
    """
    from mqinfer import commands
    from mqinfer.settings import BatchSettings

    given = {"broker": broker, "pipeline": pipeline, "log_level": log_level, "log_json": log_json}
    settings = load_settings(BatchSettings, config, **given)
    run(lambda stop: commands.results(job, output, settings, wait=wait, stop=stop))


@app.command()
def worker(
    stage: flags.Stage,
    pipeline: flags.Pipeline = None,
    broker: flags.Broker = None,
    device: flags.Device = None,
    kv_bytes: flags.KvBytes = None,
    threads: flags.Threads = None,
    codec: flags.Codec = None,
    instance: flags.Instance = None,
    rebalance: flags.Rebalance = None,
    hours: flags.Hours = None,
    yield_gpu: flags.YieldGpu = None,
    model: flags.LocalModel = None,
    metrics_port: flags.MetricsPort = None,
    metrics_address: flags.MetricsAddress = None,
    config: flags.Config = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
) -> None:
    """Serve one stage: load its layers, join its queue, work.

    Start as many as you like on a stage; nobody has to be told. SIGTERM or Ctrl-C drains: it takes nothing new,
    finishes or gives back what it has, and exits with 0. Example:

    \b
      mqinfer worker -p pipeline.toml --stage 1 --device cuda:0 --broker amqp://guest:guest@localhost/
      mqinfer worker -p pipeline.toml --stage auto --rebalance --device cuda:0
    """
    from mqinfer import worker_command
    from mqinfer.settings import WorkerSettings

    given = {"pipeline": pipeline, "broker": broker, "device": device, "kv_bytes": kv_bytes, "threads": threads}
    given |= {"metrics_port": metrics_port, "metrics_address": metrics_address, "codec": codec, "instance": instance}
    given |= {"hours": hours, "yield_gpu": yield_gpu, "rebalance": rebalance}
    settings = load_settings(WorkerSettings, config, **given, log_level=log_level, log_json=log_json)
    number = _stage(stage)
    run(lambda stop: worker_command.worker(settings, number, model, stop=stop), with_torch=True, stopped=0)


def _stage(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise SettingsError(f"--stage {text}: a number from 0, or auto")
    return int(text)


@app.command()
def coordinator(
    pipeline: flags.Pipeline = None,
    broker: flags.Broker = None,
    rows: flags.Rows = None,
    model: flags.LocalModel = None,
    metrics_port: flags.MetricsPort = None,
    metrics_address: flags.MetricsAddress = None,
    config: flags.Config = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
) -> None:
    """Send requests around the stages and publish results.

    Needs no GPU and no torch. Start one or several. SIGTERM or Ctrl-C gives its requests back. Example:

    \b
      mqinfer coordinator -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    from mqinfer import commands
    from mqinfer.settings import CoordinatorSettings

    given = {"pipeline": pipeline, "broker": broker, "rows": rows, "log_level": log_level, "log_json": log_json}
    given |= {"metrics_port": metrics_port, "metrics_address": metrics_address}
    settings = load_settings(CoordinatorSettings, config, **given)
    run(lambda stop: commands.coordinator(settings, model, stop=stop), stopped=0)


@app.command()
def status(
    pipeline: flags.Pipeline = None,
    workers: flags.Workers = False,
    as_json: flags.Json = False,
    broker: flags.Broker = None,
    config: flags.Config = None,
) -> None:
    """Show each stage's queue, workers and rates.

    And which stage the others wait for: start another worker there. Examples:

    \b
      mqinfer status -p pipeline.toml --broker amqp://guest:guest@localhost/
      mqinfer status --workers -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    from mqinfer import operate

    settings = operator(config, pipeline, broker)
    run(lambda stop: unless_stopped(stop, operate.status(settings, workers=workers, as_json=as_json)))


@app.command()
def top(
    pipeline: flags.Pipeline = None,
    interval: flags.Interval = 2.0,
    broker: flags.Broker = None,
    config: flags.Config = None,
) -> None:
    """Watch a pipeline live: its stages, their workers, the hot one.

    The stage that the others wait for is marked. q or Ctrl-C leaves. Where standard output is no terminal, it is
    written once in every interval. While the broker is away it says so and goes on when it is back. Example:

    \b
      mqinfer top -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    from mqinfer import top as live
    from mqinfer.settings import Settings

    settings = load_settings(Settings, config, pipeline=pipeline, broker=broker, log_level="error")
    run(lambda stop: live.watch(settings, interval, stop=stop), stopped=0)


cli_scaling.add_to(app)
cli_workers.add_to(app)


def main() -> None:
    """The entry point: errors become one sentence on standard error and exit code 2 (1 for a defect of ours)."""
    try:
        app()
    except Exception as error:
        from mqinfer.link import first
        from mqinfer.observe import ACTOR_FAILED, emit

        cause = first(error) if isinstance(error, ExceptionGroup) else error
        if not isinstance(cause, MqinferError | OSError):
            emit(ACTOR_FAILED, actor=" ".join(sys.argv[1:2]), error=repr(cause))
            raise
        typer.secho(f"mqinfer: {cause}", fg=typer.colors.RED, err=True)
        sys.exit(2)
