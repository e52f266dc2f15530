"""Outcomes as JSON and as the tables of docs/performance.md: one block between markers for each case."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.measure import Goal, Limit, Outcome

#: What decides how fast a CPU multiplies matrices, in float32 and in bfloat16.
_VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_VERSIONS = ("mqinfer", "torch", "transformers", "aio-pika", "uvloop", "zstandard")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    processor = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", processor)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.+)", processor)
    memory = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "processor": model[1] if model else platform.processor(),
        "vectors": " ".join(name for name in _VECTORS if flags and name in flags[1].split()) or "?",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gib": f"{int(memory[1]) / 2**20:.0f}" if memory else "?",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _VERSIONS},
    }


def _commit() -> str:
    """What was measured; with a + where the working tree has more than that, beside the tables themselves."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/", ":!/docs/performance.md")
    return (commit or "?") + "+" * bool(changed)


def _git(*arguments: str) -> str:
    git = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # not installed
        return ""


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def as_json(outcomes: Sequence[Outcome], command: str) -> dict[str, Any]:
    """All of it, round by round."""
    return {
        "command": command,
        "machine": machine(),
        "cases": {
            outcome.case.name: {
                "work": outcome.case.work,
                "unit": outcome.case.unit,
                "figures": {f.name: f.absent or list(f.values) for f in outcome.figures},
                "goals": [_goal_json(outcome, goal) for goal in outcome.case.goals],
                "notes": outcome.case.notes,
            }
            for outcome in outcomes
        },
    }


def _goal_json(outcome: Outcome, goal: Goal | Limit) -> dict[str, Any]:
    reached = outcome.reached(goal)
    return {
        "goal": wanted(outcome, goal),
        "reached": None if reached is None else round(reached[0], 4),
        "met": None if reached is None else reached[1],
    }


def wanted(outcome: Outcome, goal: Goal | Limit) -> str:
    """The goal in words."""
    sign = "≤" if goal.at_most else "≥"
    if isinstance(goal, Goal):
        return f"{goal.ours} {sign} {goal.bound:g} × {goal.rival}"
    return f"{goal.ours} {sign} {goal.bound:g} {outcome.case.unit}"


def markdown(outcome: Outcome, command: str) -> str:
    """The case's block for docs/performance.md."""
    case = outcome.case
    lines = [f"### {case.name}", "", case.work, "", f"`{command}`", "", f"| | {case.unit}, median | all rounds |"]
    lines.append("|---|---:|---|")
    for figure in outcome.figures:
        rounds = ", ".join(f"{value:.4g}" for value in figure.values)
        middle = f"{figure.median:.4g}" if figure.values else "–"
        lines.append(f"| {figure.name} | {middle} | {figure.absent or rounds} |")
    if case.goals:
        lines += ["", "| goal | reached | |", "|---|---:|---|"]
        lines += [_goal_row(outcome, goal) for goal in case.goals]
    lines += ["", *(f"- {note}" for note in case.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _goal_row(outcome: Outcome, goal: Goal | Limit) -> str:
    reached = outcome.reached(goal)
    if reached is None:
        return f"| {wanted(outcome, goal)} | – | not measured |"
    spread = ""
    if isinstance(goal, Goal):
        ratios = outcome.ratios(goal.ours, goal.rival)
        spread = f" ({min(ratios):.3g}–{max(ratios):.3g})" if statistics.pstdev(ratios) else ""
    return f"| {wanted(outcome, goal)} | {reached[0]:.4g}{spread} | {'met' if reached[1] else '**not met**'} |"


def put(document: Path, outcome: Outcome, command: str) -> None:
    """Replace the case's block in the document, or add it at its end."""
    begin, end = f"<!-- bench:{outcome.case.name} -->", f"<!-- /bench:{outcome.case.name} -->"
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    block = f"{begin}\n{markdown(outcome, command)}\n{facts}\n{end}\n"
    text = document.read_text() if document.exists() else ""
    before, found, rest = text.partition(begin)
    if found:
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"{document}: {begin} has no {end}")
        document.write_text(before + block + after.removeprefix("\n"))
    else:
        document.write_text(f"{text.rstrip()}\n\n{block}" if text else block)


def dump(path: Path, outcomes: Sequence[Outcome], command: str) -> None:
    """Write the JSON file."""
    path.write_text(json.dumps(as_json(outcomes, command), indent=1, ensure_ascii=False) + "\n")
