"""A consumer that comes while SmolLM2 is computed: what two cores can show of it.

Nearly all of the model is in the last of three stages, and each worker has one thread: that one fills a core, the two
before it take a part of the other. A second one at the last stage can bring what is left of that core, and no more.
"""

from __future__ import annotations

import asyncio
from functools import partial

from benchmarks import workload
from benchmarks.live import Live, between, play
from benchmarks.measure import SMALL, Case, Goal, Notes, say
from benchmarks.ours import as_lines, make_plan
from benchmarks.rounds import Rounds

#: Where the 30 layers are cut.
CUTS = (2, 4)
#: In flight: few, so that a row does not take minutes.
ROWS = 32
SETTLE_S = 5.0 if SMALL else 15.0

ONE, TWO = "one worker of the last stage", "a second one"
CAME = "rows replayed when it came"


async def last_stage(live: Live, notes: Notes, figures: dict[str, float]) -> None:
    """In the middle of a job a worker comes."""
    for stage in range(len(CUTS) + 1):
        live.start(stage)
    await live.until([1] * (len(CUTS) + 1))
    work = workload.twice()
    job = await live.begin(as_lines(work.rows))
    await asyncio.sleep(SETTLE_S)
    one, before = await live.windows(), await live.look()
    live.start(len(CUTS))
    await live.until([1] * len(CUTS) + [2])
    await asyncio.sleep(SETTLE_S)
    two, after = await live.windows(), await live.look()
    figures |= {ONE: one.rate, TWO: two.rate, CAME: between(before, after, "replays")}
    results = await job.ended()
    half = len(work.rows) // 2
    same = sum(results.texts.get(row) == results.texts.get(row + half) for row in range(half))
    if results.lost or results.repeated or results.wrong or same < workload.AGREEING * half:
        raise workload.WrongWork(f"{results.lost} rows are lost, {results.wrong} wrong, {same} of {half} alike")
    notes.put("the same prompt again", f"{same} of {half} have the same text as before")
    notes.put("replayed when it came", f"{figures[CAME]:.0f} rows")
    notes.put(ONE, one.told())
    notes.put(TWO, two.told())


def case(name: str) -> Case:
    """What the second one is to bring is more than nothing: the cores bind."""
    notes = Notes()
    return Case(
        name,
        f"SmolLM2 in float32 in 3 stages, layers [0, {CUTS[0]}), [{CUTS[0]}, {CUTS[1]}) and the rest; one thread a "
        f"worker; {ROWS} rows in flight. A second worker of the last stage comes in the middle of the job.",
        "positions/s",
        Rounds(partial(_play, notes)).contenders(ONE, TWO),
        [Goal(TWO, ONE, 1.0)],
        warmups=0,
        notes=notes,
    )


def _play(notes: Notes) -> dict[str, float]:
    figures: dict[str, float] = {}
    play(
        lambda live: last_stage(live, notes, figures),
        lambda folder: make_plan(folder, len(CUTS) + 1, "float32", CUTS),
        sleeping=False,
        rows=str(ROWS),
    )
    for what, value in figures.items():
        say(f"{last_stage.__name__}: {what}: {value:,.4g}")
    return figures
