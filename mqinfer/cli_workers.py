"""The command line for who lends devices: `mqinfer pause`, `mqinfer resume`. Flags in, `pause_command` called.

As in cli.py, what a command needs is imported when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from mqinfer import flags
from mqinfer.launch import operator, run
from mqinfer.running import unless_stopped

if TYPE_CHECKING:
    from mqinfer.settings import Settings


def add_to(app: typer.Typer) -> None:
    """Make them commands of the app."""
    app.command()(pause)
    app.command()(resume)


def pause(
    target: flags.Target, pipeline: flags.Pipeline = None, broker: flags.Broker = None, config: flags.Config = None
) -> None:
    """Have workers give their devices back for a while.

    A worker that is paused takes nothing new, goes on for two seconds with what it has, leaves the rest to others and
    frees all its memory; no request is lost. It stays there, to be called back with resume, or until its process
    is started anew. For certain hours of every day: mqinfer worker --hours. Examples:

    \b
      mqinfer pause s2-3f9a0c1d2e -p pipeline.toml    one worker, by the id that status shows
      mqinfer pause 2 -p pipeline.toml                every worker of stage 2
      mqinfer pause gpu-box-7 -p pipeline.toml        every worker on that host
      mqinfer pause all -p pipeline.toml

    Exit code 3: one of them was told and is not seen to have paused within 30 s.
    """
    _pause(operator(config, pipeline, broker), target, paused=True)


def resume(
    target: flags.Target, pipeline: flags.Pipeline = None, broker: flags.Broker = None, config: flags.Config = None
) -> None:
    """Call paused workers back to their devices.

    They load their layers again. Whose hours are over works until they are over the next time. Example:

    \b
      mqinfer resume gpu-box-7 -p pipeline.toml
    """
    _pause(operator(config, pipeline, broker), target, paused=False)


def _pause(settings: Settings, target: str, *, paused: bool) -> None:
    from mqinfer import pause_command

    run(lambda stop: unless_stopped(stop, pause_command.pause(settings, target, paused=paused)))
