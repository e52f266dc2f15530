"""The plan: which model, which weights, which dtype, cut into which stages. A TOML file that a person can edit.

Everything an actor without torch must know of the model stands here too, so that a coordinator never reads a
checkpoint. A plan that exists is valid. No torch and no RabbitMQ may be imported here; reading checkpoints is
`checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqinfer.errors import PlanError, SettingsError
from mqinfer.queues import check_name
from mqinfer.toml_table import Table, document, read_file, replace_file, string

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  #: dtype name -> bytes an element


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """The decoder layers [first, end). The first stage embeds too, the last has final norm, head and sampler."""

    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All stages of a pipeline. Raises: PlanError that names the field which is wrong."""

    #: The pipeline's name: part of its queues' names.
    name: str
    #: Hugging Face hub id, or path of a local folder.
    model: str
    #: Commit of the hub's repository; "" for a folder.
    revision: str = ""
    dtype: str
    stages: tuple[StageSpec, ...]
    #: Stands for the weights: of a folder a digest over headers and samples of every tensor, of the hub the commit.
    fingerprint: str
    #: transformers' model type, such as "llama".
    model_type: str
    hidden_size: int
    vocab_size: int
    #: The most positions a row may reach.
    context_tokens: int
    #: Tokens that end an answer.
    eos_tokens: tuple[int, ...] = ()
    #: 16 hex digits that bind model, weights, dtype and cuts; messages of another digest are refused.
    #: A folder's path is not part of it: the same weights may lie elsewhere on every machine.
    digest: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            check_name(self.name)
        except SettingsError as error:
            raise PlanError(f"name: {error}") from error
        if self.dtype not in DTYPES:
            raise PlanError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        _check_stages(self.stages)
        for key in ("hidden_size", "vocab_size", "context_tokens"):
            if getattr(self, key) < 1:
                raise PlanError(f"{key}: {getattr(self, key)} is less than 1")
        if any(token < 0 for token in self.eos_tokens):
            raise PlanError(f"eos_tokens: {min(self.eos_tokens)} is less than 0")
        object.__setattr__(self, "digest", self._digest())  # once: every message has it

    def _digest(self) -> str:
        bound = {
            "model": self.model if self.revision else "",
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "cuts": _pairs(self.stages),
        }
        canonical = json.dumps(bound, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def itemsize(self) -> int:
        """Bytes of one element of hidden states."""
        return DTYPES[self.dtype]

    @property
    def layers(self) -> int:
        """Decoder layers of the whole model."""
        return self.stages[-1].end


def read(path: str | Path) -> Plan:
    """The plan in the file. Raises: PlanError that names the file and the key at fault."""
    return read_file(path, "the plan", loads)


def write(plan: Plan, path: str | Path) -> None:
    """Put the plan into the file, which is at any moment the old one or the new one, whole. Raises: PlanError."""
    replace_file(path, "the plan", dumps(plan))


def dumps(plan: Plan) -> str:
    """The plan as commented TOML."""
    return f"""\
# A pipeline of mqinfer: one model cut into {len(plan.stages)} stages, one RabbitMQ queue for each.
# Coordinators, workers and batch jobs must be started with the same plan: messages of another one are refused.

# Part of the queues' names: pipelines that share a broker need different names.
name = {string(plan.name)}

# A Hugging Face hub id with the commit as revision, or the path of a local folder with no revision.
model = {string(plan.model)}
revision = {string(plan.revision)}

# What weights and hidden states are computed in: {", ".join(DTYPES)}.
dtype = {string(plan.dtype)}

# The layers of each stage, [first, end): the next stage begins where one ends. The first stage embeds tokens too,
# the last has the output head, which weighs as much as several layers: give it fewer.
stages = {_pairs(plan.stages)}

# What mqinfer plan found in the checkpoint; do not edit. For another model make another plan.
[checkpoint]
fingerprint = {string(plan.fingerprint)}
model_type = {string(plan.model_type)}
layers = {plan.layers}
hidden_size = {plan.hidden_size}
vocab_size = {plan.vocab_size}
context_tokens = {plan.context_tokens}
eos_tokens = {list(plan.eos_tokens)}
"""


def loads(text: str) -> Plan:
    """The plan that `dumps` wrote or a person edited. Raises: PlanError that names the key at fault."""
    top = document(text)
    facts = Table(top.take("checkpoint", dict), "checkpoint.")
    plan = _plan(top, facts)
    layers = facts.take("layers", int)
    top.finish()
    facts.finish()
    if plan.layers != layers:
        raise PlanError(f"stages: they end at layer {plan.layers}, but the model has {layers} layers")
    return plan


def _plan(top: Table, facts: Table) -> Plan:
    return Plan(
        name=top.take("name", str),
        model=top.take("model", str),
        revision=top.take("revision", str),
        dtype=top.take("dtype", str),
        stages=_stages(top.take("stages", list)),
        fingerprint=facts.take("fingerprint", str),
        model_type=facts.take("model_type", str),
        hidden_size=facts.take("hidden_size", int),
        vocab_size=facts.take("vocab_size", int),
        context_tokens=facts.take("context_tokens", int),
        eos_tokens=_ints("checkpoint.eos_tokens", facts.take("eos_tokens", list)),
    )


def _stages(values: Sequence[Any]) -> tuple[StageSpec, ...]:
    ranges = [_ints("stages", value) if isinstance(value, list) else () for value in values]
    for value, layers in zip(values, ranges, strict=True):
        if len(layers) != 2:
            raise PlanError(f"stages: {value!r} is not a pair [first layer, end]")
    return tuple(StageSpec(first=first, end=end) for first, end in ranges)


def _ints(key: str, values: Sequence[Any]) -> tuple[int, ...]:
    for value in values:
        if type(value) is not int:
            raise PlanError(f"{key}: {value!r} is not a whole number")
    return tuple(values)


def _check_stages(stages: Sequence[StageSpec]) -> None:
    if not stages:
        raise PlanError("stages: there is none")
    expected = 0
    for index, stage in enumerate(stages):
        if stage.first != expected:
            raise PlanError(f"stages: stage {index} begins at layer {stage.first} instead of {expected}")
        if stage.end <= stage.first:
            raise PlanError(f"stages: stage {index}, [{stage.first}, {stage.end}], has no layer")
        expected = stage.end


def _pairs(stages: Sequence[StageSpec]) -> list[list[int]]:
    return [[stage.first, stage.end] for stage in stages]
