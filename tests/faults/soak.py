"""Faults drawn at random for a long time while jobs run one after the other, and a watch on growth.

Started by `scripts/faults --soak`. The seed decides which faults come in which order, not when: processes have
clocks of their own.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from counts import Report, count
from private_broker import PrivateBroker
from processes import demo_model
from roster import HEARTBEAT_S, Job, Roster, fault_free
from watch import Watch
from workload import SHORT, repeated

#: Before it processes load code, make their pools, and fill their keys and values: rows whose coordinator was killed
#: stay for `idle_s` (5 minutes), so only then a worker has had what it may have. Of a short soak it is a third.
WARM_UP_S = 360.0
#: Of the log of what went wrong.
LOG_CHARS = 3000
#: Exit code of a command that can't open its first link.
NO_LINK = 2
#: Between two faults.
PAUSE_S = (2.0, 8.0)


class Soak:
    """One soak: a fleet, its jobs, and what is done to both."""

    def __init__(
        self, roster: Roster, folder: Path, answers: dict[str, str], draw: random.Random, seconds: float
    ) -> None:
        self.seconds = seconds
        self.roster = roster
        self.folder = folder
        self.answers = answers
        self.draw = draw
        self.report = Report(test="soak", fault="soak")
        self.faults: Counter[str] = Counter()
        self.watch = Watch(min(WARM_UP_S, seconds / 3))
        self.asked = repeated(SHORT, 2)
        self.job = self._job()
        self.failed: list[str] = []

    def _job(self) -> Job:
        return self.roster.job(self.asked, self.folder, proxied=True)

    def run(self) -> None:
        """Until the time is over; the last job is then finished without faults."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < self.seconds:
            time.sleep(self.draw.uniform(*PAUSE_S))  # the soak's rhythm
            fault = self.draw.choice(FAULTS)
            say(f"{time.monotonic() - began_s:6.0f} s  {fault.__name__.replace('_', ' ')}")
            self.faults[fault.__name__] += 1
            fault(self)
            self.report.flowed(self.job.flows())
            self.look()
            if not self.job.actor.lives:
                self.settle()
                self.job = self._job()
        self.settle()

    def look(self) -> None:
        """Measure the processes that live long."""
        self.watch.look(self.roster.actors.values(), time.monotonic())

    def settle(self) -> None:
        """The job comes to its end; its file is compared."""
        code = self.job.actor.wait(600)
        while code == NO_LINK and "hung up" in self.job.actor.said()[-LOG_CHARS:]:  # cut while it began: as a user does
            self.rerun()
            code = self.job.actor.wait(600)
        counts = count(self.job.output, self.asked, self.answers, frozenset())
        self.report.count(counts)
        if code != 0 or not counts.good:
            self.failed.append(f"a job ended with {code}: {counts}\n{self.job.actor.said()[-LOG_CHARS:]}")

    def rerun(self) -> None:
        """The job's command once more."""
        self.roster.fleet.actors.remove(self.job.actor)
        self.job = self.roster.run(self.job.output.with_suffix(".prompts"), self.job.output, self.asked, proxied=True)

    def any_actor(self) -> str:
        """The name of one of the fleet's actors."""
        return self.draw.choice(sorted(self.roster.actors))

    def any_proxied(self) -> str:
        """The name of one of the actors that have a proxy."""
        return self.draw.choice([*sorted(set(self.roster.through) & set(self.roster.actors)), self.job.actor.name])


def kill_an_actor(soak: Soak) -> None:
    """SIGKILL, started again at once."""
    actor = soak.roster.actors[soak.any_actor()]
    actor.kill()
    actor.restart()


def terminate_an_actor(soak: Soak) -> None:
    """SIGTERM, started again when it has drained."""
    actor = soak.roster.actors[soak.any_actor()]
    actor.signal(signal.SIGTERM)
    if actor.wait() != 0:
        soak.failed.append(f"{actor.name} left with {actor.process.returncode}\n{actor.said()[-LOG_CHARS:]}")
    actor.restart()


def pause_an_actor(soak: Soak) -> None:
    """SIGSTOP for up to six heartbeats."""
    actor = soak.roster.actors[soak.any_actor()]
    actor.signal(signal.SIGSTOP)
    time.sleep(soak.draw.uniform(0.5, 6 * HEARTBEAT_S))
    actor.signal(signal.SIGCONT)


def kill_the_producer(soak: Soak) -> None:
    """SIGKILL, run again."""
    job = soak.job
    if job.actor.lives:
        job.actor.kill()
    soak.rerun()


def kill_the_broker(soak: Soak) -> None:
    """SIGKILL, started again."""
    soak.roster.broker.kill()
    soak.roster.broker.start()


def cut_a_connection(soak: Soak) -> None:
    """Reset it."""
    soak.roster.do(soak.roster.proxy(soak.any_proxied()).cut)


def half_open_a_connection(soak: Soak) -> None:
    """It swallows until its owner gives it up."""
    soak.roster.do(soak.roster.proxy(soak.any_proxied()).half_open)


def slow_a_line(soak: Soak) -> None:
    """1 MiB/s and 200 ms for some seconds."""
    proxy = soak.roster.proxy(soak.any_proxied())
    soak.roster.do(lambda: (proxy.slow(2**20), proxy.delay(0.2)))
    time.sleep(soak.draw.uniform(2, 10))
    soak.roster.do(lambda: (proxy.slow(0), proxy.delay(0)))


def flip_a_byte(soak: Soak) -> None:
    """In the next long chunk that a worker sends."""
    proxy = soak.roster.proxy("worker-1-0")
    soak.roster.do(lambda: proxy.flip(from_bytes=4096))


def raise_an_alarm(soak: Soak) -> None:
    """The memory alarm, for some seconds."""
    soak.roster.broker.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
    time.sleep(soak.draw.uniform(1, 8))
    soak.roster.broker.ctl("set_vm_memory_high_watermark", "absolute", "1GB")


def publish_garbage(soak: Soak) -> None:
    """To a stage's queue."""
    stage = soak.draw.randrange(3)
    body = soak.draw.randbytes(soak.draw.randrange(1, 100_000))
    soak.roster.ask(lambda link: link.publish(soak.roster.topology.stage(stage).name, body))


FAULTS: tuple[Callable[[Soak], None], ...] = (
    kill_an_actor,
    terminate_an_actor,
    pause_an_actor,
    kill_the_producer,
    kill_the_broker,
    cut_a_connection,
    half_open_a_connection,
    slow_a_line,
    flip_a_byte,
    raise_an_alarm,
    publish_garbage,
)


def say(text: str) -> None:
    """A line of the soak's own log."""
    print(text, file=sys.stderr, flush=True)


def run(seconds: float, seed: int) -> tuple[Report, list[str], list[str]]:
    """Soak for so long; the report, what was seen of growth, and what is wrong. Ctrl-C ends it early."""
    say(f"seed {seed} (--seed {seed} draws the same faults)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    broker = PrivateBroker(config="vm_memory_high_watermark.absolute = 1GB\n")
    with tempfile.TemporaryDirectory(prefix="mqinfer-soak-") as folder:
        roster = None
        try:
            broker.start()
            roster = Roster(Path(folder), demo_model(), broker, {"MQINFER_LOG_LEVEL": "info"})
            roster.whole()
            answers = fault_free(roster, SHORT, Path(folder))
            return _soak(Soak(roster, Path(folder), answers, random.Random(seed), seconds))
        finally:
            if roster is not None:
                roster.end()
            broker.close()


def _soak(soak: Soak) -> tuple[Report, list[str], list[str]]:
    try:
        soak.run()
    except KeyboardInterrupt:
        say("stopping: the running job is finished without faults (Ctrl-C again leaves it)")
        try:
            soak.roster.unbreak()
            soak.settle()
        except KeyboardInterrupt:
            say("left")
    except AssertionError as error:
        soak.failed.append(str(error)[:2000])
    soak.look()
    soak.report.done = ", ".join(f"{name.replace('_', ' ')} {times}x" for name, times in soak.faults.most_common())
    return soak.report, soak.watch.lines(), soak.failed + soak.watch.grown()
