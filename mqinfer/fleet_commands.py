"""What `mqinfer plan` and `mqinfer profile` do: files in; a plan, a profile, tables and commands out."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mqinfer import checkpoint, console, fleet_file, fleet_growth, fleet_plan, host_profile
from mqinfer import plan as plans
from mqinfer.checkpoint import CheckpointFacts
from mqinfer.errors import PlanError, SettingsError
from mqinfer.fleet_costs import Load, Machine
from mqinfer.fleet_file import FleetMachine
from mqinfer.fleet_plan import FleetPlan, Shortage
from mqinfer.observe import size
from mqinfer.plan import DTYPES, Plan
from mqinfer.running import unless_stopped
from mqinfer.settings import CoordinatorSettings, WorkerSettings

#: Where nothing is said: positions of a row, if the model has them.
CONTEXT_TOKENS = 2048
#: And where rows decode that are profiled.
PROFILED_TOKENS = 512
#: How many times as far rows may decode on average before it is said that the profile is of shorter ones.
FAR = 2
#: Forwards' rows by which a plan without a fleet weighs head and layers where a profile is given.
CUT_ROWS = 32

_ROWS = CoordinatorSettings.model_fields["rows"].default
_STEP_TOKENS = WorkerSettings.model_fields["merge_tokens"].default


def make_plan(
    model: str,
    *,
    stages: int | None,
    cut: str | None,
    dtype: str,
    name: str | None,
    revision: str,
    output: Path | None,
    profile: Path | None,
) -> None:
    """Print the plan's table, write its file."""
    if (stages is None) == (cut is None):
        raise SettingsError("say either --stages N or --cut A,B,…")
    cuts = None if cut is None else _cuts(cut)
    found, costs = _measured_costs(model, profile, dtype, revision) if profile else (None, None)
    plan, facts = checkpoint.make_plan(
        model, stages=stages, cuts=cuts, dtype=dtype, name=name, revision=revision, found=found, costs=costs
    )
    console.show_plan(plan, checkpoint.stage_table(plan, facts, costs))
    _write_plan(plan, output)


def _cuts(text: str) -> list[int]:
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise SettingsError(f"--cut {text!r}: write layer numbers such as 10,20") from None


def _measured_costs(model: str, profile: Path, dtype: str, revision: str) -> tuple[CheckpointFacts, list[int]]:
    """The checkpoint's facts, and what each layer costs by the profile. Raises: PlanError."""
    facts = checkpoint.facts(model, revision)
    return facts, fleet_file.stage_costs(facts, fleet_file.read_profile(profile, facts, dtype), CUT_ROWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """How `plan --fleet` was asked."""

    fleet: Path
    dtype: str
    name: str | None
    revision: str
    output: Path | None
    commands: Path | None
    context_tokens: int | None
    prompt_tokens: int | None
    concurrency: int | None
    as_json: bool


def plan_for_fleet(model: str, options: FleetOptions) -> None:
    """Print the assignment; write the plan and the commands that start it. Raises: PlanError."""
    if options.dtype not in DTYPES:
        raise PlanError(f"dtype: {options.dtype!r} is not one of {', '.join(DTYPES)}")
    if options.commands is not None and options.output is None:
        raise PlanError("--commands: they start a plan's file, so give -o too")
    if not str(options.output).isprintable():
        raise PlanError("--output: a file with unprintable characters in its name can't stand in the commands")
    facts = checkpoint.facts(model, options.revision)
    context_tokens = options.context_tokens or min(CONTEXT_TOKENS, facts.context_tokens)
    load = fleet_file.load_of(context_tokens, options.prompt_tokens, options.concurrency or _ROWS, facts)
    fleet = fleet_file.read_fleet(options.fleet, facts, options.dtype, load)
    machines = [member.machine for member in fleet]
    costs = fleet_file.model_of(facts, options.dtype, load, step_tokens=_STEP_TOKENS)
    found = fleet_plan.plan_fleet(costs, load, machines)
    if isinstance(found, Shortage):
        raise PlanError(_too_small(model, found, load, machines))
    cuts = [stage.first for stage in found.stages[1:]]
    plan, _ = checkpoint.make_plan(
        model, cuts=cuts, dtype=options.dtype, name=options.name, revision=options.revision, found=facts
    )
    more = fleet_growth.one_more(costs, load, machines, found)
    if options.as_json:
        console.out.print_json(data=as_json(plan, found, machines, list(more)), indent=2)
    else:
        console.show_fleet_plan(plan, found, machines, load)
        _remark_on_profiles(fleet, load)
    commands = "\n".join(start_commands(options.output or Path("pipeline.toml"), found, fleet, load)) + "\n"
    _write(plan, commands, options)
    if not options.as_json:
        for machine, rate in zip(machines, more, strict=True):  # a plan each: what is there already has been shown
            console.show_one_more(machine.name, rate, found.tokens_per_s)
        if options.commands is None:
            console.out.print(f"\n{commands}", markup=False, soft_wrap=True, end="")


def _remark_on_profiles(fleet: Sequence[FleetMachine], load: Load) -> None:
    """Say what was not measured, and what was measured with far fewer keys and values than rows will have."""
    if estimated := [member.machine.name for member in fleet if member.estimated]:
        console.say(f"estimated by peak figures, which may be far off: {', '.join(estimated)} (mqinfer profile)")
    for member in fleet:
        if member.profiled_tokens is not None and load.mean_position > FAR * member.profiled_tokens:
            console.say(
                f"rows decode at position {load.mean_position} on average, but {member.machine.name} was profiled at "
                f"{member.profiled_tokens}: it will be slower than predicted; run mqinfer profile --context "
                f"{load.mean_position}"
            )


def _too_small(model: str, shortage: Shortage, load: Load, machines: Sequence[Machine]) -> str:
    have_bytes = sum(machine.count * machine.memory_bytes for machine in machines)
    return (
        f"the fleet is short by {shortage.short_bytes:,} bytes ({size(shortage.short_bytes)}) for {model} with "
        f"{load.concurrency} rows of {load.context_tokens} positions: it has {size(have_bytes)} in all, and so much "
        "finds no place; lower --concurrency or --context, or add a machine with that and some working space"
    )


def _write_plan(plan: Plan, output: Path | None) -> None:
    if output is None:
        console.say("nothing was written: give the plan a file with -o")
    else:
        plans.write(plan, output)
        console.say(f"wrote {output}")


def _write(plan: Plan, commands: str, options: FleetOptions) -> None:
    """The files that were asked for."""
    _write_plan(plan, options.output)
    if options.commands is not None:
        try:
            options.commands.write_text(commands, encoding="utf-8")
        except OSError as error:
            raise PlanError(f"can't write the commands {options.commands}: {error.strerror}") from error
        console.say(f"wrote {options.commands}")


def as_json(plan: Plan, found: FleetPlan, machines: Sequence[Machine], more: Sequence[float]) -> dict[str, Any]:
    """For machines: rates in tokens per second."""
    names = [machine.name for machine in machines]
    stages = [
        {
            "first": stage.first,
            "end": stage.end,
            "tokens_per_s": stage.tokens_per_s,
            "workers": [
                {
                    "machine": names[serving.machine],
                    "count": serving.count,
                    "rows": serving.rows,
                    "kv_bytes": serving.kv_bytes,
                    "tokens_per_s": serving.tokens_per_s,
                }
                for serving in stage.serving
            ],
        }
        for stage in found.stages
    ]
    return {
        "pipeline": plan.name,
        "digest": plan.digest,
        "tokens_per_s": found.tokens_per_s,
        "bound_stage": found.bound,
        "rows_per_forward": found.flight.rows,
        "stages": stages,
        "idle": dict(zip(names, found.idle, strict=True)),
        "one_more_tokens_per_s": dict(zip(names, more, strict=True)),
    }


def start_commands(pipeline: Path, found: FleetPlan, fleet: Sequence[FleetMachine], load: Load) -> Iterator[str]:
    """Lines of a shell script in parts: one for the coordinator, one for each machine."""
    file = shlex.quote(str(pipeline))
    yield f"# Start the pipeline of {file}: each part on its own machine, with MQINFER_BROKER set."
    yield "# By hand the first line of a part; as a service the others, as root, with deploy/README.md done before."
    yield ""
    yield "# any machine: the coordinator"
    yield f"mqinfer coordinator -p {file} --rows {load.concurrency}"
    yield from _service("mqinfer-coordinator", file, "coordinator", {"MQINFER_ROWS": load.concurrency})
    started = [0] * len(fleet)
    for number, stage in enumerate(found.stages):
        for serving in stage.serving:
            member = fleet[serving.machine]
            for _ in range(serving.count):
                started[serving.machine] += 1
                name, at = member.machine.name, started[serving.machine]
                instance, kv_bytes = f"{number}-{name}-{at}", max(serving.kv_bytes, 1)
                device = shlex.quote(member.device)
                settings = {"MQINFER_DEVICE": device, "MQINFER_KV_BYTES": kv_bytes}
                command = f"mqinfer worker -p {file} --stage {number} --device {device} --kv-bytes {kv_bytes}"
                if member.threads:
                    settings["MQINFER_THREADS"] = member.threads
                    command += f" --threads {member.threads}"
                yield ""
                yield f"# {name}, {at} of {member.machine.count}: stage {number}, layers [{stage.first}, {stage.end})"
                yield command
                yield from _service(f"mqinfer-worker@{instance}", file, f"worker-{instance}", settings)


def _service(unit: str, file: str, own: str, settings: Mapping[str, object]) -> Iterator[str]:
    """The unit's start as comments: the plan where mqinfer.env looks for it, the settings of its `own` env file."""
    lines = "".join(f"{key}=%s\\n" for key in settings)
    yield f"#   install -m 644 {file} /etc/mqinfer/pipeline.toml"
    yield f"#   printf '{lines}' {' '.join(map(str, settings.values()))} > /etc/mqinfer/{own}.env"
    yield f"#   systemctl enable --now mqinfer.target {unit}"


async def profile(
    settings: WorkerSettings,
    model: str,
    output: Path,
    *,
    dtype: str,
    revision: str,
    context_tokens: int | None,
    layers: int | None,
    with_link: bool,
    stop: asyncio.Event,
) -> int:
    """Measure this machine, write the file. The exit code."""
    try:
        from mqinfer import device, profiling
    except ImportError as error:
        raise SettingsError(f"profiling needs mqinfer[worker] ({error})") from error
    device.check(settings.device)
    link = await unless_stopped(stop, _measure_link(settings)) if with_link else None

    def measure() -> host_profile.HostProfile:
        plan, facts = checkpoint.make_plan(model, stages=1, dtype=dtype, revision=revision)
        anatomy, itemsize = facts.anatomy, plan.itemsize
        context = context_tokens or min(PROFILED_TOKENS, facts.context_tokens // 2)
        if context >= facts.context_tokens:
            raise PlanError(f"--context {context}: it must be less than the model's {facts.context_tokens}")
        weights = profiling.Weights(
            work=fleet_file.works(facts),
            layer_bytes=max(layer.parameters for layer in anatomy.layers) * itemsize,
            ends_bytes=(anatomy.embedding + anatomy.head + anatomy.final) * itemsize,
            kv_layer_token_bytes=anatomy.kv_elements * itemsize,
        )
        folder = checkpoint.resolve(model, plan.revision)
        return profiling.profile(
            plan, weights, folder, settings, context_tokens=context, layers=layers, tell=console.say
        )

    found = await unless_stopped(stop, asyncio.to_thread(measure))
    host_profile.write(replace(found, link=link), output)
    console.show_profile(replace(found, link=link))
    if link is None:
        console.say("the link to a broker was not measured: give --broker")
    console.say(f"wrote {output}")
    return 0


async def _measure_link(settings: WorkerSettings) -> host_profile.LinkProfile:
    from mqinfer import link_profile
    from mqinfer.commands import linked

    async with linked(settings, "profile") as transport:
        return await link_profile.measure(transport)
