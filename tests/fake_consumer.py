"""A stage's consumer around a fake engine, as a process that a command template starts and stops.

`python fake_consumer.py up FOLDER PIPELINE URL STAGE INSTANCE SECONDS` leaves one behind; `down` with the same ends it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from fakes import FakeEngine

from mqinfer import plan as plans
from mqinfer.running import finish
from mqinfer.settings import WorkerSettings, load
from mqinfer.stage_compute import StageCompute
from mqinfer.stage_worker import StageWorker
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport


def serve(pipeline: str, url: str, stage: int, instance: str, seconds: float) -> None:
    async def connect() -> Transport:
        return await open_transport(url)

    plan = plans.read(Path(pipeline))
    engine = FakeEngine(plan, stage, seconds_per_position=seconds)
    settings = load(WorkerSettings, drain_s=5.0, instance=instance)
    compute = StageCompute(plan, stage, engine, codec="lossless", threads=1)  # type: ignore[arg-type]
    finish(StageWorker(plan, stage, compute, settings, connect).run, stopped=0)


def main() -> None:
    verb, folder, pipeline, url, stage, instance, seconds = sys.argv[1:]
    number = Path(folder, f"{instance}.pid")
    if verb == "up":
        command = [sys.executable, __file__, "serve", *sys.argv[2:]]
        with Path(folder, f"{instance}.log").open("ab") as log:
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        number.write_text(str(started.pid))
    elif verb == "down":
        os.kill(int(number.read_text()), signal.SIGTERM)
        number.unlink()
    else:
        serve(pipeline, url, int(stage), instance, float(seconds))


if __name__ == "__main__":
    main()
