"""What a seed stands for: the fleet, the load, the weather and the faults of one run. All of it is drawn here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from simulation.network import Weather


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a job."""

    length: int
    max_tokens: int
    #: "raises" or "kills": what computing it does to a worker, every time, once it is so many positions long.
    poison: str = ""
    poison_at: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """A batch that a producer asks for."""

    prompts: Sequence[Prompt]
    starts_s: float
    window: int
    #: Its owner kills it and deletes its results queue; None: never.
    cancelled_s: float | None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is done to the run at that moment; `target` picks whom, `number` says how much."""

    kind: str
    at_s: float
    target: float
    number: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run."""

    seed: int
    #: Seconds per forward of each worker, by stage.
    workers: Sequence[Sequence[float]]
    coordinators: int
    jobs: Sequence[Job]
    weather: Weather
    faults: Sequence[Fault]
    #: When the last fault is over: then everything is mended.
    healed_s: float
    budget_tokens: int
    rows: int
    microbatch_rows: int
    step_tokens: int
    open_trips: int
    checkpoint_s: float
    lease_s: float
    probe_s: float
    step_timeout_s: float
    idle_s: float
    drain_s: float
    codec: str


#: What is done, and how likely it is in one draw.
FAULTS: dict[str, float] = {
    "kill worker": 4,
    "kill coordinator": 3,
    "kill producer": 2,
    "kill all coordinators": 0.5,
    "drain worker": 2,
    "drain coordinator": 1.5,
    "stop producer": 1,
    "pause": 3,
    "cut link": 3,
    "stall link": 2,
    "crash broker": 1.5,
    "alarm": 1,
    "evict": 3,
    "delete queue": 0.5,
    "garbage": 1,
    "out of memory": 1,
}


@dataclass(frozen=True, slots=True)
class Size:
    """What the parts of a scenario are drawn from, each as likely as it stands there."""

    stages: Sequence[int]
    workers: Sequence[int]
    coordinators: Sequence[int]
    jobs: Sequence[int]
    prompts: Sequence[int]
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int]


#: Most orders of events that matter need few actors: small runs are many for their price, large ones show the rest.
SMALL = Size((1, 2, 2, 3), (1, 1, 2), (1, 1, 2), (1, 1, 1, 2), (1, 2, 3), (4, 12), (3, 6))
LARGE = Size(
    (1, 2, 2, 3, 3, 4, 5, 6), (1, 1, 1, 2, 2, 3, 4), (1, 1, 2, 2, 3), (1, 1, 1, 2, 3), (3, 8), (4, 12, 90), (3, 6, 12)
)
SMALL_SHARE = 0.7
#: Chains of single workers with rows enough for their microbatches to even them out.
CHAIN = Size((2, 2, 3), (1,), (1, 1, 2), (1,), (12, 24), (4, 12), (3, 12, 24))
CHAIN_SHARE = 0.1


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    random = Random(f"scenario {seed}")
    size = SMALL if random.random() < SMALL_SHARE else LARGE
    stages = random.choice(size.stages)
    heartbeat_s = random.choice((1.0, 3.0))
    faulty_s = random.uniform(3, 15)
    faults = _faults(random, faulty_s)
    longest_s = max((f.number for f in faults if f.kind in ("pause", "alarm", "crash broker")), default=0.0)
    impatient = random.random() < 0.2 and not any(fault.kind == "alarm" for fault in faults)
    timeout_s = random.uniform(9, 15) if impatient else None
    step_timeout_s = random.uniform(4, 8)
    scenario = Scenario(
        seed=seed,
        workers=[_workers(random, size) for _ in range(stages)],
        coordinators=random.choice(size.coordinators),
        jobs=_jobs(random, size, faulty_s),
        weather=_weather(random, heartbeat_s, timeout_s),
        faults=faults,
        healed_s=faulty_s + longest_s,
        budget_tokens=random.choice((128, 256, 1024, 4096)),
        rows=random.choice((2, 4, 8, 32)),
        microbatch_rows=random.choice((1, 3, 8, 16)),
        step_tokens=random.choice((4, 16, 256)),
        open_trips=random.choice((4, 256)),
        checkpoint_s=random.choice((0.3, 1.0, 5.0)),
        lease_s=min(random.choice((1.0, 3.0, 30.0)), timeout_s / 6 if timeout_s else 30.0),
        probe_s=random.choice((0.5, 1.0, 2.0)),
        step_timeout_s=step_timeout_s,
        idle_s=step_timeout_s + random.uniform(1, 4),
        drain_s=random.choice((0.0, 1.0, 5.0)),
        codec=random.choice(("raw", "raw", "raw", "lossless")),
    )
    return _chain(random, scenario, faulty_s) if random.random() < CHAIN_SHARE else scenario


def _chain(random: Random, scenario: Scenario, faulty_s: float) -> Scenario:
    """The same in which mostly all rows are under way at once."""
    return replace(
        scenario,
        workers=[_workers(random, CHAIN) for _ in range(random.choice(CHAIN.stages))],
        coordinators=random.choice(CHAIN.coordinators),
        jobs=_jobs(random, CHAIN, faulty_s),
        budget_tokens=4096,
        rows=32,
        microbatch_rows=16,
    )


def _workers(random: Random, size: Size) -> list[float]:
    count = random.choice(size.workers)
    return [random.uniform(0.02, 0.3) * random.choice((1, 1, 3)) for _ in range(count)]


def _jobs(random: Random, size: Size, faulty_s: float) -> list[Job]:
    jobs = []
    for _ in range(random.choice(size.jobs)):
        prompts = [_prompt(random, size) for _ in range(random.randint(1, random.choice(size.prompts)))]
        starts_s = random.uniform(0, faulty_s / 2)
        cancelled_s = starts_s + random.uniform(0, faulty_s / 2) if random.random() < 0.1 else None
        jobs.append(Job(prompts, starts_s, random.choice((2, 8, 64)), cancelled_s))
    return jobs


def _prompt(random: Random, size: Size) -> Prompt:
    length = random.randint(1, random.choice(size.prompt_tokens))
    max_tokens = random.randint(1, random.choice(size.output_tokens))
    poison = random.choice(("raises", "kills")) if random.random() < 0.02 else ""
    return Prompt(length, max_tokens, poison, random.randint(0, length + max_tokens - 2))


def _weather(random: Random, heartbeat_s: float, consumer_timeout_s: float | None) -> Weather:
    rough = random.random() < 0.5
    return Weather(
        latency_s=random.choice((0.0005, 0.002, 0.05)),
        late=random.choice((0.0, 0.01)) if rough else 0.0,
        reordered=random.choice((0.0, 0.01, 0.05)) if rough else 0.0,
        duplicated=random.choice((0.0, 0.01, 0.05)) if rough else 0.0,
        heartbeat_s=heartbeat_s,
        timeout_s=random.uniform(2, 6),
        consumer_timeout_s=consumer_timeout_s,
        forgets_new_queues=random.random() < 0.2,
    )


def _faults(random: Random, faulty_s: float) -> list[Fault]:
    kinds = list(FAULTS)
    weights = [FAULTS[kind] for kind in kinds]
    count = random.choice((0, 1, 2, 3, 4, 6))
    drawn = random.choices(kinds, weights, k=count)
    length: dict[str, Callable[[], float]] = {
        "pause": lambda: random.choice((0.3, 2.0, 5.0, 8.0)) * random.uniform(0.5, 1.5),
        "alarm": lambda: random.uniform(0.5, 8),
        "crash broker": lambda: random.uniform(0.2, 4),
    }
    return sorted(
        (
            Fault(kind, random.uniform(0, faulty_s), random.random(), length.get(kind, random.random)())
            for kind in drawn
        ),
        key=lambda fault: fault.at_s,
    )
