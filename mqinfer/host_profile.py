"""What `mqinfer profile` found out about a machine: how long parts of one model take there. A TOML file.

No torch and no RabbitMQ may be imported here; measuring is `profiling.py` and `link_profile.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mqinfer.errors import PlanError
from mqinfer.toml_table import Table, document, read_file, replace_file, string

#: Seconds by rows, rows rising.
Points = tuple[tuple[int, float], ...]
#: Above all that is counted in a profile, and arithmetic with it is still exact enough.
MOST = 2**50
#: As PyTorch calls devices; "gpu", as people do, it does not know.
_DEVICE = re.compile(r"(?!gpu)[a-z]+(:[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """The way from a worker through the broker into a worker's hands."""

    #: Of a small message, published and confirmed.
    hop_s: float
    #: Of large ones, there and back.
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProfile:
    """One machine and one model, in one dtype."""

    host: str
    device: str
    #: CPU threads of the compute; 0: all.
    threads: int
    #: As in the plan.
    model: str
    fingerprint: str
    dtype: str
    #: What was free on the device; 0: it could not be found out.
    memory_bytes: int
    #: Positions that the rows had when they decoded.
    context_tokens: int
    #: New positions of a step that prefilled.
    prefill_tokens: int
    #: How many layers were measured at once.
    layers: int
    #: Seconds by rows that decode. Of a forward, beside its layers.
    forward: Points
    #: Of a layer of the model's mean work.
    layer: Points
    #: Of the head, final norm and sampling included.
    head: Points
    #: Of looking up so many tokens.
    embedding: Points
    #: Of a layer, for each token that is prefilled.
    layer_prefill_token_s: float
    #: None: it was not measured.
    link: LinkProfile | None = None


def read(path: str | Path) -> HostProfile:
    """The profile in the file. Raises: PlanError that names the file and the key at fault."""
    return read_file(path, "the profile", loads)


def write(profile: HostProfile, path: str | Path) -> None:
    """Put the profile into the file, whole. Raises: PlanError."""
    replace_file(path, "the profile", dumps(profile))


def dumps(profile: HostProfile) -> str:
    """The profile as commented TOML."""
    link = profile.link
    return f"""\
# What `mqinfer profile` measured; `mqinfer plan --fleet` and `--profile` read it. Seconds are medians.
host = {string(profile.host)}
device = {string(profile.device)}
threads = {profile.threads}
memory_bytes = {profile.memory_bytes}  # free on the device before anything was loaded; 0: not known

[model]
name = {string(profile.model)}
fingerprint = {string(profile.fingerprint)}
dtype = {string(profile.dtype)}

# By rows of a forward: [rows, seconds]. They decoded at position {profile.context_tokens};
# a layer's are those of a stage of {profile.layers} layers against a stage of one.
[seconds]
context_tokens = {profile.context_tokens}
prefill_tokens = {profile.prefill_tokens}
layers = {profile.layers}
forward = {_lists(profile.forward)}  # whatever it costs beside its layers
layer = {_lists(profile.layer)}
head = {_lists(profile.head)}
embedding = {_lists(profile.embedding)}
layer_prefill_token = {profile.layer_prefill_token_s!r}
""" + (
        ""
        if link is None
        else f"""
# From one worker's hands through the broker into the next one's.
[link]
hop_s = {link.hop_s!r}
bytes_per_s = {link.bytes_per_s!r}
"""
    )


def loads(text: str) -> HostProfile:
    """The profile that `dumps` wrote. Raises: PlanError that names the key at fault."""
    top = document(text)
    model = Table(top.take("model", dict), "model.")
    seconds = Table(top.take("seconds", dict), "seconds.")
    link = Table(top.take("link", dict), "link.") if "link" in top else None
    profile = HostProfile(
        host=top.take("host", str),
        device=device(top.take("device", str)),
        threads=_whole("threads", top.take("threads", int)),
        memory_bytes=_whole("memory_bytes", top.take("memory_bytes", int)),
        model=model.take("name", str),
        fingerprint=model.take("fingerprint", str),
        dtype=model.take("dtype", str),
        context_tokens=_whole("seconds.context_tokens", seconds.take("context_tokens", int)),
        prefill_tokens=_whole("seconds.prefill_tokens", seconds.take("prefill_tokens", int)),
        layers=_whole("seconds.layers", seconds.take("layers", int)),
        forward=_points("seconds.forward", seconds.take("forward", list)),
        layer=_points("seconds.layer", seconds.take("layer", list)),
        head=_points("seconds.head", seconds.take("head", list)),
        embedding=_points("seconds.embedding", seconds.take("embedding", list)),
        layer_prefill_token_s=_positive("seconds.layer_prefill_token", seconds.take("layer_prefill_token", float)),
        link=None if link is None else _link(link),
    )
    for table in (top, model, seconds, *([link] if link else [])):
        table.finish()
    if not any(taken for _, taken in profile.layer):
        raise PlanError("seconds.layer: a layer takes time, and these are all 0")
    return profile


def device(name: str) -> str:
    """The name. Raises: PlanError where no device can have it: it becomes a part of commands."""
    if not _DEVICE.fullmatch(name):
        raise PlanError(f"device: {name!r} is no device: write cpu, cuda or, for the second GPU, cuda:1")
    return name


def _link(table: Table) -> LinkProfile:
    return LinkProfile(
        hop_s=_positive("link.hop_s", table.take("hop_s", float)),
        bytes_per_s=_positive("link.bytes_per_s", table.take("bytes_per_s", float)),
    )


def _whole(key: str, value: int) -> int:
    if not 0 <= value < MOST:
        raise PlanError(f"{key}: {value} is not a number of 0 or more" + (", or too large" if value > 0 else ""))
    return value


def _positive(key: str, value: float) -> float:
    if not 0 <= value <= MOST:
        raise PlanError(f"{key}: {value} is not a number of 0 or more" + (", or too large" if value > 0 else ""))
    return float(value)


def _points(key: str, values: Sequence[Any]) -> Points:
    points: list[tuple[int, float]] = []
    for value in values:
        match value:
            case [int(rows), float() | int() as seconds] if (
                bool not in (type(rows), type(seconds)) and (points[-1][0] if points else 0) < rows < MOST
            ):
                points.append((rows, _positive(key, seconds)))
            case _:
                raise PlanError(f"{key}: {value!r} is not [rows, seconds] with rising rows")
    if not points:
        raise PlanError(f"{key}: there is none")
    return tuple(points)


def _lists(points: Points) -> list[list[float]]:
    return [list(point) for point in points]
