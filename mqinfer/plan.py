"""The plan: which model, which weights, which dtype, cut into which stages. A TOML file that a person can edit.

Everything an actor without torch must know of the model stands here too, so that a coordinator never reads a
checkpoint. A plan that exists is valid. No torch and no RabbitMQ may be imported here; reading checkpoints is
`checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mqinfer.errors import PlanError, SettingsError
from mqinfer.queues import check_name

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  #: dtype name -> bytes an element

_T = TypeVar("_T")


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
    try:
        return loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"can't read the plan {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not UTF-8 text") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def write(plan: Plan, path: str | Path) -> None:
    """Put the plan into the file, which is at any moment the old one or the new one, whole. Raises: PlanError."""
    target = Path(path)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            fresh.write_text(dumps(plan), encoding="utf-8")
            fresh.replace(target)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()
    except OSError as error:
        raise PlanError(f"can't write the plan {path}: {error.strerror}") from error


def dumps(plan: Plan) -> str:
    """The plan as commented TOML."""
    return f"""\
# A pipeline of mqinfer: one model cut into {len(plan.stages)} stages, one RabbitMQ queue for each.
# Coordinators, workers and batch jobs must be started with the same plan: messages of another one are refused.

# Part of the queues' names: pipelines that share a broker need different names.
name = {_string(plan.name)}

# A Hugging Face hub id with the commit as revision, or the path of a local folder with no revision.
model = {_string(plan.model)}
revision = {_string(plan.revision)}

# What weights and hidden states are computed in: {", ".join(DTYPES)}.
dtype = {_string(plan.dtype)}

# The layers of each stage, [first, end): the next stage begins where one ends. The first stage embeds tokens too,
# the last has the output head, which weighs as much as several layers: give it fewer.
stages = {_pairs(plan.stages)}

# What mqinfer plan found in the checkpoint; do not edit. For another model make another plan.
[checkpoint]
fingerprint = {_string(plan.fingerprint)}
model_type = {_string(plan.model_type)}
layers = {plan.layers}
hidden_size = {plan.hidden_size}
vocab_size = {plan.vocab_size}
context_tokens = {plan.context_tokens}
eos_tokens = {list(plan.eos_tokens)}
"""


def loads(text: str) -> Plan:
    """The plan that `dumps` wrote or a person edited. Raises: PlanError that names the key at fault."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"not TOML: {error}") from error
    top = _Table(document, "")
    facts = _Table(top.take("checkpoint", dict), "checkpoint.")
    plan = _plan(top, facts)
    layers = facts.take("layers", int)
    top.finish()
    facts.finish()
    if plan.layers != layers:
        raise PlanError(f"stages: they end at layer {plan.layers}, but the model has {layers} layers")
    return plan


def _plan(top: _Table, facts: _Table) -> Plan:
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


class _Table:
    """One TOML table, from which every key is taken once."""

    def __init__(self, values: Mapping[str, Any], prefix: str) -> None:
        self._values = dict(values)
        self._prefix = prefix

    def take(self, key: str, kind: type[_T]) -> _T:
        """The value of the key. Raises: PlanError where it is missing or of another kind."""
        if key not in self._values:
            raise PlanError(f"{self._prefix}{key}: missing")
        value = self._values.pop(key)
        if type(value) is not kind:
            raise PlanError(f"{self._prefix}{key}: {value!r} is not {_KINDS[kind]}")
        return value

    def finish(self) -> None:
        """Raises: PlanError that names the keys nobody took."""
        if self._values:
            raise PlanError(f"unknown key: {', '.join(self._prefix + key for key in self._values)}")


_KINDS: Mapping[type, str] = {str: "a text", int: "a whole number", list: "a list", dict: "a table"}


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


def _string(text: str) -> str:
    """A TOML basic string: JSON's escapes are a part of TOML's, but for DEL, which JSON leaves bare."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
