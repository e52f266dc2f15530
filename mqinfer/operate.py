"""What the commands of who looks after a pipeline do: its status, its queues, its dead letters.

One link, a few questions, a table or a sentence out. What actors do is in commands.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence

from mqinfer import console, permissions, pipeline_view, scaling, survey
from mqinfer.advice_words import as_object, sentences
from mqinfer.autoscaler import stage_limits
from mqinfer.commands import ALL_ANSWERED, SOME_ERRORS, linked, read_plan
from mqinfer.dead_letters import Letter, Taken, send_back, taken
from mqinfer.errors import SettingsError, Unroutable
from mqinfer.link import now_s
from mqinfer.queues import Topology
from mqinfer.settings import AutoscalerSettings, Settings
from mqinfer.transports.base import QueueState, Transport

#: Between the two looks from which `status` takes its rates.
STATUS_S = 1.0
#: How often `advise` looks while it looks.
ADVICE_LOOK_S = 2.0


async def status(settings: Settings, *, workers: bool, as_json: bool) -> int:
    """Print the table, with the workers under each stage if asked for, or all of it for machines. The exit code."""
    plan = read_plan(settings)
    async with linked(settings, "status") as transport:
        earlier = await survey.take(transport, plan)
        await asyncio.sleep(STATUS_S)
        later = await survey.take(transport, plan)
    if as_json:
        console.out.print_json(data=pipeline_view.for_machines(plan, earlier, later), indent=2)
    else:
        pipeline_view.show(pipeline_view.status(plan, earlier, later, workers=workers))
    return 0


async def advise(settings: AutoscalerSettings, *, as_json: bool) -> int:
    """Look for a while, then print which stage should have a worker more or less. The exit code."""
    plan = read_plan(settings)
    bounds = stage_limits(settings, len(plan.stages))
    limits = {stage: bounds[stage] for stage in settings.limits}
    async with linked(settings, "advise") as transport:
        surveys = [await survey.take(transport, plan)]
        end_s = now_s() + settings.window_s
        while now_s() < end_s:
            await asyncio.sleep(min(ADVICE_LOOK_S, max(end_s - now_s(), 0)))
            surveys.append(await survey.take(transport, plan))
    window = survey.window(surveys)
    advice = await asyncio.to_thread(scaling.advise, window, limits)
    if as_json:
        console.out.print(json.dumps(as_object(advice, window)), markup=False, soft_wrap=True)
    elif not (surveys[-1].reports or window.blocked):
        console.out.print(f"no worker and no coordinator of {plan.name} answers: is this the plan that they serve?")
    else:
        console.out.print(sentences(advice, window), markup=False, soft_wrap=True)
    return 0


async def queues_declare(settings: Settings) -> int:
    """Make the queues that outlive every process, and all exchanges. The exit code."""
    plan = read_plan(settings)
    async with linked(settings, "queues") as transport:
        await declare_all(transport, Topology(plan.name), len(plan.stages))
    for spec in Topology(plan.name).shared(len(plan.stages)):
        console.out.print(spec.name)
    return 0


async def declare_all(transport: Transport, topology: Topology, stages: int) -> None:
    """Make all that actors need not be allowed to make. Raises: TransportError."""
    await transport.declare_exchange(topology.control, fanout=True)
    for exchange in topology.exchanges(stages):
        await transport.declare_exchange(exchange)
    for spec in topology.shared(stages):
        await transport.declare(spec)


def queues_permissions(settings: Settings, vhost: str, *, as_json: bool) -> None:
    """Print who may do what on the broker."""
    plan = read_plan(settings)
    users = permissions.users(plan.name, len(plan.stages))
    if as_json:
        print(json.dumps(permissions.definitions(users, vhost), indent=2))
    else:
        print(permissions.commands(users, vhost))


async def queues_contents(settings: Settings) -> dict[str, QueueState]:
    """The queues that outlive every process, as far as they exist."""
    plan = read_plan(settings)
    async with linked(settings, "queues") as transport:
        names = [spec.name for spec in Topology(plan.name).shared(len(plan.stages))]
        states = {name: await transport.inspect(name) for name in names}
    return {name: state for name, state in states.items() if state is not None}


async def queues_empty(settings: Settings, names: Sequence[str], *, delete: bool) -> int:
    """Purge or delete these queues. The exit code."""
    async with linked(settings, "queues") as transport:
        for name in names:
            with contextlib.suppress(Unroutable):  # somebody else was quicker
                lost = await (transport.delete(name) if delete else transport.purge(name))
                console.out.print(f"{name}: {'deleted' if delete else 'purged'}, {lost} messages lost")
    return 0


async def dead_list(settings: Settings, name: str | None, limit: int) -> int:
    """Print the table. The exit code."""
    topology = _topology(settings, name)
    async with linked(settings, "dead") as transport, taken(transport, topology, limit) as found:
        console.show_dead(topology.name, found.letters, found.total)
    return 0


async def dead_show(settings: Settings, name: str | None, number: int) -> int:
    """Print one letter. The exit code. Raises: SettingsError where there is none of that number."""
    topology = _topology(settings, name)
    async with linked(settings, "dead") as transport, taken(transport, topology, number) as found:
        console.show_letter(_letter(found, number))
    return 0


async def dead_requeue(settings: Settings, name: str | None, number: int | None, limit: int) -> int:
    """Send one letter back, or (None) all of the oldest `limit`. The exit code. Raises: SettingsError."""
    topology = _topology(settings, name)
    stay = 0
    async with linked(settings, "dead") as transport, taken(transport, topology, number or limit) as found:
        for letter in found.letters if number is None else [_letter(found, number)]:
            if why := await send_back(transport, topology, letter):
                stay += 1
                console.say(f"{letter.number} stays: {why}")
            else:
                await found.remove(letter)
                console.out.print(f"{letter.number} -> {letter.queue}", markup=False, soft_wrap=True)
    if number is None and found.total > len(found.letters):
        console.say(
            f"{found.total - len(found.letters)} more were not looked at: run it again, or give a higher --limit"
        )
        return SOME_ERRORS
    return SOME_ERRORS if stay else ALL_ANSWERED


async def dead_count(settings: Settings, name: str | None) -> int:
    """How many dead letters there are."""
    async with linked(settings, "dead") as transport:
        state = await transport.inspect(_topology(settings, name).dead.name)
    return 0 if state is None else state.ready


async def dead_purge(settings: Settings, name: str | None, number: int | None) -> int:
    """Remove one letter, or (None) all. The exit code. Raises: SettingsError where there is none of that number."""
    topology = _topology(settings, name)
    async with linked(settings, "dead") as transport:
        lost = 0
        if number is None:
            with contextlib.suppress(Unroutable):
                lost = await transport.purge(topology.dead.name)
        else:
            async with taken(transport, topology, number) as found:
                await found.remove(_letter(found, number))
                lost = 1
    console.out.print(f"{topology.dead.name}: {lost} messages lost", markup=False, soft_wrap=True)
    return 0


def _topology(settings: Settings, name: str | None) -> Topology:
    return Topology(read_plan(settings).name if name is None else name)


def _letter(found: Taken, number: int) -> Letter:
    if not 1 <= number <= len(found.letters):
        raise SettingsError(f"there is no dead letter {number}: there are {found.total}")
    return found.letters[number - 1]
