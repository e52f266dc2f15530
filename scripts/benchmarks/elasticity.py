"""Consumers of single stages come and go while a job runs: what that brings, and whether anything is lost by it.

Broker, coordinator, job and workers are the real processes, `mqinfer worker` in all but its compute
(`sleeping_workers`): a forward takes a stated time for each new position, so that what a stage can do is a plain
number, whatever the batching: one over that time, for each of its consumers. The slowest stage's is the bound that
figures stand beside.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import combinations
from random import Random
from typing import Any

from benchmarks import elasticity_model
from benchmarks.live import WINDOW_S, WINDOWS, Live, Results, Seen, between, play, served
from benchmarks.measure import SMALL, Case, Goal, Limit, Notes, say
from benchmarks.ours import make_plan
from benchmarks.rounds import Rounds
from benchmarks.workload import WrongWork
from mqinfer.settings import CoordinatorSettings, load

PROMPT_TOKENS = 8
#: Tokens of a row, at least and at most.
OUTPUT_TOKENS = (16, 48)
#: How long a pipeline is left alone after a change before its rate counts as what it then makes.
SETTLE_S = 3.0 if SMALL else 10.0
#: So much of the cores at most may our processes take, or it is the machine that is measured.
MOST_CORES = 0.8

#: What a new position takes at each stage.
Cost = Sequence[float]
Figures = dict[str, float]
Scenario = Callable[[Live, Notes, Figures], Coroutine[Any, Any, None]]


# -- a consumer comes and goes -------------------------------------------------------------------

#: One stage, counted from 0, takes twice as long as the others.
HOT, HOT_COST = 2, (0.002, 0.002, 0.004, 0.002)
#: The share of the bound that a second consumer there must bring, and how soon.
ADDED_SHARE, ADDED_S = 0.85, 30.0
#: What is waited for it, at most.
PATIENCE_S = 10.0 if SMALL else 45.0

ONE, TWO, ONE_AGAIN = "one consumer at each stage", "a second one at stage 2", "one at each stage again"
ONE_BOUND, TWO_BOUND = f"bound with {ONE}", f"bound with {TWO}"
REACTION = f"from its start to {ADDED_SHARE:.0%} of the bound"
CAME, WENT = "replayed while a consumer came", "replayed when it went"
LOST, REPEATED, WRONG = "without a result", "with a result too many", "with wrong tokens"
CORES = "share of the cores"


async def second_consumer(live: Live, notes: Notes, figures: Figures) -> None:
    """In the middle of a job a consumer comes and goes."""
    figures |= {ONE_BOUND: bound(HOT_COST, [1, 1, 1, 1]), TWO_BOUND: bound(HOT_COST, [1, 1, 2, 1])}
    await serve(live, [1, 1, 1, 1], HOT_COST)
    phase_s = SETTLE_S + (WINDOWS + 1) * WINDOW_S
    job = await live.begin(rows_for(2 * phase_s * figures[ONE_BOUND] + (phase_s + PATIENCE_S) * figures[TWO_BOUND]))
    await asyncio.sleep(SETTLE_S)
    one = await live.windows()
    before = await live.look()
    second = live.start(HOT, HOT_COST)
    figures[REACTION] = await reaction_s(live, ADDED_SHARE * figures[TWO_BOUND])
    await asyncio.sleep(SETTLE_S)
    two = await live.windows()
    grown = await live.look()
    await live.stop(second)
    left = await live.look()
    await asyncio.sleep(SETTLE_S)
    again = await live.windows()
    await serve(live, [2, 2, 2, 2], HOT_COST)  # so that the rest takes less long
    figures |= {ONE: one.rate, TWO: two.rate, ONE_AGAIN: again.rate}
    figures |= {CAME: between(before, grown, "replays"), WENT: between(grown, left, "replays")}
    figures |= outcome(await job.ended())
    figures[CORES] = max(seen.ours for seen in (one, two, again))
    notes.put("positions computed again when it went", f"{between(grown, left, 'replayed_tokens'):.0f}")
    for name, seen in ((ONE, one), (TWO, two), (ONE_AGAIN, again)):
        notes.put(name, seen.told())


async def reaction_s(live: Live, wanted: float) -> float:
    """From now until the end of the first window that shows the wanted rate, or until the patience ends."""
    began_s = time.monotonic()
    looks = [(began_s, await live.look())]
    while (now_s := time.monotonic()) < began_s + PATIENCE_S:
        now = await live.look()
        earlier = [then for at_s, then in looks if at_s <= now_s - WINDOW_S]
        if earlier and live.rate(earlier[-1], now) >= wanted:
            break
        looks.append((now_s, now))
    return time.monotonic() - began_s


# -- from one to four ----------------------------------------------------------------------------

FOUR_COST = (0.008, 0.008, 0.008, 0.008)
#: In flight, in both jobs: with the usual 128, sixteen workers would have 8 each, on their way included.
FOUR_ROWS = 256
EACH_1, EACH_4 = "1 consumer at each of 4 stages", "4 consumers at each"


async def four_each(live: Live, notes: Notes, figures: Figures) -> None:
    """A job with one consumer at each stage, then one with four."""
    for name, each in ((EACH_1, 1), (EACH_4, 4)):
        consumers = [each] * len(FOUR_COST)
        await serve(live, consumers, FOUR_COST)
        seen = await steady(live, bound(FOUR_COST, consumers))
        figures[name] = seen.rate
        figures[CORES] = max(figures.get(CORES, 0.0), seen.ours)
        notes.put(name, seen.told())


# -- unlike consumers ----------------------------------------------------------------------------

SPEEDS = (1, 2, 4)
#: Of the slowest consumer, and of the stages before and after.
UNLIKE_S, QUICK_S = 0.012, 0.0005
UNLIKE, UNLIKE_BOUND = "consumers of 1, 2 and 4 times the speed at one stage", "sum of their speeds"


async def unlike(live: Live, notes: Notes, figures: Figures) -> None:
    """Three consumers of the middle stage of three."""
    for speed in SPEEDS:
        live.start(1, (QUICK_S, UNLIKE_S / speed, QUICK_S))
    await serve(live, [1, 3, 1], (QUICK_S, UNLIKE_S, QUICK_S))
    figures[UNLIKE_BOUND] = sum(SPEEDS) / UNLIKE_S
    seen = await steady(live, figures[UNLIKE_BOUND])
    figures |= {UNLIKE: seen.rate, CORES: seen.ours}
    notes.put(UNLIKE, seen.told())


# -- where a spare worker goes -------------------------------------------------------------------

SPARE = 8
#: With one worker at each stage rows take so long, and those that are under way end where they are.
ROWS_END_S = 5.0 if SMALL else 60.0
AUTO_COST = (0.004, 0.012, 0.008, 0.006)
AUTO, BY_HAND = f"{SPARE} spare workers with --stage auto", "the best assignment by hand"
BEST_BOUND = "bound with the best assignment"


async def auto(live: Live, notes: Notes, figures: Figures) -> None:
    """Spare workers start together while a job runs, and choose."""
    best = best_assignment(AUTO_COST, SPARE)
    figures[BEST_BOUND] = bound(AUTO_COST, best)
    await serve(live, [1] * 4, AUTO_COST)
    job = await live.begin(rows_for((5 * SETTLE_S + ROWS_END_S + (WINDOWS + 1) * WINDOW_S) * figures[BEST_BOUND]))
    await asyncio.sleep(SETTLE_S)
    for _ in range(SPARE):
        live.start(None, AUTO_COST)
    chosen = served(await live.look())
    await asyncio.sleep(ROWS_END_S + SETTLE_S)
    seen = await live.windows()
    figures |= {AUTO: seen.rate, CORES: seen.ours}
    check(await job.ended())
    notes.put("consumers of each stage, chosen", f"{chosen}, the best are {list(best)}")
    notes.put(AUTO, seen.told())


async def by_hand(live: Live, notes: Notes, figures: Figures) -> None:
    """The same number of workers, where they are best from the beginning."""
    best = best_assignment(AUTO_COST, SPARE)
    await serve(live, best, AUTO_COST)
    seen = await steady(live, bound(AUTO_COST, best))
    figures |= {BY_HAND: seen.rate, CORES: seen.ours}
    notes.put(BY_HAND, seen.told())


# -- what scenarios share ------------------------------------------------------------------------


def bound(cost: Cost, consumers: Sequence[int]) -> float:
    """Positions per second of a pipeline whose stages' consumers never wait."""
    return min(count / seconds for seconds, count in zip(cost, consumers, strict=True))


def best_assignment(cost: Cost, spare: int) -> tuple[int, ...]:
    """Consumers of each stage, one and what it has of the `spare` ones, with the highest bound there is."""
    stages = len(cost)
    assignments = (
        tuple(after - before for before, after in zip((-1, *bars), (*bars, spare + stages - 1), strict=True))
        for bars in combinations(range(spare + stages - 1), stages - 1)
    )
    return max(assignments, key=lambda consumers: bound(cost, consumers))


async def serve(live: Live, consumers: Sequence[int], cost: Cost) -> None:
    """As many consumers of each stage, those that are missing started."""
    there = served(await live.look()) if live.serving else [0] * len(consumers)
    for stage, (count, have) in enumerate(zip(consumers, there, strict=True)):
        for _ in range(count - have):
            live.start(stage, cost)
    await live.until(consumers)


async def steady(live: Live, bound: float) -> Seen:
    """What a job's middle shows. Raises: WrongWork where a row came out wrong."""
    job = await live.begin(rows_for((SETTLE_S + (WINDOWS + 1) * WINDOW_S) * bound))
    await asyncio.sleep(SETTLE_S)
    seen = await live.windows()
    check(await job.ended())
    return seen


def rows_for(positions: float) -> list[dict[str, Any]]:
    """Rows of a job that computes about so many positions, and those of the coordinator's first filling."""
    rng = Random(1)
    mean = PROMPT_TOKENS - 1 + sum(OUTPUT_TOKENS) / 2
    count = round(positions / mean) + FOUR_ROWS
    prompt = list(range(100, 100 + PROMPT_TOKENS))
    return [{"prompt": prompt, "max_tokens": rng.randint(*OUTPUT_TOKENS)} for _ in range(count)]


def outcome(results: Results) -> Figures:
    """Rows that are not as they should be. A sleeping pipeline's token is its position: all texts begin alike."""
    longest = max(results.texts.values(), key=len)
    astray = sum(not longest.startswith(text) for text in results.texts.values())
    return {LOST: results.lost, REPEATED: results.repeated, WRONG: results.wrong + astray}


def check(results: Results) -> None:
    """Raises: WrongWork."""
    if any(found := outcome(results).values()):
        raise WrongWork(f"of {len(results.texts)} rows so many were lost, repeated, wrong: {list(found)}")


# -- cases ---------------------------------------------------------------------------------------


ROWS = load(CoordinatorSettings).rows
WORK = (
    "Real RabbitMQ, coordinator, `mqinfer batch` and `mqinfer worker`, but a forward sleeps as long as is stated for "
    f"each new position instead of computing. {PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS[0]} to {OUTPUT_TOKENS[1]} "
    f"out. Figures are the middle of {WINDOWS} windows of {WINDOW_S:.0f} s, as workers report. Rows in flight: "
)
RATE = "positions/s"


def cases(name: str) -> list[Case]:
    """Of all scenarios, and what the processor had to do in them."""
    notes = {scenario: Notes() for scenario in (second_consumer, four_each, unlike, auto, by_hand)}
    hot, each, alike_not, chosen, placed = (
        Rounds(partial(_play, scenario, stages, rows, notes[scenario]))
        for scenario, stages, rows in (
            (second_consumer, 4, ROWS),
            (four_each, 4, FOUR_ROWS),
            (unlike, 3, ROWS),
            (auto, 4, ROWS),
            (by_hand, 4, ROWS),
        )
    )
    hot_work = f"{WORK}{ROWS}. 2 ms a position, 4 ms at stage 2. A consumer is added there, and taken away by SIGTERM."
    cores = [
        (rounds, f"{CORES}: {scenario.__name__}")
        for rounds, scenario in ((hot, second_consumer), (each, four_each), (alike_not, unlike), (chosen, auto))
    ]
    return [
        Case(
            f"{name}: a second consumer",
            hot_work,
            RATE,
            hot.contenders(ONE, ONE_BOUND, TWO, TWO_BOUND, ONE_AGAIN),
            [Goal(TWO, TWO_BOUND, ADDED_SHARE)],
            warmups=0,
            notes=notes[second_consumer],
        ),
        Case(
            f"{name}: how soon",
            hot_work,
            "s",
            hot.contenders(REACTION),
            [Limit(REACTION, ADDED_S, at_most=True)],
            warmups=0,
        ),
        Case(
            f"{name}: what is lost",
            hot_work,
            "rows",
            hot.contenders(CAME, WENT, LOST, REPEATED, WRONG),
            [Limit(what, 0, at_most=True) for what in (CAME, LOST, REPEATED, WRONG)],
            warmups=0,
        ),
        Case(
            f"{name}: 1 to 4 consumers",
            f"{WORK}{FOUR_ROWS}. 8 ms a position at each of 4 stages; a job with one consumer at each, then one with "
            "four.",
            RATE,
            each.contenders(EACH_1, EACH_4),
            [Goal(EACH_4, EACH_1, 3.4)],
            warmups=0,
            notes=notes[four_each],
        ),
        Case(
            f"{name}: unlike consumers",
            f"{WORK}{ROWS}. 3 stages; the middle one has consumers that take 12, 6 and 3 ms a position, the others are "
            "quick.",
            RATE,
            alike_not.contenders(UNLIKE, UNLIKE_BOUND),
            [Goal(UNLIKE, UNLIKE_BOUND, 0.9)],
            warmups=0,
            notes=notes[unlike],
        ),
        Case(
            f"{name}: stage auto",
            f"{WORK}{ROWS}. {', '.join(f'{1e3 * cost:.0f}' for cost in AUTO_COST)} ms a position at 4 stages with one "
            f"worker each; {SPARE} more join while the job runs, and are seen {ROWS_END_S + SETTLE_S:.0f} s later, "
            "when the rows of before have ended. The best assignment is that of all with the highest bound.",
            RATE,
            [*chosen.contenders(AUTO), *placed.contenders(BY_HAND), *chosen.contenders(BEST_BOUND)],
            [Goal(AUTO, BY_HAND, 0.9), Goal(AUTO, BEST_BOUND, 0.9)],
            warmups=0,
            notes=notes[auto],
        ),
        elasticity_model.case(f"{name}: SmolLM2"),
        Case(
            f"{name}: processor",
            "What all processes of a scenario took of this machine's cores while it was measured: too much, and it "
            "would be the processor that binds.",
            "of the cores",
            [contender for rounds, figure in cores for contender in rounds.contenders(figure)],
            [Limit(figure, MOST_CORES, at_most=True) for _, figure in cores],
            warmups=0,
        ),
    ]


def _play(scenario: Scenario, stages: int, rows: int, notes: Notes) -> Figures:
    """Raises: see `live.play`."""
    figures: Figures = {}
    play(
        lambda live: scenario(live, notes, figures),
        lambda folder: make_plan(folder, stages, "bfloat16"),
        sleeping=True,
        rows=str(rows),
    )
    figures[f"{CORES}: {scenario.__name__}"] = figures.pop(CORES)
    for what, value in figures.items():
        say(f"{scenario.__name__}: {what}: {value:,.4g}")
    return figures
