"""SIGTERM of anything, and Ctrl-C of the job, once and twice."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from counts import Report
from processes import LOOK_S
from roster import ALLOWANCE, Roster
from workload import SHORT, repeated

INTERRUPTED = 130
#: "Leaves at once".
AT_ONCE_S = 2.0


def test_on_sigterm_actors_drain_in_the_middle_of_a_job_and_leave_with_0(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGTERM", "a worker of each stage and a coordinator, amid a job"
    job = healed.job(SHORT, tmp_path)
    job.reach(0.1)
    leaving = [healed.workers(stage)[0] for stage in range(3)] + healed.coordinators()[:1]
    for actor in leaving:
        actor.signal(signal.SIGTERM)
    report.flowed(job.flows())
    assert [actor.wait() for actor in leaving] == [0] * 4, healed.fleet.logs()
    job.finish(answers, report)
    for actor in leaving:
        assert actor.events("worker.drained") or actor.events("coordinator.drained")


def test_a_job_interrupted_by_ctrl_c_or_sigterm_goes_on_later(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGINT, then SIGTERM of the batch", "once each, run again"
    asked = repeated(SHORT, 2)  # the fleet goes on while the batch starts anew, and must not be done then
    job = healed.job(asked, tmp_path)
    for share, number in ((0.1, signal.SIGINT), (0.35, signal.SIGTERM)):
        job.reach(share)
        job.actor.signal(number)
        assert job.actor.wait() == INTERRUPTED, job.actor.said()[-2000:]
        job = healed.run(job.output.with_suffix(".prompts"), job.output, asked)
    job.finish(answers, report)


def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "SIGINT of the batch twice", "while the broker stands still, run again"
    job = healed.job(SHORT, tmp_path, proxied=True)
    job.reach(0.2)
    healed.do(healed.proxy(job.actor.name).swallow)  # so that it can't leave in order before the second one comes
    job.actor.signal(signal.SIGINT)
    began_s = time.monotonic()
    while job.actor.lives:  # signals that come before it looked at the last one count as one
        job.actor.signal(signal.SIGINT)
        time.sleep(LOOK_S)
    assert job.actor.wait() == INTERRUPTED
    took_s = time.monotonic() - began_s
    report.note = f"gone after {took_s:.2f} s"
    assert took_s <= AT_ONCE_S * ALLOWANCE
    healed.run(job.output.with_suffix(".prompts"), job.output, SHORT).finish(answers, report)
