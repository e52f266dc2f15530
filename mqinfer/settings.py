"""One frozen settings class per actor: flags > environment (MQINFER_*) > file. The only reader of the environment.

Every field says its unit in its name. A value that can't be used is a SettingsError that names the field. All actors
may share one file: a key that none of them has is an error, another actor's is not. The broker's URL holds a password:
it may stand in a file of its own (`@FILE`), which is also how systemd's credential `broker` comes in, before the file.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from mqinfer.errors import SettingsError
from mqinfer.hours import Hours

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


#: Characters of a secret.
_LONGEST_SECRET = 4096


def read_secret(value: Any) -> Any:
    """What `@FILE` stands for: the one line of the file; anything else is itself. A secret is never quoted."""
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    file = Path(value[1:])
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(_LONGEST_SECRET + 1).strip()
    except OSError as error:
        raise ValueError(f"can't read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} holds no text") from None
    if not text or len(text.split()) > 1 or len(text) > _LONGEST_SECRET:
        raise ValueError(f"{file} must hold one line, without spaces")
    return text


Secret = Annotated[str, BeforeValidator(read_secret)]


def parse_seconds(value: Any) -> Any:
    """ "10s", "2m", "1h" or a plain number, as seconds; anything else is left for the validator to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", value.lower(), re.ASCII)
    if match is None:
        raise ValueError("write a time such as 10s or 2m")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parse_limits(value: Any) -> Any:
    """ "2=1:8,3=0:2", or a list of such: by stage, its least and its most consumers."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    found = {}
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)=(\d+):(\d+)\s*", str(part), re.ASCII)
        if match is None:
            raise ValueError("write limits as STAGE=LEAST:MOST, such as 2=1:8")
        found[int(match[1])] = (int(match[2]), int(match[3]))
    return found


def _words(value: Any) -> Any:
    return [word for word in re.split(r"[\s,]+", value) if word] if isinstance(value, str) else value


Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0, allow_inf_nan=False)]


def _check_hours(value: str) -> str:
    Hours.parse(value)
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)]


class Settings(BaseSettings):
    """What all actors share."""

    # An empty variable, as in an env file whose value was not filled in, is one that is not there.
    model_config = SettingsConfigDict(env_prefix="MQINFER_", env_ignore_empty=True, frozen=True, extra="ignore")

    #: amqp://user:password@host:port/vhost, amqps://…, or memory://name; @FILE: what that file holds.
    broker: Secret = Field("amqp://guest:guest@localhost:5672/", repr=False)
    #: The plan's file.
    pipeline: Path | None = None
    #: Half of what the broker waits for a sign of life, about.
    heartbeat_s: float = Field(10.0, ge=1, le=600)
    #: debug, info, warning or error.
    log_level: LogLevel = "info"
    #: Log lines as JSON, one object a line.
    log_json: bool = False
    #: Where workers and coordinators serve Prometheus metrics; 0: nowhere.
    metrics_port: int = Field(0, ge=0, le=65_535)
    #: What they listen at for that: this machine alone, unless it is said.
    metrics_address: str = "127.0.0.1"

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
        """Flags, then the environment, then systemd's credential, then the file."""
        later = [InitSettingsSource(settings_cls, dict(source)) for source in (_credential(), cls._in_file)]
        return init_settings, env_settings, *later


def _credential() -> dict[str, Any]:
    """What systemd's `LoadCredential=broker:…` put there, if it did."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return {"broker": f"@{folder}/broker"} if folder and Path(folder, "broker").exists() else {}


def otlp_variable() -> str:
    """That of OpenTelemetry's own variables which says where spans go; "": none, and they go nowhere.

    Raises: SettingsError where it is no address; the library would say so for every batch of spans.
    """
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    name = "" if off else next((name for name in names if os.environ.get(name)), "")
    if name and not re.match(r"https?://[^/\s]", os.environ[name]):
        raise SettingsError(f"{name}: write an address such as http://collector:4318")
    return name


class WorkerSettings(Settings):
    """A stage worker's."""

    #: The name that it was started under, as K-N of mqinfer-worker@K-N: told in its reports, for who starts and stops.
    instance: str = Field("", max_length=200)
    #: Where the layers live: cpu, cuda, cuda:0 and so on.
    device: str = "cpu"
    #: The most that keys and values may take.
    kv_bytes: Bytes = 2**30
    #: CPU threads of the compute; 0: one for each core.
    threads: int = Field(0, ge=0, le=1024)
    #: How hidden states travel to the next stage; auto: raw or lossless, whichever is faster over this worker's link.
    codec: Literal["auto", "raw", "lossless", "int8", "int8+zstd"] = "auto"
    #: New positions computed in one forward at most, over all microbatches that wait.
    merge_tokens: int = Field(1024, ge=1)
    #: When it works, such as 20:00-07:00 in local time; "": always. At other times the device is free for others.
    hours: Annotated[str, AfterValidator(_check_hours)] = ""
    #: Where it chose its stage itself: move when another one stays slower by a margin.
    rebalance: bool = False
    #: Leave the GPU while a process that is no worker computes there. NVIDIA's only.
    yield_gpu: bool = False
    #: Why it begins without its device, if it does: a worker that leaves its device starts itself anew with this.
    paused: Literal["", "hand", "hours", "guest"] = ""
    #: On SIGTERM, how long to go on serving the rows whose keys and values are here; then they are replayed elsewhere.
    drain_s: float = Field(20.0, ge=0)
    #: Cached rows that nobody has asked for in so long are forgotten: their coordinator is gone.
    idle_s: float = Field(300.0, gt=0)


class ProfileSettings(WorkerSettings):
    """Of measuring what a worker does."""

    #: Beside its own words only what went wrong is worth a line.
    log_level: LogLevel = "warning"


#: Requests that a coordinator computes at the same time at most.
MOST_ROWS = 65_535


class CoordinatorSettings(Settings):
    """A coordinator's."""

    #: Requests computed at the same time at most.
    rows: int = Field(128, ge=1, le=MOST_ROWS)
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


class AutoscalerSettings(Settings):
    """An autoscaler's."""

    #: Consumers that every stage has at least and at most; an autoscaler takes away no stage's last one in any case.
    min_consumers: int = Field(1, ge=0, le=10_000)
    max_consumers: int = Field(4, ge=1, le=10_000)
    #: Of single stages instead: by stage, least and most.
    limits: Annotated[dict[int, tuple[int, int]], NoDecode, BeforeValidator(parse_limits)] = Field(default_factory=dict)
    #: Over how long it is looked before something is advised, and how often.
    window_s: Seconds = 10.0
    look_s: Seconds = 5.0
    #: How often in a row the same must be advised.
    confirm: int = Field(3, ge=1, le=100)
    #: How long a stage is left alone after a change, from when the consumer has come or gone.
    cooldown_s: Seconds = 60.0
    #: How long a consumer may take to come (it reads its weights) or to go (it drains).
    patience_s: Seconds = 900.0
    #: How long actors may take to answer a survey.
    answer_s: Seconds = 0.5
    #: Start and stop instances of mqinfer-worker@.service on this host.
    systemd: bool = False
    #: Commands that start and stop a consumer: {stage}, {n}, {instance} (STAGE-N) and {host} are filled in.
    up: str = ""
    down: str = ""
    #: Where `up` may start one.
    hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)] = ()
    #: How long a command may take.
    command_timeout_s: Seconds = 60.0
    #: Say what would be done and do nothing.
    dry_run: bool = False


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
