"""From a command line's flags to a command that runs: its settings are read, logs set up, the exit code handed on.

What is imported here before a command runs is there for `--help` too: keep it little.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from mqinfer.running import INTERRUPTED, Command, finish

if TYPE_CHECKING:
    from mqinfer.settings import S, Settings


def operator(config: Path | None, pipeline: Path | None, broker: str | None) -> Settings:
    """The settings of somebody who looks after a pipeline. Raises: SettingsError."""
    from mqinfer.settings import Settings

    return load_settings(Settings, config, pipeline=pipeline, broker=broker)


def load_settings(kind: type[S], config: Path | None, **given: Any) -> S:
    """The settings of a command; its logs begin. Raises: SettingsError."""
    from mqinfer.observe import log_to_stderr
    from mqinfer.settings import load

    settings = load(kind, file=config, **given)
    log_to_stderr(level=settings.log_level, as_json=settings.log_json)
    return settings


def run(command: Command[int], *, with_torch: bool = False, stopped: int = INTERRUPTED) -> NoReturn:
    """Run to the end and exit with what the command returns, or with `stopped` if it ended before it had begun."""
    if with_torch:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # cuda:1 is GPU 1 of nvidia-smi, and of --yield-gpu
    else:
        hide_torch()
    raise typer.Exit(finish(command, stopped=stopped))


def hide_torch() -> None:
    """This command computes nothing: from here on there is no torch."""
    from mqinfer.tokenizer import hide_torch

    hide_torch()
