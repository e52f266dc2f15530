"""The simulation itself: seeds hold, a seed is always the same run, and a planted bug is found.

Many more seeds run in `scripts/simulate`, which CI calls beside these tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.planted import BUGS
from simulation.scenario import FAULTS, draw

TESTS = Path(__file__).parents[1]


def simulate(*options: str, hash_seed: str = "0", patience_s: float = 100.0) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own: it ends without collecting what its runs left behind."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "simulation", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=patience_s,
        env=environment,
    )


def test_seeds_hold_and_are_counted() -> None:
    done = simulate("--seeds", "25", "--jobs", "1")
    assert done.returncode == 0, done.stdout
    assert "lost: 0" in done.stdout
    assert "25 seeds, 0 failed" in done.stdout


@pytest.mark.parametrize("seed", ["9", "72", "1522"])
def test_a_seed_is_the_same_run_in_every_process(seed: str) -> None:
    runs = {simulate("--seed", seed, "--trace", hash_seed=hash_seed).stdout for hash_seed in ("1", "2")}
    assert len(runs) == 1
    (run,) = runs
    assert "digest" in run
    assert "link.opened" in run


def test_a_planted_bug_is_found_and_the_seed_that_finds_it_is_told() -> None:
    done = simulate("--planted", "absence-ignored", "--seeds", "100", "--jobs", "1")
    assert done.returncode == 0, done.stdout
    assert "absence-ignored: found by seed" in done.stdout


def test_every_kind_of_fault_is_drawn() -> None:
    assert {fault.kind for seed in range(200) for fault in draw(seed).faults} == set(FAULTS)


@pytest.mark.planted
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bug", BUGS)
def test_each_planted_bug_is_found_within_2000_seeds(bug: str) -> None:
    done = simulate("--planted", bug, "--seeds", "2000", patience_s=3500)
    assert done.returncode == 0, done.stdout
