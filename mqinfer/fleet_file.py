"""A fleet's file, and what planning needs to know of machines and model: files and checkpoints in, numbers out.

Nothing is decided here, and nothing printed.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from mqinfer import gpus, host_profile
from mqinfer.checkpoint import CheckpointFacts
from mqinfer.errors import PlanError
from mqinfer.families import PADDED, VERIFIED
from mqinfer.fleet_costs import Curve, Layer, Load, Machine, Model, Speed
from mqinfer.host_profile import HostProfile
from mqinfer.plan import DTYPES
from mqinfer.settings import MOST_ROWS, parse_bytes
from mqinfer.toml_table import Table, document, read_file

#: Of a machine without a measured link: what a message takes through a broker in the same network, and its sender's and
#: receiver's Python (0.6 to 1 ms each, docs/performance.md).
HOP_S = 0.002
#: Working space of a forward: so many hidden states for each of its positions (a wide feed-forward's are the most), and
#: where there is the head, so many rows of logits in float32.
WORKING_TENSORS, LOGITS = 24, 3
#: The cache gives a row room in multiples of this.
KV_ROUND_TOKENS = 64
#: Planning takes seconds for some hundreds.
MOST_MACHINES = 1000
#: A machine's name, a part of its units' instances: mqinfer-worker@STAGE-NAME-NUMBER.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]{,99}")
#: What deploy/mqinfer-worker@.service takes for the device there.
_UNIT_DEVICE = re.compile(r"gpu[0-9].*|cpu")


@dataclass(frozen=True, slots=True)
class FleetMachine:
    """What a fleet's file says of machines of one kind, with what was measured or is known."""

    machine: Machine
    #: What to start a worker with.
    device: str
    #: CPU threads of the compute, as it was profiled; 0: all.
    threads: int
    #: At which position rows decoded when it was profiled; None: its speed is a roofline's.
    profiled_tokens: int | None

    @property
    def estimated(self) -> bool:
        """Whether nothing was measured."""
        return self.profiled_tokens is None


def read_fleet(path: Path, facts: CheckpointFacts, dtype: str, load: Load) -> list[FleetMachine]:
    """The machines of the file, as this model sees them. Raises: PlanError that names the file and what is wrong."""

    def loads(text: str) -> list[FleetMachine]:
        top = document(text)
        tables = [_dict(value) for value in top.take("machine", list)]
        top.finish()
        machines = []
        for number, table in enumerate(tables, 1):
            try:
                machines.append(_machine(Table(table, ""), path.parent, facts, dtype, load))
            except PlanError as error:
                name = table.get("name")
                raise PlanError(f"machine {name if _is_name(name) else number}: {error}") from error
        names = [machine.machine.name for machine in machines]
        if not machines or len(set(names)) < len(names):
            raise PlanError("machine: there is none" if not names else f"machine: a name is there twice: {names}")
        if (total := sum(machine.machine.count for machine in machines)) > MOST_MACHINES:
            raise PlanError(f"machine: they are {total} in all, more than the {MOST_MACHINES} that are planned for")
        return machines

    return read_file(path, "the fleet", loads)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Where a machine's numbers are from."""

    speed: Speed
    memory_bytes: int
    device: str
    threads: int = 0
    profiled_tokens: int | None = None
    hop_s: float = HOP_S
    link_bytes_per_s: float = 0.0


def _machine(table: Table, folder: Path, facts: CheckpointFacts, dtype: str, load: Load) -> FleetMachine:
    name = table.take("name", str)
    if not _is_name(name):
        raise PlanError(f"name: {name!r} can't be a part of a unit's name: at most 100 letters, digits, '_' and '.'")
    if _UNIT_DEVICE.fullmatch(name):
        raise PlanError(f"name: {name!r} would be taken for the worker's device: write another one")
    count, memory = table.take("count", int, 1), table.take("memory", str, "")
    if count < 1:
        raise PlanError(f"its count is {count}")
    estimated = "gpu" in table
    if ("profile" in table) == estimated:
        raise PlanError("give it either a profile or a gpu")
    if estimated:
        known = _estimate(table.take("gpu", str), facts, dtype, load)
    else:
        known = _measured(read_profile(folder / table.take("profile", str), facts, dtype))
    machine = Machine(
        name=name,
        count=count,
        memory_bytes=_bytes(memory) if memory else known.memory_bytes,
        speed=known.speed,
        hop_s=known.hop_s,
        link_bytes_per_s=known.link_bytes_per_s,
    )
    if not machine.memory_bytes:
        raise PlanError('its profile does not know the memory: say memory = "…GiB"')
    device = host_profile.device(table.take("device", str, known.device))
    table.finish()
    return FleetMachine(machine, device, known.threads, known.profiled_tokens)


def _measured(profile: HostProfile) -> _Known:
    link = profile.link
    known = _Known(
        speed=speed_of(profile),
        memory_bytes=profile.memory_bytes,
        device=profile.device,
        threads=profile.threads,
        profiled_tokens=profile.context_tokens,
    )
    return replace(known, hop_s=link.hop_s, link_bytes_per_s=link.bytes_per_s) if link else known


def _estimate(name: str, facts: CheckpointFacts, dtype: str, load: Load) -> _Known:
    if name not in gpus.GPUS:
        longer = [known for known in gpus.GPUS if known.lower().startswith(name.lower())]
        near = longer or difflib.get_close_matches(name, gpus.GPUS, n=1)
        hint = f", is it {' or '.join(map(repr, near))}?" if near else "."
        raise PlanError(f"gpu: {name!r} is not known{hint} Known are: {', '.join(gpus.GPUS)}")
    gpu, itemsize, layers = gpus.GPUS[name], DTYPES[dtype], facts.anatomy.layers
    if dtype == "bfloat16" and not gpu.bfloat16:
        raise PlanError(f"gpu: {name} has no bfloat16: plan with --dtype float16")
    work = gpus.Work(
        layer_parameters=mean(layer.parameters for layer in layers),
        layer_active=mean(layer.active for layer in layers),
        head_parameters=facts.anatomy.head,
        itemsize=itemsize,
        layer_kv_bytes=load.context_tokens * facts.anatomy.kv_elements * itemsize,
    )
    return _Known(
        speed=gpus.speed(gpu, work), memory_bytes=int(gpus.MEMORY_SHARE * gpu.memory_bytes), device=gpus.DEVICE
    )


def read_profile(path: Path, facts: CheckpointFacts, dtype: str) -> HostProfile:
    """Raises: PlanError also where it is of another model or dtype."""
    profile = host_profile.read(path)
    if profile.fingerprint != facts.fingerprint:
        raise PlanError(f"{path} was measured with another model, {profile.model}: run `mqinfer profile` with this one")
    if profile.dtype != dtype:
        raise PlanError(
            f"{path} was measured in {profile.dtype}, not in {dtype}: run `mqinfer profile --dtype {dtype}`"
        )
    return profile


def speed_of(profile: HostProfile) -> Speed:
    """What was measured, as planning takes it."""
    return Speed(
        forward=Curve(profile.forward),
        layer=Curve(profile.layer),
        head=Curve(profile.head),
        embedding=Curve(profile.embedding),
        layer_prefill_token_s=profile.layer_prefill_token_s,
    )


def model_of(facts: CheckpointFacts, dtype: str, load: Load, *, step_tokens: int) -> Model:
    """What there is to place. `step_tokens`: positions of one forward at most."""
    anatomy, itemsize = facts.anatomy, DTYPES[dtype]
    logits = LOGITS * 4 * min(load.concurrency, step_tokens) * facts.vocab_size
    return Model(
        layers=tuple(
            Layer(weight_bytes=layer.parameters * itemsize, work=work)
            for layer, work in zip(anatomy.layers, works(facts), strict=True)
        ),
        embedding_bytes=anatomy.embedding * itemsize,
        head_bytes=(anatomy.head + anatomy.final) * itemsize,
        tied=anatomy.tied,
        kv_layer_token_bytes=anatomy.kv_elements * itemsize,
        kv_copies=2 if VERIFIED.get(facts.model_type) == PADDED else 1,
        hidden_bytes=facts.hidden_size * itemsize,
        working_bytes=WORKING_TENSORS * step_tokens * facts.hidden_size * itemsize,
        head_working_bytes=logits,
    )


def works(facts: CheckpointFacts) -> list[float]:
    """What each layer costs a token, against the mean."""
    active = [layer.active for layer in facts.anatomy.layers]
    return [own / (mean(active) or 1) for own in active]


def stage_costs(facts: CheckpointFacts, profile: HostProfile, rows: int) -> list[int]:
    """Nanoseconds of each layer where so many rows decode; with the embedding's the first, with the head's the last."""
    speed = speed_of(profile)
    seconds = [work * speed.layer.at(rows) for work in works(facts)]
    seconds[0] += speed.embedding.at(rows)
    seconds[-1] += speed.head.at(rows)
    return [max(round(1e9 * own), 1) for own in seconds]


def load_of(context_tokens: int, prompt_tokens: int | None, concurrency: int, facts: CheckpointFacts) -> Load:
    """What is to be carried. Raises: PlanError."""
    if context_tokens > facts.context_tokens:
        raise PlanError(f"--context {context_tokens}: the model was made for {facts.context_tokens} positions")
    if concurrency > MOST_ROWS:
        raise PlanError(f"--concurrency {concurrency}: a coordinator takes {MOST_ROWS} rows at most")
    prompt = context_tokens // 2 if prompt_tokens is None else prompt_tokens
    if not 0 <= prompt < context_tokens:
        raise PlanError(f"--prompt-tokens {prompt}: a row has {context_tokens} positions in all (--context)")
    return Load(
        context_tokens=context_tokens,
        prompt_tokens=prompt,
        concurrency=concurrency,
        kv_round_tokens=KV_ROUND_TOKENS,
    )


def _bytes(text: str) -> int:
    try:
        found = int(parse_bytes(text))
    except ValueError as error:
        raise PlanError(f"memory: {text!r}: {error}") from error
    if not 0 < found < host_profile.MOST:
        raise PlanError(f"memory: {text!r} is none" if not found else "memory: more than a machine can have")
    return found


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"machine: {value!r} is not a table: write [[machine]]")
    return value
