"""What `mqinfer pause` and `mqinfer resume` do: tell workers, and see what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from mqinfer import console, survey
from mqinfer.commands import ALL_ANSWERED, SOME_ERRORS, linked, read_plan
from mqinfer.errors import SettingsError, Unroutable
from mqinfer.messages import Pause, Report
from mqinfer.plan import Plan
from mqinfer.queues import Topology
from mqinfer.settings import Settings
from mqinfer.survey import Survey
from mqinfer.transports.base import Transport
from mqinfer.wire import encode

#: How long it is waited until those who were told have left their devices: 5 s, and a start of Python.
PAUSED_S = 30.0
#: How long answers are waited for: a worker reads between two forwards.
LISTEN_S = 3.0


async def pause(settings: Settings, target: str, *, paused: bool) -> int:
    """Have workers leave their devices, or return to them. The exit code. Raises: SettingsError where none matches."""
    plan = read_plan(settings)
    async with linked(settings, "pause") as transport:
        seen = await survey.take(transport, plan, wait_s=LISTEN_S)
        meant = [report for report in seen.reports.values() if _is_meant(report, target)]
        told = [report for report in meant if report.role == "paused" or (paused and report.role == "worker")]
        if not meant:
            raise SettingsError(f"no worker is {target!r}: {_workers_there(seen)}")
        for report in told:
            with contextlib.suppress(Unroutable):  # it has just ended
                await transport.publish(
                    Topology(plan.name).worker(report.id).name, encode(Pause(plan=plan.digest, paused=paused))
                )
        missing = await _until_paused(transport, plan, told) if paused else []
    for report in told:
        done = "does not answer yet" if report in missing else "paused" if paused else "loads its layers again"
        console.out.print(f"{_named(report)}: {done}", markup=False, soft_wrap=True)
    loading = [report for report in meant if report.role == "joining"] if paused else []
    for report in loading:
        console.say(f"{_named(report)}: loads its layers; ask it again when it serves")
    if not told and not loading:
        console.say(f"all of {target!r} are at work already")
    return SOME_ERRORS if missing or loading else ALL_ANSWERED


def _is_meant(report: Report, target: str) -> bool:
    """A worker's id, a stage's number, a host's name, or all."""
    return report.role != "coordinator" and target in (report.id, str(report.stage), report.host, "all")


def _named(report: Report) -> str:
    return f"{report.id} (stage {report.stage} on {report.host})"


def _workers_there(seen: Survey) -> str:
    there = sorted(f"{report.id} on {report.host}" for report in seen.reports.values() if report.role != "coordinator")
    return f"there are {', '.join(there)}" if there else "no worker answers"


async def _until_paused(transport: Transport, plan: Plan, told: Sequence[Report]) -> list[Report]:
    """Wait until their processes answer as paused; those that don't within PAUSED_S."""

    def process(report: Report) -> tuple[str, str]:
        return report.host, report.facts.get("process", "")

    missing = list(told)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PAUSED_S):
            while missing:
                seen = await survey.take(transport, plan)
                there = {process(report) for report in seen.in_role("paused")}
                missing = [report for report in missing if process(report) not in there]
    return missing
