"""Scaling a real pipeline: actors around fake engines over RabbitMQ, a consumer started by a command template."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes import make_plan
from fleet import PATIENCE_S, Fleet, until

from mqinfer import commands, observe, operate, survey
from mqinfer import plan as plans
from mqinfer.messages import Request
from mqinfer.producer import Producer
from mqinfer.queues import Topology, new_id
from mqinfer.settings import AutoscalerSettings, load
from mqinfer.survey import Survey
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

pytestmark = pytest.mark.broker

#: What stage 1 takes for a position: far more than all that surrounds it, so that it is the bound one on any machine.
SLOW_S = 0.02
CONSUMER = Path(__file__).parents[1] / "fake_consumer.py"
QUICK: Mapping[str, Any] = {"window_s": 4, "look_s": 1, "confirm": 2, "cooldown_s": 600, "max_consumers": 2}


@pytest.fixture
async def fleet(amqp_url: str) -> AsyncIterator[Fleet]:
    """Two stages, the second one slow, at work on more than a test waits for."""
    fleet = Fleet(amqp_url, make_plan(new_id("scale")))
    fleet.worker(0)
    fleet.worker(1, seconds_per_position=SLOW_S)
    fleet.coordinator(rows=16, step_timeout_s=120.0)
    transport = await open_transport(amqp_url)
    producer = Producer(transport, Topology(fleet.plan.name), new_id("job"))
    await producer.open()
    await producer.submit(
        [
            Request(id=f"{producer.job}.{i}", job=producer.job, plan=fleet.plan.digest, prompt=(5, 6, 7), max_tokens=20)
            for i in range(1000)
        ]
    )
    yield fleet
    await fleet.close()
    await producer.forget()
    await transport.close()


@dataclass
class Told:
    """What is emitted of scaling."""

    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def of(self, event: str) -> list[Mapping[str, Any]]:
        return [fields for name, fields in self.events if name == event]


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    forget = observe.add_sink(lambda event, fields: told.events.append((event, fields)))
    yield told
    forget()


@pytest.fixture
def templates(fleet: Fleet, tmp_path: Path) -> Iterator[Mapping[str, str]]:
    """Commands that start and stop a consumer; what they started is gone afterwards."""
    plans.write(fleet.plan, tmp_path / "pipeline.toml")
    where = shlex.join([str(tmp_path), str(tmp_path / "pipeline.toml"), fleet.url])
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(CONSUMER))} %s {where} {{stage}} {{instance}} {SLOW_S}"
    yield {"up": command % "up", "down": command % "down"}
    for number in started(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number.read_text()), signal.SIGKILL)


def started(folder: Path) -> Iterator[Path]:
    """Of each consumer that a command started: the file with its process's number."""
    return folder.glob("*.pid")


@contextlib.asynccontextmanager
async def autoscaling(fleet: Fleet, folder: Path, **settings: Any) -> AsyncIterator[None]:
    """The command runs beside the test."""
    given = {**QUICK, "broker": fleet.url, "pipeline": folder / "pipeline.toml", **settings}
    stop = asyncio.Event()
    running = asyncio.ensure_future(commands.autoscale(load(AutoscalerSettings, **given), stop=stop))
    yield
    stop.set()
    assert await asyncio.wait_for(running, PATIENCE_S) == 0


async def rate(transport: Transport, fleet: Fleet) -> float:
    """Rows per second of the slow stage, over some of its forwards."""

    def forwards(found: Survey) -> float:
        return sum(report.values.get("forwards", 0.0) for report in found.workers(1))

    earlier = later = await survey.take(transport, fleet.plan)
    async with asyncio.timeout(PATIENCE_S):
        while forwards(later) < forwards(earlier) + 30:
            later = await survey.take(transport, fleet.plan)
    return later.rates(earlier, 1).rows_per_s


async def test_the_hot_stage_gets_a_consumer_by_a_command_and_the_throughput_rises(
    fleet: Fleet, templates: Mapping[str, str], told: Told, tmp_path: Path
) -> None:
    transport = await open_transport(fleet.url)
    before = await rate(transport, fleet)
    async with autoscaling(fleet, tmp_path, **templates):
        await until(lambda: bool(told.of(observe.SCALE_SETTLED)))
    (acted,) = told.of(observe.SCALE_ACTED)
    assert (acted["change"], acted["stage"], acted["instance"]) == ("up", 1, "1-auto1")
    (decision,) = [fields for fields in told.of(observe.SCALE_DECIDED) if fields["acts"]]
    assert (decision["why"], decision["consumers"]) == ("bound", [1, 1])
    async with asyncio.timeout(PATIENCE_S):
        while await rate(transport, fleet) < 1.3 * before:
            pass
    found = await survey.take(transport, fleet.plan)
    assert {report.facts["instance"] for report in found.workers(1)} == {"", "1-auto1"}
    await transport.close()


async def test_a_dry_run_decides_and_starts_nothing(
    fleet: Fleet, templates: Mapping[str, str], told: Told, tmp_path: Path
) -> None:
    async with autoscaling(fleet, tmp_path, dry_run=True, **templates):
        await until(lambda: any(fields["acts"] for fields in told.of(observe.SCALE_DECIDED)))
    assert not told.of(observe.SCALE_ACTED)
    assert list(started(tmp_path)) == []


async def test_a_failing_command_is_told_and_the_autoscaler_goes_on(
    fleet: Fleet, templates: Mapping[str, str], told: Told, tmp_path: Path
) -> None:
    broken = f"{shlex.quote(sys.executable)} -c 'import sys; sys.exit(\"no unit {{instance}}\")'"
    async with autoscaling(fleet, tmp_path, up=broken.replace("{{", "{").replace("}}", "}"), down="true"):
        await until(lambda: bool(told.of(observe.SCALE_FAILED)))
        decided = len(told.of(observe.SCALE_DECIDED))
        await until(lambda: len(told.of(observe.SCALE_DECIDED)) > decided)
    failed = told.of(observe.SCALE_FAILED)[0]
    assert failed["error"].endswith("ended with 1: no unit 1-auto1")
    assert failed["retry_s"] == 15


async def test_advice_is_printed_for_people_and_for_machines(
    fleet: Fleet, templates: Mapping[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load(AutoscalerSettings, broker=fleet.url, pipeline=tmp_path / "pipeline.toml", window_s="4s")
    assert await operate.advise(settings, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["change"], found["stage"], found["why"], found["consumers"]) == ("up", 1, "bound", [1, 1])
    assert found["words"].startswith("Stage 1 is bound: it has 1 consumer that computed ")
    assert await operate.advise(settings, as_json=False) == 0
    assert "Stage 1 is bound" in capsys.readouterr().out


async def test_where_nobody_answers_that_is_said(
    amqp_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans.write(make_plan(new_id("nobody")), tmp_path / "pipeline.toml")
    settings = load(AutoscalerSettings, broker=amqp_url, pipeline=tmp_path / "pipeline.toml", window_s=0.1)
    assert await operate.advise(settings, as_json=False) == 0
    assert "no worker and no coordinator of nobody-" in capsys.readouterr().out
