"""The command line for who looks after queues: `mqinfer queues …`, `mqinfer dead …`. Flags in, `operate` called.

As in cli.py, what a command needs is imported when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from mqinfer import flags
from mqinfer.errors import SettingsError
from mqinfer.launch import operator, run
from mqinfer.running import finish, unless_stopped

if TYPE_CHECKING:
    from mqinfer.settings import Settings

queues_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Declare, purge or delete the queues of a pipeline; its users."
)
dead_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at what nobody could use: list, requeue or purge it."
)


@queues_app.command("declare")
def queues_declare(pipeline: flags.Pipeline = None, broker: flags.Broker = None, config: flags.Config = None) -> None:
    """Make the queues of a pipeline.

    Actors do it too; this is for checking what the broker allows. Example:

    \b
      mqinfer queues declare -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    from mqinfer import operate

    settings = operator(config, pipeline, broker)
    run(lambda stop: unless_stopped(stop, operate.queues_declare(settings)))


@queues_app.command("purge")
def queues_purge(
    pipeline: flags.Pipeline = None, broker: flags.Broker = None, config: flags.Config = None, yes: flags.Yes = False
) -> None:
    """Throw away what waits in a pipeline's queues.

    That is every request nobody has begun with, and every dead letter. Results of jobs stay. Example:

    \b
      mqinfer queues purge -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    _empty(operator(config, pipeline, broker), delete=False, yes=yes)


@queues_app.command("delete")
def queues_delete(
    pipeline: flags.Pipeline = None, broker: flags.Broker = None, config: flags.Config = None, yes: flags.Yes = False
) -> None:
    """Delete a pipeline's queues with what is in them.

    Results of jobs stay. Actors that run make the queues anew. Example:

    \b
      mqinfer queues delete -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    _empty(operator(config, pipeline, broker), delete=True, yes=yes)


@queues_app.command("permissions")
def queues_permissions(
    pipeline: flags.Pipeline = None,
    vhost: flags.Vhost = "/",
    as_json: flags.Json = False,
    config: flags.Config = None,
) -> None:
    """Print the broker's users for a pipeline, each with the least rights.

    One for the workers of each stage, for coordinators, for batch jobs, for its operator. Nothing is changed: it is a
    shell script of rabbitmqctl, which asks for the passwords; or, with --json, what `rabbitmqctl import_definitions`
    reads, for users that are there. Then the operator makes the queues, because workers may not. Example:

    \b
      mqinfer queues permissions -p pipeline.toml > users.sh && sudo sh users.sh
      mqinfer queues declare -p pipeline.toml --broker amqp://NAME-operator:password@host/
    """
    from mqinfer import operate

    operate.queues_permissions(operator(config, pipeline, None), vhost, as_json=as_json)


def _empty(settings: Settings, *, delete: bool, yes: bool) -> None:
    from mqinfer import operate

    found = finish(lambda stop: unless_stopped(stop, operate.queues_contents(settings)))
    losing = {name: state for name, state in found.items() if state.ready or (delete and state.consumers)}
    for name, state in losing.items():
        used = ", and what its consumers hold" if delete and state.consumers else ""
        typer.echo(f"{name}: {state.ready} messages{used}", err=True)
    if losing and not yes:
        # Not inside an event loop: it would keep Ctrl-C from the prompt.
        typer.confirm("Lose them?", abort=True, err=True)
    if not found:
        typer.echo("there are no such queues", err=True)
    run(lambda stop: operate.queues_empty(settings, list(found), delete=delete))


@dead_app.command("list")
def dead_list(
    pipeline: flags.Pipeline = None,
    name: flags.PipelineName = None,
    limit: flags.Limit = 100,
    broker: flags.Broker = None,
    config: flags.Config = None,
) -> None:
    """List the dead letters, the oldest first.

    They are bodies that nobody could use; the reason says why. They stay where they are. Example:

    \b
      mqinfer dead list -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    from mqinfer import operate

    settings = operator(config, pipeline, broker)
    run(lambda stop: unless_stopped(stop, operate.dead_list(settings, name, limit)))


@dead_app.command("show")
def dead_show(
    number: flags.Number,
    pipeline: flags.Pipeline = None,
    name: flags.PipelineName = None,
    broker: flags.Broker = None,
    config: flags.Config = None,
) -> None:
    """Show what is known of one dead letter.

    Its reason, its queue, kind, ids and counts, and the first bytes of its prefix; never a text or a token. Example:

    \b
      mqinfer dead show 3 -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    from mqinfer import operate

    settings = operator(config, pipeline, broker)
    run(lambda stop: unless_stopped(stop, operate.dead_show(settings, name, number)))


@dead_app.command("requeue")
def dead_requeue(
    number: flags.NumberOrNone = None,
    all_: flags.All = False,
    pipeline: flags.Pipeline = None,
    name: flags.PipelineName = None,
    limit: flags.Limit = 100,
    broker: flags.Broker = None,
    config: flags.Config = None,
) -> None:
    """Send dead letters back to where they came from.

    When what was wrong is mended. A letter goes once it is there, confirmed; one that has nowhere to go stays dead.
    Exit codes:

    \b
      0  all of them went back
      2  there is no such letter
      3  some stay dead, and it was said why

    Examples:

    \b
      mqinfer dead requeue 3 -p pipeline.toml --broker amqp://guest:guest@localhost/
      mqinfer dead requeue --all -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    from mqinfer import operate

    _one_or_all(number, all_)
    settings = operator(config, pipeline, broker)
    run(lambda stop: unless_stopped(stop, operate.dead_requeue(settings, name, number, limit)))


@dead_app.command("purge")
def dead_purge(
    number: flags.NumberOrNone = None,
    all_: flags.All = False,
    pipeline: flags.Pipeline = None,
    name: flags.PipelineName = None,
    broker: flags.Broker = None,
    config: flags.Config = None,
    yes: flags.Yes = False,
) -> None:
    """Throw dead letters away.

    A row of a step that is dead was computed again elsewhere; a dead request or result was not. Examples:

    \b
      mqinfer dead purge 3 -p pipeline.toml --broker amqp://guest:guest@localhost/
      mqinfer dead purge --all --yes -p pipeline.toml --broker amqp://guest:guest@localhost/
    """
    from mqinfer import operate

    _one_or_all(number, all_)
    settings = operator(config, pipeline, broker)
    found = finish(lambda stop: unless_stopped(stop, operate.dead_count(settings, name)))
    if found and not yes:
        typer.confirm(
            "Lose dead letter " + str(number) + "?" if number else f"Lose {found} dead letters?", abort=True, err=True
        )
    run(lambda stop: unless_stopped(stop, operate.dead_purge(settings, name, number)))


def _one_or_all(number: int | None, all_: bool) -> None:
    if (number is None) != all_:
        raise SettingsError("say which: either a number of `mqinfer dead list` or --all")
