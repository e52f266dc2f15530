"""How a consumer is started or stopped: by a command of systemd's or of the operator's own. When is not known here.

A third way (such as telling a spare worker over the broker) is another class with the two methods of `Actuator`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import socket
import string
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from mqinfer.errors import MqinferError, SettingsError

#: What of a failed command's output is told.
TAIL_BYTES = 500
#: What may stand in a template.
FIELDS = ("stage", "n", "instance", "host")
#: Hosts and instances come from reports: nothing that a shell at the other end, or an option parser, could take amiss.
_PLAIN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,199})?", re.ASCII)

SYSTEMD_UP = "systemctl start --no-block --no-ask-password mqinfer-worker@{instance}"
SYSTEMD_DOWN = "systemctl stop --no-block --no-ask-password mqinfer-worker@{instance}"


class ActionFailed(MqinferError):
    """A consumer could not be started or stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A stage's consumer, as whoever starts and stops it calls it."""

    stage: int
    #: What tells it from the stage's others: the instance is STAGE-N.
    n: str
    #: Where it runs or is to run; "": there is no choice.
    host: str = ""

    @property
    def instance(self) -> str:
        """As in mqinfer-worker@INSTANCE, and what it says of itself in its reports."""
        return f"{self.stage}-{self.n}" if self.n else str(self.stage)


class Actuator(Protocol):
    """A way to change the consumers of a stage."""

    @property
    def hosts(self) -> Sequence[str]:
        """Where consumers can be started, and the only ones where they can be stopped; none: wherever there are any."""

    async def start(self, consumer: Consumer) -> None:
        """Have it started; it may serve much later. Raises: ActionFailed."""

    async def stop(self, consumer: Consumer) -> None:
        """Have it drain and end; it may go much later. Raises: ActionFailed."""


class Commands:
    """By a command each, made from a template, run without a shell."""

    def __init__(self, up: str, down: str, *, hosts: Sequence[str] = (), timeout_s: float = 60.0) -> None:
        """Raises: SettingsError where a template is none."""
        self.hosts = tuple(hosts)
        self._timeout_s = timeout_s
        self._up, self._down = _template("up", up), _template("down", down)
        if not self.hosts and any("{host}" in word for word in self._up):
            raise SettingsError("the command for --up has {host}: say with --host which ones there are")

    async def start(self, consumer: Consumer) -> None:
        """See Actuator."""
        await self._run(self._up, consumer)

    async def stop(self, consumer: Consumer) -> None:
        """See Actuator."""
        await self._run(self._down, consumer)

    async def _run(self, template: Sequence[str], consumer: Consumer) -> None:
        command = _filled(template, consumer)
        # Into a file, not a pipe: a worker that the command leaves behind may hold its end open for days.
        with tempfile.TemporaryFile() as output:
            code = await self._ended(command, output)
            if code:
                raise ActionFailed(f"`{shlex.join(command)}` ended with {code}: {_tail(output)}")

    async def _ended(self, command: Sequence[str], output: IO[bytes]) -> int:
        """Its exit code. It is killed, with all of its session, when it takes too long or we are told to end."""
        try:
            running = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise ActionFailed(f"`{shlex.join(command)}` can't be run: {error.strerror}") from error
        try:
            return await asyncio.wait_for(running.wait(), self._timeout_s)
        except TimeoutError:
            raise ActionFailed(f"`{shlex.join(command)}` took more than {self._timeout_s:g} s") from None
        finally:
            if running.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)
                await running.wait()


class Systemd(Commands):
    """Instances of deploy/mqinfer-worker@.service on this host."""

    def __init__(self, *, timeout_s: float = 60.0) -> None:
        super().__init__(SYSTEMD_UP, SYSTEMD_DOWN, hosts=[socket.gethostname()], timeout_s=timeout_s)


def _template(name: str, command: str) -> list[str]:
    try:
        words = shlex.split(command)
        fields = {field for word in words for _, field, _, _ in string.Formatter().parse(word) if field is not None}
    except ValueError as error:
        raise SettingsError(f"the command for --{name} can't be read: {error}") from error
    if not words:
        raise SettingsError(f"the command for --{name} is empty")
    if strange := fields - set(FIELDS):
        raise SettingsError(
            f"the command for --{name} has {{{min(strange)}}}; there are " + ", ".join(f"{{{each}}}" for each in FIELDS)
        )
    return words


def _filled(template: Sequence[str], consumer: Consumer) -> list[str]:
    for value in (consumer.instance, consumer.host):
        if value and not _PLAIN.fullmatch(value):
            raise ActionFailed(f"{value!r} is no name to be put into a command")
    values = {"stage": consumer.stage, "n": consumer.n, "instance": consumer.instance, "host": consumer.host}
    return [word.format_map(values) for word in template]


def _tail(output: IO[bytes]) -> str:
    length = output.seek(0, os.SEEK_END)
    output.seek(max(length - TAIL_BYTES, 0))
    return " ".join(output.read().decode(errors="replace").split()) or "it said nothing"
