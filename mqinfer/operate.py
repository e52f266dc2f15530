"""What the commands of who looks after a pipeline do: its status, its queues, its dead letters.

One link, a few questions, a table or a sentence out. What actors do is in commands.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from mqinfer import console, survey
from mqinfer.commands import ALL_ANSWERED, SOME_ERRORS, linked, read_plan
from mqinfer.dead_letters import Letter, Taken, send_back, taken
from mqinfer.errors import SettingsError, Unroutable
from mqinfer.messages import Pause, Report
from mqinfer.plan import Plan
from mqinfer.queues import Topology
from mqinfer.settings import Settings
from mqinfer.survey import Survey
from mqinfer.transports.base import QueueState, Transport
from mqinfer.wire import encode

#: Between the two looks from which `status` takes its rates.
STATUS_S = 1.0
#: How long `pause` waits until those it told have left their devices: 5 s, and a start of Python.
PAUSED_S = 30.0


async def status(settings: Settings) -> int:
    """Print the table. The exit code."""
    plan = read_plan(settings)
    async with linked(settings, "status") as transport:
        earlier = await survey.take(transport, plan)
        await asyncio.sleep(STATUS_S)
        later = await survey.take(transport, plan)
    console.show_status(plan, earlier, later)
    return 0


async def pause(settings: Settings, target: str, *, paused: bool) -> int:
    """Have workers leave their devices, or return to them. The exit code. Raises: SettingsError where none matches."""
    plan = read_plan(settings)
    async with linked(settings, "pause") as transport:
        seen = await survey.take(transport, plan)
        meant = [report for report in seen.reports.values() if _is_meant(report, target)]
        told = [report for report in meant if report.role == ("worker" if paused else "paused")]
        if not meant:
            raise SettingsError(f"no worker is {target!r}: {_workers_there(seen)}")
        for report in told:
            with contextlib.suppress(Unroutable):  # it has just ended
                await transport.publish(
                    Topology(plan.name).worker(report.id).name, encode(Pause(plan=plan.digest, paused=paused))
                )
        missing = await _until_seen(transport, plan, told, role="paused") if paused else []
    for report in told:
        done = "does not answer yet" if report in missing else "paused" if paused else "loads its layers again"
        console.out.print(f"{report.id} (stage {report.stage} on {report.host}): {done}", markup=False, soft_wrap=True)
    if not told:
        console.say(f"all of {target!r} are {'paused' if paused else 'at work'} already")
    return SOME_ERRORS if missing else ALL_ANSWERED


def _is_meant(report: Report, target: str) -> bool:
    """A worker's id, a stage's number, a host's name, or all."""
    return report.role != "coordinator" and target in (report.id, str(report.stage), report.host, "all")


def _workers_there(seen: Survey) -> str:
    there = sorted(f"{report.id} on {report.host}" for report in seen.reports.values() if report.role != "coordinator")
    return f"there are {', '.join(there)}" if there else "no worker answers"


async def _until_seen(transport: Transport, plan: Plan, told: Sequence[Report], *, role: str) -> list[Report]:
    """Wait until their processes answer in that role; those that don't within PAUSED_S."""

    def process(report: Report) -> tuple[str, str]:
        return report.host, report.facts.get("process", "")

    missing = list(told)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PAUSED_S):
            while missing:
                seen = await survey.take(transport, plan)
                there = {process(report) for report in seen.reports.values() if report.role == role}
                missing = [report for report in missing if process(report) not in there]
    return missing


async def queues_declare(settings: Settings) -> int:
    """Make the queues that outlive every process. The exit code."""
    plan = read_plan(settings)
    async with linked(settings, "queues") as transport:
        for spec in Topology(plan.name).shared(len(plan.stages)):
            await transport.declare(spec)
            console.out.print(spec.name)
    return 0


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
