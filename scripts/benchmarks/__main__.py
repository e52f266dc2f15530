"""The command line of the benchmark: cases by name, JSON out, tables into docs/performance.md."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from local_fleet import FleetBroken
from private_broker import BrokerFailed

from benchmarks import report
from benchmarks.measure import ROUNDS, SMALL, Case, Outcome, narrowed, run, say
from benchmarks.side import SideFailed
from benchmarks.workload import WrongWork

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"

#: Case -> the module that has it; its `cases()` gives what belongs to that name, often several lines of the report.
CASES: Mapping[str, str] = {
    "generate": "benchmarks.generate",
    "generate-bf16": "benchmarks.generate",
    "equal": "benchmarks.generate",
    "one": "benchmarks.generate",
    "users": "benchmarks.generate",
    "prefill": "benchmarks.generate",
    "long": "benchmarks.long",
    "hop": "benchmarks.hop",
    "codec": "benchmarks.codec",
    "scale": "benchmarks.scale",
    "plan": "benchmarks.plan",
    "elasticity": "benchmarks.elasticity",
    "profile": "benchmarks.profile",
    "memory": "benchmarks.memory",
}

EPILOG = """\
Every figure is one side of a comparison in one run: all contenders are ready at once and take turns, medians of
the rounds are printed with all of them. The machine should be idle otherwise; nothing here is part of the tests.

  scripts/bench                     all cases: hours on 2 cores, most of them for generate and generate-bf16
  scripts/bench generate            one of them
  scripts/bench one --rounds 5      with more rounds
  scripts/bench generate --only "batches of|2 stages$"   some contenders; goals that lack a side are left out
  scripts/bench elasticity          what a consumer that comes or goes brings: 40 minutes
  scripts/bench hop --write         puts the tables into docs/performance.md
  scripts/bench --json FILE         all rounds, for machines

Petals runs where MQINFER_PETALS names the python of an environment that has it: see docs/performance.md.
Exit code: 0 every goal that could be measured was met, 1 some were not (or it broke), 130 stopped by Ctrl-C."""


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure mqinfer against named rivals.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", nargs="*", help=f"of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each contender runs (default: the case's)")
    parser.add_argument("--only", type=pattern, metavar="REGEX", help="contenders whose names it is found in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--write", action="store_true", help="put the tables that are whole into docs/performance.md")
    options = parser.parse_args()
    if unknown := set(options.case) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are: {', '.join(CASES)}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # whatever was started is ended then
        signal.signal(number, signal.default_int_handler)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.write and (SMALL or (options.rounds or ROUNDS) < ROUNDS):
        parser.error(f"--write: only what was measured in {ROUNDS} rounds or more belongs into the document")
    command = shown(options)
    outcomes: list[Outcome] = []
    broken = False
    for case in asked_for(options):
        try:
            outcome = run(case)
        except (WrongWork, SideFailed, FleetBroken, BrokerFailed) as why:  # the other cases may go well
            say(f"{case.name}: given up: {why}")
            broken = True
            continue
        outcomes.append(outcome)
        print(report.markdown(outcome, command), flush=True)
        if options.write and case.whole:
            report.put(DOCUMENT, outcome, command)
        if options.json:
            report.dump(options.json, outcomes, command)
    met = [outcome.reached(goal) for outcome in outcomes for goal in outcome.case.goals]
    return int(broken or any(reached is not None and not reached[1] for reached in met))


def shown(options: argparse.Namespace) -> str:
    """The command that measures the same again, for the tables: where the figures went for machines is left out."""
    rounds = ["--rounds", str(options.rounds)] if options.rounds else []
    only = ["--only", options.only.pattern] if options.only else []
    write = ["--write"] if options.write else []
    return shlex.join(["scripts/bench", *options.case, *rounds, *only, *write])


def pattern(text: str) -> re.Pattern[str]:
    """Raises: ArgumentTypeError."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def asked_for(options: argparse.Namespace) -> Iterator[Case]:
    """The cases, with the contenders and as many rounds as were asked for."""
    for name in options.case or CASES:
        make: Callable[[str], list[Case]] = import_module(CASES[name]).cases
        for whole in make(name):
            case = narrowed(whole, options.only) if options.only else whole
            if case.contenders:
                yield replace(case, rounds=options.rounds) if options.rounds else case


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
