"""Runs the suite of faults (tests/faults) and prints its table, or soaks. `scripts/faults` sets it up."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "tests" / "faults"

DESCRIPTION = """\
Breaks a real fleet on purpose and counts what became of every request.

A private RabbitMQ, SmolLM2-135M in three stages with two workers on each, and two coordinators answer jobs of 220
prompts while processes are killed and paused, connections cut, queues deleted, disks filled. Each result file is
compared with that of a run without faults: one row for every line, none missing, none twice, the texts identical.
"""
EPILOG = """\
examples:
  scripts/faults --quick              what continuous integration runs: some minutes on 2 idle cores
  scripts/faults                      everything: the better part of an hour
  scripts/faults --only broker        the tests whose name contains "broker"
  scripts/faults --soak 30m           faults drawn at random for half an hour; watches memory and file descriptors
  scripts/faults --soak 30m --seed 7  the same faults in the same order

the columns, as in RabbitMQ's own Jepsen suite:
  attempted   lines that were asked
  answered    lines with the right row: the text of the run without faults, or a failure where one is right
  lost        lines without a row
  repeated    rows beyond the first of a line
  unexpected  rows of no line, failures that should not be, other texts
  replayed    positions computed again, in percent of what the jobs need (where it is measured)
  flowing     the longest time until the next result came, in seconds (of the fault, or of its end)

exit code: 0 every row held, 1 something did not, 130 stopped by Ctrl-C (with the report so far).
A soak that is stopped finishes its job and is judged like any other.
Needs root, or an installed rabbitmq-server; mounting a small disk needs root, or ENOSPC is injected instead.
"""


def main() -> int:
    """Exit code: see EPILOG."""
    parser = argparse.ArgumentParser(
        prog="scripts/faults",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="only the quick half, which CI runs")
    parser.add_argument("--only", metavar="SUBSTRING", help="only tests whose name contains this")
    parser.add_argument("--soak", metavar="TIME", type=_seconds, help="instead of the tests: such as 90s, 30m or 8h")
    parser.add_argument("--seed", type=int, help="draws the soak's faults; printed when it is not given")
    options = parser.parse_args()
    if options.soak:
        return soak(options.soak, random.randrange(2**32) if options.seed is None else options.seed)
    return suite(quick=options.quick, only=options.only)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError("write a time such as 90s, 30m or 8h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def suite(*, quick: bool, only: str | None) -> int:
    """Run the tests; each leaves its line of the table."""
    with tempfile.TemporaryDirectory(prefix="mqinfer-faults-") as folder:
        report = Path(folder, "report.jsonl")
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(SUITE),
            "-q",
            "--no-header",
            "--tb=short",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-m", "not faults"] if quick else []
        command += ["-k", only] if only else []
        running = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"MQINFER_FAULTS_REPORT": str(report)})
        stopped = False
        try:
            code = running.wait()
        except KeyboardInterrupt:  # it got the same signal, and ends what it started
            code, stopped = running.wait(), True
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    show(lines)
    if stopped:
        return 130
    return 1 if code else 0


def soak(seconds: float, seed: int) -> int:
    """Run tests/faults/soak.py in this process."""
    sys.path[:0] = [str(SUITE), str(ROOT / "tests"), str(ROOT / "scripts")]
    import soak as soaking

    try:
        made, growth, wrong = soaking.run(seconds, seed)
    except KeyboardInterrupt:
        print("stopped before it had begun", file=sys.stderr)
        return 130
    show([asdict(made) | {"outcome": "failed" if wrong else "passed"}])
    print("\n".join(["", "memory and file descriptors, from the warm-up to the end:", *growth]))
    print("\n".join(["", *(f"WRONG: {what}" for what in wrong)]) if wrong else "\nnothing was lost and nothing grew")
    return 1 if wrong else 0


def show(lines: list[dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Faults, on purpose")
    for name in ("fault", "what was done"):
        table.add_column(name, overflow="fold")
    for name in ("attempted", "answered", "lost", "repeated", "unexpected", "replayed %", "flowing s"):
        table.add_column(name, justify="right")
    table.add_column("held?")
    table.add_column("note", overflow="fold")
    for line in sorted(lines, key=lambda line: line["fault"]):
        counts = line["counts"] or {}
        table.add_row(
            line["fault"] or line["test"],
            line["done"],
            *(str(counts.get(name, "")) for name in ("attempted", "answered", "lost", "repeated", "unexpected")),
            "" if line["replayed_percent"] is None else f"{line['replayed_percent']:.1f}",
            "" if line["flowing_s"] is None else f"{line['flowing_s']:.1f}",
            {"passed": "yes", "failed": "NO"}.get(line["outcome"], line["outcome"]),
            line["note"],
        )
    console = Console()
    Console(width=max(console.width, 180)).print(table)


if __name__ == "__main__":
    sys.exit(main())
