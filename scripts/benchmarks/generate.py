"""The cases that generate: mixed and equal lengths, one row, many users; and prompts that are only scored."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import ours, workload
from benchmarks.measure import Case, Contender, Goal
from benchmarks.ours import Layout, Mqinfer
from benchmarks.rival_hf import Transformers, waste
from benchmarks.rival_petals import contender as petals
from benchmarks.workload import Agreement, Workload

PETALS = "Petals"
PETALS_APART = "Petals, 2 sessions of 16 rows"
PETALS_HALVES = "Petals, 2 sessions of half the rows"
STATIC_16, STATIC_32 = (f"transformers, batches of {size}" for size in (16, 32))
TOGETHER = "transformers, one batch of 8 rows"
CONTINUOUS = "transformers, continuous batching of {} rows"
ONE = "transformers, generate"
FORWARD = "transformers, forward of 16 × 128"

#: The one that the goals are about: a pipeline of 2 stages with a thread each.
OURS = ours.TWO_STAGES

#: Of each generating case, in tokens/s.
UNIT = "tokens/s"


def cases(name: str) -> list[Case]:
    """See benchmarks.__main__."""
    match name:
        case "generate":
            return [_mixed()]
        case "generate-bf16":
            return [_mixed_bfloat16()]
        case "equal":
            return [_equal(16), _equal(32)]
        case "one":
            return [_one()]
        case "users":
            return [_users()]
        case _:
            return [_prefill()]


def _mixed() -> Case:
    work = workload.mixed("float32")
    notes = [waste(work, size) for size in (16, 32)]
    agreement = Agreement(notes, wanted=True)
    theirs = Transformers(work, agreement)
    layouts = (
        ours.ONE_PROCESS,
        ours.ONE_PROCESS_2_STAGES,
        ours.TWO_WORKERS,
        ours.TWO_STAGES,
        ours.THREE_STAGES,
        ours.TWO_BY_TWO,
    )
    goals = [
        Goal(OURS.name, STATIC_16, 2.5),
        Goal(OURS.name, STATIC_32, 2.5),
        Goal(OURS.name, ours.ONE_PROCESS.name, 0.9),
        Goal(OURS.name, ours.ONE_PROCESS_2_STAGES.name, 0.9),
        Goal(OURS.name, PETALS, 4),
        Goal(OURS.name, PETALS_APART, 4),
    ]
    return Case(
        "generate float32",
        f"{_lengths(work)}, greedy, lengths forced, float32. Useful tokens of the output are counted.",
        UNIT,
        [
            theirs.static(STATIC_16, 16),
            theirs.static(STATIC_32, 32),
            *(theirs.continuous(CONTINUOUS.format(rows), rows) for rows in (16, 64)),
            petals(work, agreement, batch=32, sessions=2),
            petals(work, agreement, PETALS_APART, batch=16, sessions=2),
            *_ours(layouts, work, agreement),
        ],
        goals,
        warmups=0,  # each was warmed up when it was made ready, and a run takes a minute
        notes=notes,
    )


def _mixed_bfloat16() -> Case:
    """No goals, and the best of each only: without AVX-512 every one of these runs takes minutes."""
    work = workload.mixed("bfloat16")
    notes = [waste(work, 32)]
    agreement = Agreement(notes, wanted=False)
    return Case(
        "generate bfloat16",
        f"{_lengths(work)}, greedy, lengths forced, bfloat16. Useful tokens of the output are counted.",
        UNIT,
        [
            Transformers(work, agreement).static(STATIC_32, 32),
            petals(work, agreement, batch=32, sessions=2),
            *_ours((ours.ONE_PROCESS, OURS), work, agreement),
        ],
        warmups=0,
        notes=notes,
    )


def _equal(rows: int) -> Case:
    work = workload.equal(rows, "float32")
    notes: list[str] = []
    agreement = Agreement(notes, wanted=True)
    rival = STATIC_16 if rows == 16 else STATIC_32
    layouts = (ours.ONE_PROCESS, ours.ONE_PROCESS_2_STAGES, ours.TWO_WORKERS, ours.TWO_STAGES)
    return Case(
        f"equal {rows}",
        f"{_lengths(work)}, greedy, lengths forced, float32.",
        UNIT,
        [
            Transformers(work, agreement).static(rival, rows),
            petals(work, agreement, batch=rows, sessions=1),
            petals(work, agreement, PETALS_HALVES, batch=rows // 2, sessions=2),
            *_ours(layouts, work, agreement),
        ],
        [Goal(OURS.name, rival, 1.3), Goal(OURS.name, PETALS, 2.5), Goal(OURS.name, PETALS_HALVES, 2.5)],
        warmups=0,
        notes=notes,
    )


def _one() -> Case:
    work = workload.equal(1, "float32")
    notes: list[str] = []
    agreement = Agreement(notes, wanted=True)
    layouts = (ours.ONE_PROCESS, ours.ONE_WORKER_2_THREADS, ours.TWO_STAGES, ours.TWO_STAGES_2_THREADS)
    contenders = [
        Transformers(work, agreement).static(ONE, 1),
        petals(work, agreement, batch=1, sessions=1),
        *_ours(layouts, work, agreement),
    ]
    best = ours.TWO_STAGES_2_THREADS.name
    return Case(
        "one",
        f"{_lengths(work)}, greedy, length forced, float32.",
        UNIT,
        contenders,
        [Goal(best, ONE, 0.85), Goal(best, PETALS, 1.25)],
        notes=notes,
    )


def _users() -> Case:
    work = workload.users("float32")
    notes: list[str] = []
    agreement = Agreement(notes, wanted=True)
    mine = Mqinfer("float32", agreement)
    together, apart = (f"{OURS.name}, {what}" for what in ("one job of 8 rows", "8 jobs"))
    return Case(
        "users",
        f"8 jobs of one row each that begin together: {_lengths(work)}, greedy, lengths forced, float32.",
        UNIT,
        [
            Transformers(work.as_one_job, agreement).static(TOGETHER, 8),
            petals(work, agreement, batch=1, sessions=8),
            mine.contender(OURS, work.as_one_job, together),
            mine.contender(OURS, work, apart),
        ],
        [Goal(apart, PETALS, 4), Goal(apart, together, 0.9)],
        notes=notes,
    )


def _prefill() -> Case:
    work = workload.prefill("float32")
    notes: list[str] = []
    agreement = Agreement(notes, wanted=True)
    layouts = (ours.ONE_PROCESS, ours.ONE_PROCESS_2_STAGES, ours.TWO_WORKERS, ours.TWO_STAGES, ours.TWO_HALVES)
    return Case(
        "prefill",
        f"{_lengths(work)}, float32: prompts are scored, the likeliest next token is all that comes back. "
        "The prompts' tokens are counted.",
        UNIT,
        [
            Transformers(work, agreement).scored(FORWARD, 16),
            petals(work, agreement, batch=16, sessions=2),
            *_ours(layouts, work, agreement),
        ],
        [Goal(ours.TWO_HALVES.name, FORWARD, 1.0), Goal(ours.TWO_HALVES.name, PETALS, 1.4)],
        notes=notes,
    )


def _ours(layouts: Sequence[Layout], work: Workload, agreement: Agreement) -> list[Contender]:
    mine = Mqinfer(work.dtype, agreement)
    return [mine.contender(layout, work) for layout in layouts]


def _lengths(work: Workload) -> str:
    """In words."""
    prompts, outputs = ([f(row) for row in work.rows] for f in (lambda r: len(r.prompt), lambda r: r.output_tokens))
    rows = f"{len(work.rows)} row{'s' if len(work.rows) > 1 else ''}"
    return f"{rows} of {_span(prompts)} tokens in, {_span(outputs)} out"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"
