"""One frozen settings class per actor: flags > environment (MQINFER_*) > file. The only reader of the environment.

Every field says its unit in its name. A value that can't be used is a SettingsError that names the field. All actors
may share one file: a key that none of them has is an error, another actor's is not.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from mqinfer.errors import SettingsError

_UNITS = {
    "": 1,
    **{unit: 2**power for power, unit in ((0, "b"), (10, "kib"), (20, "mib"), (30, "gib"), (40, "tib"))},
    **{unit: 10**power for power, unit in ((3, "kb"), (6, "mb"), (9, "gb"), (12, "tb"))},
}


def parse_bytes(value: Any) -> Any:
    """ "4GiB", "512 MiB" or a plain number, as bytes; anything else is left for the validator to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise ValueError("write a size such as 4GiB or 512MiB")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)]


class Settings(BaseSettings):
    """What all actors share."""

    # An empty variable, as in an env file whose value was not filled in, is one that is not there.
    model_config = SettingsConfigDict(env_prefix="MQINFER_", env_ignore_empty=True, frozen=True, extra="ignore")

    #: amqp://user:password@host:port/vhost, amqps://…, or memory://name.
    broker: str = "amqp://guest:guest@localhost:5672/"
    #: The plan's file.
    pipeline: Path | None = None
    #: Half of what the broker waits for a sign of life, about.
    heartbeat_s: float = Field(10.0, ge=1, le=600)
    #: debug, info, warning or error.
    log_level: LogLevel = "info"
    #: Log lines as JSON, one object a line.
    log_json: bool = False

    _in_file: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, dict(cls._in_file))


class WorkerSettings(Settings):
    """A stage worker's."""

    #: Where the layers live: cpu, cuda, cuda:0 and so on.
    device: str = "cpu"
    #: The most that keys and values may take.
    kv_bytes: Bytes = 2**30
    #: CPU threads of the compute; 0: one for each core.
    threads: int = Field(0, ge=0, le=1024)
    #: How hidden states travel to the next stage.
    codec: Literal["raw", "lossless", "int8", "int8+zstd"] = "lossless"
    #: New positions computed in one forward at most, over all microbatches that wait.
    merge_tokens: int = Field(1024, ge=1)
    #: On SIGTERM, how long to go on serving the rows whose keys and values are here; then they are replayed elsewhere.
    drain_s: float = Field(20.0, ge=0)
    #: Cached rows that nobody has asked for in so long are forgotten: their coordinator is gone.
    idle_s: float = Field(300.0, gt=0)


class ProfileSettings(WorkerSettings):
    """Of measuring what a worker does."""

    #: Beside its own words only what went wrong is worth a line.
    log_level: LogLevel = "warning"


class CoordinatorSettings(Settings):
    """A coordinator's."""

    #: Requests computed at the same time at most.
    rows: int = Field(128, ge=1, le=65_535)
    #: Rows that travel in one microbatch at most.
    microbatch_rows: int = Field(64, ge=1, le=1024)
    #: New positions of one step at most: how long a prefill makes others wait.
    step_tokens: int = Field(256, ge=1)
    #: Trips after which nobody joins a microbatch any more, so that routes are drawn anew.
    open_trips: int = Field(256, ge=1)
    #: How old the tokens kept in a checkpoint may be.
    checkpoint_s: float = Field(30.0, gt=0)
    #: How long one delivery is held at most; far below the broker's consumer_timeout (30 minutes).
    lease_s: float = Field(600.0, gt=0)
    #: How often it is looked whether the workers on the routes still exist.
    probe_s: float = Field(1.0, gt=0)
    #: After so long without an end a trip is given up and its rows are replayed.
    step_timeout_s: float = Field(180.0, gt=0)


class BatchSettings(Settings):
    """A batch job's."""

    #: Beside a progress bar only what went wrong is worth a line.
    log_level: LogLevel = "warning"
    #: Requests enqueued and not yet answered at most.
    window: int = Field(2048, ge=1)
    #: For lines that do not say: tokens to generate at most.
    max_tokens: int = Field(256, ge=1)
    #: For lines that do not say: 0 always takes the most likely token.
    temperature: float = Field(0.0, ge=0, le=2)


S = TypeVar("S", bound=Settings)


def load(kind: type[S], *, file: Path | None = None, **flags: Any) -> S:
    """The settings of one actor; flags that are None were not given. Raises: SettingsError."""
    in_file = {} if file is None else _read(file)
    sourced: type[S] = type(kind.__name__, (kind,), {"_in_file": in_file, "__module__": kind.__module__})
    try:
        return sourced(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        words = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"setting {name}: {words} (flag, MQINFER_{name.upper()} or file)") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"can't read the settings file {file}: {error.strerror}") from error
    except ValueError as error:  # neither UTF-8 nor TOML
        raise SettingsError(f"the settings file {file} is not TOML: {error}") from error
    actors: list[type[Settings]] = [Settings, *Settings.__subclasses__()]
    known = {name for actor in actors for name in actor.model_fields}
    for key in values.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        raise SettingsError(f"{file}: unknown key {key!r}" + (f", is it {near[0]!r}?" if near else ""))
    return values
