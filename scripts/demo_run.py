"""Runs the demo: every step is a command that a person could type, and the answers are shown in the end.

Nothing of mqinfer is imported here. All processes that it starts are gone when it ends, however it ends.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from demo_model import FOLDER
from local_fleet import MQINFER, ROOT, Fleet, FleetBroken, process

PROMPTS = ROOT / "examples" / "prompts.jsonl"

STAGES = 3
#: One worker for each stage, and another on the last: besides layers it has the output head and draws the tokens.
WORKERS = (0, 1, 2, 2)


def main() -> int:
    """Exit code: as `mqinfer batch`; 1 if the fleet broke, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="SmolLM2 in three stages answers a few questions."
    )
    parser.add_argument("--rabbitmq", action="store_true", help="as separate processes over a private RabbitMQ")
    parser.add_argument("-o", "--results", type=Path, default=ROOT / "demo-results.jsonl", help="default: %(default)s")
    options = parser.parse_args()
    for left_over in (options.results, options.results.with_name(options.results.name + ".job")):
        left_over.unlink(missing_ok=True)  # `mqinfer batch` would take it for a job to resume
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        code = over_rabbitmq(options.results) if options.rabbitmq else in_one_process(options.results)
    except KeyboardInterrupt:
        return 130
    except FleetBroken as broken:
        print(broken, file=sys.stderr)
        return 1
    show(PROMPTS, options.results)
    return code


def in_one_process(results: Path) -> int:
    """Coordinator and all stages inside `mqinfer batch`."""
    command = ["batch", str(PROMPTS), "-o", str(results), "--model", str(FOLDER), "--stages", str(STAGES)]
    with process(MQINFER, *command, stop=signal.SIGINT) as job:
        return job.wait()


def over_rabbitmq(results: Path) -> int:
    """A broker, the fleet, and a batch job that knows nothing of either but the broker's address."""
    with tempfile.TemporaryDirectory(prefix="mqinfer-demo-") as folder:
        pipeline = str(Path(folder, "pipeline.toml"))
        plan = ["plan", str(FOLDER), "--stages", str(STAGES), "--name", "demo", "-o", pipeline]
        if subprocess.run([MQINFER, *plan], check=False).returncode:
            raise FleetBroken("the plan could not be made")
        fleet = Fleet(Path(folder))
        with fleet.broker() as url, fleet.actors(url, pipeline, WORKERS):
            print(f"a private RabbitMQ listens at {url}", flush=True)
            print(f"1 coordinator and {len(WORKERS)} workers on stages {WORKERS} are starting", flush=True)
            batch = ["batch", str(PROMPTS), "-o", str(results), "--pipeline", pipeline, "--broker", url]
            with process(MQINFER, *batch, stop=signal.SIGINT) as job:
                return fleet.wait_for(job)


def show(prompts: Path, results: Path) -> None:
    """Print each question with its answer, in the order of the questions."""
    rows = {row["custom_id"]: row for row in read(results)}
    for line in read(prompts):
        question, answer = asked(line), answered(rows.get(line["custom_id"]))
        print(f"\n{indented('  ', question)}\n{indented('      ', answer)}")
    print(f"\nThe results are in {results}")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; none where the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def asked(line: dict[str, Any]) -> str:
    """The question of a batch line, whichever form it has."""
    body = line.get("body", line)
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"] + " ...")


def answered(row: dict[str, Any] | None) -> str:
    """The answer of a result row, or why there is none."""
    if row is None:
        return "(no result)"
    if row["error"]:
        return f"(error: {row['error']['message']})"
    choice = row["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else "... " + choice["text"].strip())


def indented(margin: str, text: str) -> str:
    """`text` wrapped for a terminal, each line after `margin`."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 100) or [""]]
    return textwrap.indent("\n".join(lines), margin)


if __name__ == "__main__":
    sys.exit(main())
