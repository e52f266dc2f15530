"""The autoscaler: looks at a pipeline again and again, and has consumers of single stages started and stopped.

What is advised is scaling.py's, how it is done an actuator's. It remembers nothing that matters: which consumers exist
it is told by the survey, and which of them it started by their names, so that it may be killed at any time.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mqinfer import survey
from mqinfer.actuators import ActionFailed, Actuator, Consumer
from mqinfer.errors import SettingsError
from mqinfer.link import Connect, keep_linked, now_s
from mqinfer.messages import Report
from mqinfer.observe import ACTOR_READY, SCALE_ACTED, SCALE_DECIDED, SCALE_FAILED, SCALE_SETTLED, emit
from mqinfer.plan import Plan
from mqinfer.scaling import Advice, Change, Hysteresis, Limits, Window, advise
from mqinfer.settings import AutoscalerSettings
from mqinfer.survey import Survey
from mqinfer.transports.base import Transport

#: After a command that failed it is tried again so much later, twice as late each time, up to the most.
RETRY_FIRST_S, RETRY_MOST_S = 15.0, 900.0
#: What the consumers are called that an autoscaler starts: STAGE-auto1, STAGE-auto2 and so on.
OWN = "auto"
NOBODY_TO_STOP = "only one consumer there takes new work, or none says a name that it could be stopped by"


@dataclass(frozen=True, slots=True)
class Awaited:
    """A consumer that was told to come or go and has not yet."""

    consumer: Consumer
    change: Change
    #: The stage's consumers when it was told.
    consumers: int
    since_s: float


class Autoscaler:
    """One autoscaler process; one for a pipeline, or two would take each other's decisions again."""

    def __init__(self, plan: Plan, settings: AutoscalerSettings, connect: Connect, actuator: Actuator | None) -> None:
        """Without an actuator it says what it would do, and does nothing."""
        self._plan = plan
        self._settings = settings
        self._connect = connect
        self._actuator = actuator
        self._limits = stage_limits(settings, len(plan.stages))
        self._hysteresis = Hysteresis(confirm=settings.confirm, cooldown_s=settings.cooldown_s)
        self._surveys: deque[tuple[float, Survey]] = deque()
        self._awaited: dict[int, Awaited] = {}
        self._failures: dict[int, int] = {}
        #: Instances that were started and never seen: another name is tried.
        self._lost: set[str] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Look and act until `stop` is set; a command under way is waited for, what was started goes on.

        Raises: Refused at the first link.
        """

        async def session(transport: Transport) -> None:
            self._surveys.clear()
            emit(ACTOR_READY, actor="autoscaler")
            while not stop.is_set():
                found = await survey.take(transport, self._plan, wait_s=self._settings.answer_s)
                await self.look(found, now_s())
                await _pause(stop, self._settings.look_s)

        await keep_linked("autoscaler", self._connect, session, stop)

    async def look(self, found: Survey, at_s: float) -> None:
        """One more survey: what it says together with those before, and what is to be done is done."""
        self._see_who_came_and_went(found, at_s)
        self._surveys.append((at_s, found))
        window_s = self._settings.window_s
        while len(self._surveys) > 1 and at_s - self._surveys[1][0] >= window_s:
            self._surveys.popleft()
        if at_s - self._surveys[0][0] < window_s:
            return
        window = survey.window([each for _, each in self._surveys])
        advice = await asyncio.to_thread(advise, window, self._limits)
        acts = self._hysteresis.lasting(advice, at_s)
        self._tell(advice, window, acts=acts)
        if acts:
            await self._act(advice, found, at_s)

    def _tell(self, advice: Advice, window: Window, *, acts: bool) -> None:
        emit(
            SCALE_DECIDED,
            change=advice.change.value,
            stage=advice.stage,
            why=advice.why.value,
            gain=round(advice.gain, 4),
            acts=acts,
            dry_run=self._actuator is None,
            rows_per_s=round(advice.rows_per_s, 2),
            consumers=[stage.consumers for stage in window.stages],
            ready=[round(stage.ready, 1) for stage in window.stages],
            unacknowledged=[round(stage.unacknowledged, 1) for stage in window.stages],
            busy=[round(busy, 3) for busy in advice.busy],
            gains={stage: round(gain, 4) for stage, gain in advice.gains.items()},
            requests=window.requests,
            rows=round(window.rows, 1),
            microbatches=round(window.microbatches, 1),
        )

    # -- acting --------------------------------------------------------------------------------

    async def _act(self, advice: Advice, found: Survey, at_s: float) -> None:
        self._surveys.clear()  # what is seen from here on is another pipeline
        if self._actuator is None or advice.stage is None:
            return
        stage, up = advice.stage, advice.change is Change.UP
        hosts = self._actuator.hosts
        consumer = to_start(found, stage, hosts, self._lost) if up else to_stop(found, stage, hosts)
        if consumer is None:
            self._failed(stage, advice.change, None, NOBODY_TO_STOP, at_s)
            return
        began_s = now_s()
        try:
            await (self._actuator.start(consumer) if up else self._actuator.stop(consumer))
        except ActionFailed as error:
            self._failed(stage, advice.change, consumer, str(error), at_s)
            return
        emit(SCALE_ACTED, **_named(consumer, advice.change), seconds=now_s() - began_s)
        self._awaited[stage] = Awaited(consumer, advice.change, _count(found, stage), at_s)

    def _failed(self, stage: int, change: Change, consumer: Consumer | None, error: str, at_s: float) -> None:
        self._failures[stage] = self._failures.get(stage, 0) + 1
        pause_s = min(RETRY_FIRST_S * 2 ** (self._failures[stage] - 1), RETRY_MOST_S)
        self._hysteresis.hold(stage, at_s + pause_s)
        named = _named(consumer, change) if consumer else {"stage": stage, "change": change.value}
        emit(SCALE_FAILED, **named, error=error, retry_s=pause_s)

    def _see_who_came_and_went(self, found: Survey, at_s: float) -> None:
        """A stage that waits for one to come or go is left alone, and for a cool-down more."""
        if found.blocked:  # nobody could be asked
            return
        for stage, awaited in list(self._awaited.items()):
            waited_s = at_s - awaited.since_s
            if _settled(awaited, found):
                emit(SCALE_SETTLED, **_named(awaited.consumer, awaited.change), seconds=waited_s)
                self._failures.pop(stage, None)
            elif waited_s < self._settings.patience_s:
                self._hysteresis.changed(stage, at_s)
                continue
            else:
                if awaited.change is Change.UP:
                    self._lost.add(awaited.consumer.instance)
                self._failed(
                    stage, awaited.change, awaited.consumer, f"nothing has come of it in {waited_s:.0f} s", at_s
                )
            del self._awaited[stage]
            self._surveys.clear()


def stage_limits(settings: AutoscalerSettings, stages: int) -> dict[int, Limits]:
    """By stage. Raises: SettingsError where they contradict each other or name a stage that is not there."""
    of = dict.fromkeys(range(stages), (settings.min_consumers, settings.max_consumers)) | settings.limits
    for stage, (least, most) in of.items():
        if least > most:
            raise SettingsError(f"stage {stage} can't have {least} consumers at least and {most} at most")
        if stage >= stages:
            raise SettingsError(f"the plan has stages 0 to {stages - 1}, not {stage}")
    return {stage: Limits(least, most) for stage, (least, most) in of.items()}


def to_start(found: Survey, stage: int, hosts: Sequence[str], lost: set[str]) -> Consumer:
    """The consumer to start: of the lowest number that nobody has, on the host with the fewest workers."""
    taken = {instance_of(report) for report in found.reports.values()} | lost
    number = 1
    while f"{stage}-{OWN}{number}" in taken:
        number += 1
    workers = [report.host for report in found.reports.values() if report.role == "worker"]
    host = min(hosts, key=workers.count, default="")
    return Consumer(stage=stage, n=f"{OWN}{number}", host=host)


def to_stop(found: Survey, stage: int, hosts: Sequence[str]) -> Consumer | None:
    """The consumer to stop: one that an autoscaler started, the newest; else one that says a name; else None.

    None, too, where only one takes new work: the others leave already, though they still answer.
    """
    queue = found.stages[stage]
    if queue is not None and queue.consumers < 2:
        return None
    there = [
        Consumer(stage=stage, n=named[1] or "", host=report.host)
        for report in found.workers(stage)
        if (named := re.fullmatch(rf"{stage}(?:-(.+))?", instance_of(report))) and (not hosts or report.host in hosts)
    ]
    return max(there, key=_own_number, default=None)


def _own_number(consumer: Consumer) -> int:
    """Which of an autoscaler's it is; 0: somebody else's."""
    own = re.fullmatch(rf"{OWN}(\d{{1,9}})", consumer.n, re.ASCII)
    return int(own[1]) if own else 0


def instance_of(report: Report) -> str:
    """The name that the worker was started under; "" where it says none."""
    return report.facts.get("instance", "")


def _settled(awaited: Awaited, found: Survey) -> bool:
    there = awaited.consumer.instance in {instance_of(report) for report in found.workers(awaited.consumer.stage)}
    more = _count(found, awaited.consumer.stage) - awaited.consumers
    return there or more > 0 if awaited.change is Change.UP else not there or more < 0


def _count(found: Survey, stage: int) -> int:
    return len(found.workers(stage))


def _named(consumer: Consumer, change: Change) -> dict[str, object]:
    return {
        "change": change.value,
        "stage": consumer.stage,
        "instance": consumer.instance,
        "host": consumer.host,
    }


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
