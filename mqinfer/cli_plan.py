"""The command line for what comes before a fleet: `mqinfer plan`, `mqinfer profile`. Flags in, commands called.

As in cli.py, what a command needs is imported when it runs.
"""

from __future__ import annotations

from functools import partial

import typer

from mqinfer import flags
from mqinfer.errors import SettingsError
from mqinfer.launch import hide_torch, load_settings, run


def plan(
    model: flags.Model,
    stages: flags.Stages = None,
    cut: flags.Cut = None,
    dtype: flags.Dtype = "float32",
    name: flags.Name = None,
    revision: flags.Revision = "",
    output: flags.PlanFile = None,
    profile: flags.Profile = None,
    fleet: flags.Fleet = None,
    context: flags.Context = None,
    prompt_tokens: flags.PromptTokens = None,
    concurrency: flags.Concurrency = None,
    commands: flags.Commands = None,
    as_json: flags.Json = False,
) -> None:
    """Cut a model into equal stages, or for a fleet of machines.

    Its weights are not loaded; of a hub id not even downloaded. A fleet's file has a table for each kind of machine:

    \b
      [[machine]]
      name = "a100"
      count = 2                 # hosts; a host's second GPU is a machine of its own
      profile = "a100.toml"     # of mqinfer profile, run there; or gpu = "A100-80GB", by its peak figures
      #memory = "60GiB"         # if not all that was free
      #device = "cuda:0"

    Examples:

    \b
      mqinfer plan Qwen/Qwen3-32B --stages 4 --dtype bfloat16 -o pipeline.toml
      mqinfer plan Qwen/Qwen3-32B --fleet fleet.toml --dtype bfloat16 --concurrency 512 -o pipeline.toml
    """
    hide_torch()
    beside = {"context": context, "prompt-tokens": prompt_tokens, "concurrency": concurrency, "commands": commands}
    if fleet is None:
        if given := [f"--{flag}" for flag, value in {**beside, "json": as_json or None}.items() if value is not None]:
            raise SettingsError(f"{', '.join(given)}: only with --fleet FILE")
        from mqinfer.fleet_commands import make_plan

        make_plan(
            model,
            stages=stages,
            cut=cut,
            dtype=dtype,
            name=name,
            revision=revision,
            output=output,
            profile=profile,
        )
        return
    if (stages, cut, profile) != (None,) * 3:
        raise SettingsError("--fleet chooses the stages: leave out --stages, --cut and --profile")
    from mqinfer.fleet_commands import FleetOptions, plan_for_fleet

    plan_for_fleet(
        model,
        FleetOptions(
            fleet=fleet,
            dtype=dtype,
            name=name,
            revision=revision,
            output=output,
            commands=commands,
            context_tokens=context,
            prompt_tokens=prompt_tokens,
            concurrency=concurrency,
            as_json=as_json,
        ),
    )


def profile(
    model: flags.ProfiledModel,
    output: flags.ProfileFile,
    dtype: flags.Dtype = "float32",
    revision: flags.Revision = "",
    device: flags.Device = None,
    threads: flags.Threads = None,
    codec: flags.Codec = None,
    broker: flags.ProfileBroker = None,
    context: flags.ProfileContext = None,
    layers: flags.ProfileLayers = None,
    config: flags.Config = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
) -> None:
    """Measure what a model takes on this machine.

    For mqinfer plan --fleet: a layer, the head, the embedding, prompts, and the way through the broker. Stages of a few
    layers are loaded and computed as by a worker, so that it works for models that do not fit. The machine should be
    idle otherwise. Example:

    \b
      mqinfer profile --model Qwen/Qwen3-32B --dtype bfloat16 --device cuda:0 --broker @operator.broker -o host.toml
    """
    from mqinfer import fleet_commands
    from mqinfer.settings import ProfileSettings

    given = {"broker": broker, "device": device, "threads": threads, "codec": codec}
    settings = load_settings(ProfileSettings, config, **given, log_level=log_level, log_json=log_json)
    measure = partial(fleet_commands.profile, settings, model, output, dtype=dtype, revision=revision)
    measure = partial(measure, context_tokens=context, layers=layers, with_link=broker is not None)
    run(lambda stop: measure(stop=stop), with_torch=True)


def add_to(app: typer.Typer) -> None:
    """The two commands."""
    app.command()(plan)
    app.command()(profile)
