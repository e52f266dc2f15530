"""The flags of the command line, and how they read in `--help`. No default lives here: settings.py has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# What all commands share

Broker = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="amqp://user:password@host:port/vhost, or @FILE that holds it, or MQINFER_BROKER. Default: the local "
        "one, as guest.",
    ),
]
Pipeline = Annotated[
    Path | None,
    typer.Option("--pipeline", "-p", metavar="FILE", help="The plan (mqinfer plan), or MQINFER_PIPELINE."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="MQINFER_CONFIG",
        show_envvar=False,
        help="Settings in TOML, after flags and MQINFER_*; or MQINFER_CONFIG.",
    ),
]
LogLevel = Annotated[
    str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error, or MQINFER_LOG_LEVEL.")
]
LogJson = Annotated[bool | None, typer.Option("--log-json", help="Log lines as JSON objects, or MQINFER_LOG_JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

# Looking at a pipeline

Workers = Annotated[bool, typer.Option("--workers", help="Each stage's workers under it.")]
Json = Annotated[bool, typer.Option("--json", help="All that is known, as JSON on standard output.")]
Interval = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.1, show_default=False, help="How often it is looked. Default: 2.")
]
Vhost = Annotated[str, typer.Option(metavar="NAME", show_default=False, help="The broker's vhost. Default: /.")]

# Dead letters

Number = Annotated[int, typer.Argument(metavar="N", min=1, help="A number of `mqinfer dead list`, as it is now.")]
NumberOrNone = Annotated[
    int | None, typer.Argument(metavar="[N]", min=1, help="A number of `mqinfer dead list`, as it is now.")
]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
Limit = Annotated[
    int, typer.Option(metavar="N", min=1, show_default=False, help="Look at so many, the oldest. Default: 100.")
]
PipelineName = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="The pipeline's name, where its plan is not at hand."),
]

# Plans

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face checkpoint: a local folder or a hub id.")]
Stages = Annotated[int | None, typer.Option(metavar="N", help="How many stages of equal cost.")]
Cut = Annotated[str | None, typer.Option(metavar="A,B,…", help="Cut before these layers instead.")]
Dtype = Annotated[
    str, typer.Option(metavar="NAME", show_default=False, help="float32 (the default), bfloat16 or float16.")
]
Name = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The pipeline's name, part of its queues' names. Default: the model's."),
]
Revision = Annotated[
    str, typer.Option(metavar="NAME", show_default=False, help="The hub repository's branch, tag or commit.")
]
PlanFile = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan here, in TOML.")]

# Fleets and profiles

Fleet = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Plan for the machines of this file: cuts, and which of them serve which stage."),
]
Profile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="With --stages: weigh head and layers as measured here (mqinfer profile)."),
]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="With --fleet: positions of a row. Default: 2048, or what the model was made for."
    ),
]
PromptTokens = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="With --fleet: the prompt's part of them. Default: half.")
]
Concurrency = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="With --fleet: rows in flight, the coordinator's --rows. Default: 128."),
]
Commands = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="With --fleet and -o: write the commands that start it here. Default: print them."
    ),
]
ProfiledModel = Annotated[
    str, typer.Option("--model", metavar="PATH_OR_ID", help="The checkpoint: a folder or a hub id.")
]
ProfileFile = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Write the profile here, in TOML.")]
ProfileBroker = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Measure the link to this broker too, as the operator; @FILE: what that file holds. Default: leave it "
        "out, even where MQINFER_BROKER is set, for a worker's user may not make the queue it takes.",
    ),
]
ProfileContext = Annotated[
    int | None,
    typer.Option("--context", metavar="N", min=1, help="Rows decode at this position. Default: 512."),
]
ProfileLayers = Annotated[
    int | None,
    typer.Option(
        "--layers", metavar="N", min=2, help="Layers measured at once, two at least. Default: 256 MiB of weights."
    ),
]

# Actors

Stage = Annotated[
    str,
    typer.Option(
        metavar="K|auto",
        help="Which stage of the plan, from 0; auto: where it helps most of those that fit in its memory.",
    ),
]
Rebalance = Annotated[
    bool | None,
    typer.Option(
        "--rebalance",
        help="With --stage auto: move, after draining, when another stage stays slower by a quarter and more. Or "
        "MQINFER_REBALANCE.",
    ),
]
LocalModel = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="PATH", help="The checkpoint's folder on this machine, if not where the plan says."
    ),
]
Instance = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="What an autoscaler shall call it, such as 2-auto1, or MQINFER_INSTANCE. Default: none."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 … as nvidia-smi counts, or MQINFER_DEVICE. Default: cpu."),
]
KvBytes = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="The most that keys and values may take, or MQINFER_KV_BYTES. Default: 1GiB."),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", help="CPU threads of the compute, or MQINFER_THREADS. Default: one for each core."),
]
Hours = Annotated[
    str | None,
    typer.Option(
        metavar="FROM-TO",
        help="When it works, in local time, such as 20:00-07:00; several with commas; otherwise it is paused and its "
        "device is free. Or MQINFER_HOURS. Default: always.",
    ),
]
YieldGpu = Annotated[
    bool | None,
    typer.Option(
        "--yield-gpu",
        help="Leave the GPU while a process that is no worker of mqinfer computes there, and return half a minute "
        "after it has gone. NVIDIA only; needs mqinfer[nvidia]. Or MQINFER_YIELD_GPU.",
    ),
]
Target = Annotated[str, typer.Argument(metavar="WORKER|STAGE|HOST|all", help="Which workers, as status names them.")]
Codec = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How hidden states travel on: raw, lossless, auto (whichever of these two is faster over the worker's "
        "link), int8 or int8+zstd (smaller, not exact), or MQINFER_CODEC. Default: auto.",
    ),
]
Rows = Annotated[
    int | None, typer.Option(metavar="N", help="Requests computed at the same time, or MQINFER_ROWS. Default: 128.")
]

MetricsPort = Annotated[
    int | None,
    typer.Option(metavar="PORT", help="Serve Prometheus metrics, or MQINFER_METRICS_PORT. Default: 0, not at all."),
]
MetricsAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Where to listen for that, or MQINFER_METRICS_ADDRESS. Default: 127.0.0.1; 0.0.0.0 is everywhere.",
    ),
]
# Scaling

AdviceWindow = Annotated[
    str | None,
    typer.Option("--window", metavar="TIME", help="Look for so long, or MQINFER_WINDOW_S. Default: 10s."),
]
StageLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--limits", metavar="K=A:B", help="Stage K may have A to B workers; for each stage once, or MQINFER_LIMITS."
    ),
]
Min = Annotated[
    int | None,
    typer.Option("--min", metavar="N", help="Workers of each stage at least, or MQINFER_MIN_CONSUMERS. Default: 1."),
]
Max = Annotated[
    int | None,
    typer.Option("--max", metavar="N", help="Workers of each stage at most, or MQINFER_MAX_CONSUMERS. Default: 4."),
]
Cooldown = Annotated[
    str | None,
    typer.Option(
        "--cooldown", metavar="TIME", help="Leave a stage alone for so long, or MQINFER_COOLDOWN_S. Default: 60s."
    ),
]
BySystemd = Annotated[
    bool | None, typer.Option("--systemd", help="By systemctl, mqinfer-worker@STAGE-N here, or MQINFER_SYSTEMD.")
]
Up = Annotated[
    str | None, typer.Option("--up", metavar="COMMAND", help="Or by this command a worker is started, or MQINFER_UP.")
]
Down = Annotated[
    str | None, typer.Option("--down", metavar="COMMAND", help="And by this one it is stopped, or MQINFER_DOWN.")
]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="NAME", help="Where --up may start one; several times, or MQINFER_HOSTS."),
]
DryRun = Annotated[
    bool | None, typer.Option("--dry-run", help="Log what would be done and do nothing, or MQINFER_DRY_RUN.")
]

# Jobs

Prompts = Annotated[
    Path,
    typer.Argument(metavar="PROMPTS", help='JSON lines: OpenAI\'s batch format, or {"custom_id": …, "prompt": …}.'),
]
Results = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Results, one line per custom_id.")]
ResultsOrNone = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Results, one line per custom_id.")
]
BatchModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH_OR_ID",
        help="Here: the checkpoint, a folder or a hub id. With --broker: where its tokenizer is on this machine.",
    ),
]
BatchStages = Annotated[
    int | None, typer.Option("--stages", metavar="N", help="Here: how many stages of equal cost. Default: 1.")
]
BatchDtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="Here: float32 (the default), bfloat16 or float16."),
]
Detach = Annotated[bool, typer.Option("--detach", help="Enqueue, print the job's id and leave.")]
RetryErrors = Annotated[bool, typer.Option("--retry-errors", help="Ask again where the row is an error.")]
Window = Annotated[
    int | None, typer.Option(metavar="N", help="Requests under way at most, or MQINFER_WINDOW. Default: 2048.")
]
MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", help="For lines that do not say it, or MQINFER_MAX_TOKENS. Default: 256.")
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="For lines that do not say it, or MQINFER_TEMPERATURE. Default: 0, the likeliest."),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="The id that `mqinfer batch --detach` printed.")]
ResultsPlan = Annotated[
    Path | None,
    typer.Option("--pipeline", "-p", metavar="FILE", help="The plan, for the texts of logprobs' tokens."),
]
Wait = Annotated[
    bool, typer.Option(show_default=False, help="Wait for the rest (the default), or take only what is there.")
]
