"""The command line for scaling stages: `mqinfer advise`, `mqinfer autoscale`. Flags in, commands called.

As in cli.py, what a command needs is imported when it runs.
"""

from __future__ import annotations

import typer

from mqinfer import flags
from mqinfer.launch import load_settings, run
from mqinfer.running import unless_stopped


def advise(
    pipeline: flags.Pipeline = None,
    broker: flags.Broker = None,
    window: flags.AdviceWindow = None,
    limits: flags.StageLimits = None,
    json: flags.Json = False,
    config: flags.Config = None,
) -> None:
    """Say which stage should have a worker more, or less.

    It looks for a while (--window), then forecasts what one more worker of each busy stage would bring: with that stage
    relieved the next-slowest one bounds, and more workers mean more microbatches with fewer rows each. Nothing is
    changed. Examples:

    \b
      mqinfer advise -p pipeline.toml --broker amqp://guest:guest@localhost/
      mqinfer advise -p pipeline.toml --window 30s --json
    """
    from mqinfer import operate
    from mqinfer.settings import AutoscalerSettings

    given = {"pipeline": pipeline, "broker": broker, "window_s": window, "limits": limits}
    settings = load_settings(AutoscalerSettings, config, **given)
    run(lambda stop: unless_stopped(stop, operate.advise(settings, as_json=json)))


def autoscale(
    pipeline: flags.Pipeline = None,
    broker: flags.Broker = None,
    systemd: flags.BySystemd = None,
    up: flags.Up = None,
    down: flags.Down = None,
    host: flags.Hosts = None,
    min_: flags.Min = None,
    max_: flags.Max = None,
    limits: flags.StageLimits = None,
    cooldown: flags.Cooldown = None,
    window: flags.AdviceWindow = None,
    dry_run: flags.DryRun = None,
    config: flags.Config = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
) -> None:
    """Start and stop workers of stages, as the load asks for it.

    It follows `mqinfer advise`, once three looks in a row agree, and leaves a stage alone for a cool-down after each
    change. The workers that it starts are called STAGE-auto1, STAGE-auto2 and so on; those it stops first, and never a
    stage's last one. It may be stopped and started at any time: it asks the fleet who is there. Commands run without a
    shell and must return; {stage}, {n}, {instance} and {host} are filled in, and the worker must be told its instance
    (MQINFER_INSTANCE or --instance; the unit mqinfer-worker@ does it). Examples:

    \b
      mqinfer autoscale -p pipeline.toml --dry-run --log-level debug
      mqinfer autoscale -p pipeline.toml --systemd --min 1 --max 4 --limits 2=1:8
      mqinfer autoscale -p pipeline.toml --host gpu1 --host gpu2 \\
        --up 'ssh {host} systemctl start --no-block mqinfer-worker@{stage}-{n}' \\
        --down 'ssh {host} systemctl stop --no-block mqinfer-worker@{stage}-{n}'
    """
    from mqinfer import commands
    from mqinfer.settings import AutoscalerSettings

    acting = {"systemd": systemd, "up": up, "down": down, "hosts": host, "dry_run": dry_run}
    policy = {
        "min_consumers": min_,
        "max_consumers": max_,
        "limits": limits,
        "cooldown_s": cooldown,
        "window_s": window,
    }
    given = {"pipeline": pipeline, "broker": broker, "log_level": log_level, "log_json": log_json}
    settings = load_settings(AutoscalerSettings, config, **given, **acting, **policy)
    run(lambda stop: commands.autoscale(settings, stop=stop), stopped=0)


def add_to(app: typer.Typer) -> None:
    """Make them commands of `mqinfer`."""
    for command in (advise, autoscale):
        app.command()(command)
