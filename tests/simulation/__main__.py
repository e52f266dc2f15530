"""The command line of the simulation: many seeds in many processes, or one seed with everything it says."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

from simulation import planted
from simulation.run import Verdict, run_seed
from simulation.scenario import draw
from simulation.trace import tracing

#: Seeds that one process runs before it goes, with all that its runs left behind.
CHUNK = 100
PROGRESS_S = 10.0

EPILOG = """\
Each seed draws a fleet, a load and faults, and runs the real coordinators, workers and batch jobs on them, with
a broker and a network of its own. A seed that fails says so and can be run again alone:

  scripts/simulate --seeds 2000              what continuous integration runs
  scripts/simulate --seeds 100000 --jobs 8   for a night
  scripts/simulate --seed 4711 --trace       one seed, event by event
  scripts/simulate --planted                 the bugs that it must find, and whether it finds them
  scripts/simulate --planted epoch-ignored   one of them

Exit code 0: everything held; 1: it did not (or a planted bug was not found)."""


def main() -> int:
    """The exit code."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    gc.disable()  # what killed processes leave must not be collected: it would run
    if options.seed is not None:
        return _one(options.seed, trace=options.trace)
    if options.planted is not None:
        names = [options.planted] if options.planted else list(planted.BUGS)
        return max([_hunt(name, options.seeds or 2000, options.jobs) for name in names])
    return _many(range(options.first, options.first + (options.seeds or 2000)), options.jobs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description="Run the whole protocol on a virtual clock with seeded faults.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds to run (default: 2000)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the first of them (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    parser.add_argument("--seed", type=int, metavar="K", help="run only this seed")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event")
    parser.add_argument(
        "--planted",
        nargs="?",
        const="",
        choices=["", *planted.BUGS],
        metavar="BUG",
        help="plant bugs and look for them",
    )
    return parser


def _one(seed: int, *, trace: bool) -> int:
    scenario = draw(seed)
    print(scenario)
    with tracing(trace):
        verdict = run_seed(seed)
    for complaint in verdict.complaints:
        print(complaint)
    print(f"seed {seed}: {verdict.lasted_s:.1f} virtual seconds, digest {verdict.digest:08x}, {dict(verdict.counts)}")
    return _leave(bool(verdict.complaints))


def _many(seeds: Sequence[int], jobs: int) -> int:
    began_s = told_s = time.monotonic()
    counts: Counter[str] = Counter()
    failed: list[int] = []
    done = 0
    for verdict in _verdicts(seeds, jobs):
        done += 1
        counts.update(verdict.counts)
        if verdict.complaints:
            failed.append(verdict.seed)
            _tell_failure(verdict)
        if time.monotonic() - told_s > PROGRESS_S:
            told_s = time.monotonic()
            print(f"{done} of {len(seeds)} seeds, {len(failed)} failed, {told_s - began_s:.0f} s", file=sys.stderr)
    for name in ("attempted", "acknowledged", "lost", "duplicated", "unexpected"):
        print(f"{name:>14}: {counts[name]}")
    faults = ", ".join(f"{kind.removeprefix('fault: ')} {n}" for kind, n in sorted(counts.items()) if "fault: " in kind)
    print(f"{'faults':>14}: {faults}")
    print(f"{done} seeds, {len(failed)} failed, in {time.monotonic() - began_s:.0f} s")
    return _leave(bool(failed))


def _tell_failure(verdict: Verdict) -> None:
    print(f"seed {verdict.seed} failed; again: scripts/simulate --seed {verdict.seed} --trace")
    for complaint in verdict.complaints:
        print(f"    {complaint}", flush=True)


def _hunt(name: str, seeds: int, jobs: int) -> int:
    """Plant a bug; 0 if a seed finds it."""
    bug = planted.BUGS[name]
    with bug.plant():
        for tried, verdict in enumerate(_verdicts(range(seeds), jobs), 1):
            if verdict.complaints:
                print(f"{name}: found by seed {verdict.seed} after {tried}: {verdict.complaints[0]}", flush=True)
                return 0
    print(f"{name}: NOT found in {seeds} seeds", flush=True)
    return 1


def _verdicts(seeds: Sequence[int], jobs: int) -> Iterator[Verdict]:
    size = min(CHUNK, -(-len(seeds) // jobs))
    chunks = [seeds[at : at + size] for at in range(0, len(seeds), size)]
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        for verdicts in pool.imap_unordered(_chunk, chunks):
            yield from verdicts


def _chunk(seeds: Iterable[int]) -> list[Verdict]:
    return [run_seed(seed) for seed in seeds]


def _leave(failed: bool) -> int:
    """Without collecting what is left of the runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failed))


if __name__ == "__main__":
    sys.exit(main())
