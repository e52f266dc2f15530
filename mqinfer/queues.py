"""Names and arguments of every queue and exchange; nowhere else is a queue name built.

Every message goes straight to a queue, but for `Ask`, which fans out: through a direct exchange for each kind of
reader (`exchange_of`), because what a user of the broker may write to is an exchange (permissions.py).
Why each queue is what it is stands in docs/protocol.md. No RabbitMQ client may be imported here.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from functools import lru_cache

from mqinfer.errors import SettingsError

#: Priorities inside the requests queue: checkpoints that come back go before what has not begun.
PRIORITY_NEW = 0
PRIORITY_BEGUN = 1

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)
#: A queue of a pipeline, and who reads it. The name of a pipeline may have dots, an id has none.
_QUEUE = re.compile(
    r"(?P<pipeline>mqinfer\..+)\.(?:(?P<alone>requests|dead)|stage\.(?P<stage>\d+)"
    r"|worker\.s(?P<worker>\d+)-[^.]+|(?P<role>coordinator|leases|reports)\.[^.]+)",
    re.ASCII,
)
RESULTS = "mqinfer.results."
#: Through it go results: a job is no pipeline's.
RESULTS_EXCHANGE = "mqinfer.to.results"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSpec:
    """A queue to declare. Declaring it twice alike is harmless; unlike, the broker refuses."""

    name: str
    #: Survives a restart of the broker; exclusive queues never do.
    durable: bool = True
    #: Lives as long as the connection that declared it: that it exists shows that its owner lives.
    exclusive: bool = False
    #: 0: no priorities.
    max_priority: int = 0
    #: Ready messages older than this go to `dead_letter_to` (or vanish); None: never.
    message_ttl_s: float | None = None
    #: The queue goes when nobody has used it for so long; None: never. What it holds is lost then.
    expires_s: float | None = None
    #: The queue that gets what is rejected or expires.
    dead_letter_to: str | None = None
    #: Fan-out exchange whose messages it also gets.
    fanout: str | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """The queues of the pipeline called `name`."""

    name: str

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def prefix(self) -> str:
        """What the names of all its queues and exchanges begin with."""
        return f"mqinfer.{self.name}"

    @property
    def requests(self) -> QueueSpec:
        """Durable: every request that no coordinator holds."""
        return QueueSpec(name=f"{self.prefix}.requests", max_priority=PRIORITY_BEGUN, dead_letter_to=self.dead.name)

    @property
    def dead(self) -> QueueSpec:
        """Durable: bodies that could not be read, with the reason in the header `reason`."""
        return QueueSpec(name=f"{self.prefix}.dead")

    def stage(self, index: int) -> QueueSpec:
        """Durable queue, transient messages: microbatches on their first trip, for whoever is free."""
        return QueueSpec(name=f"{self.prefix}.stage.{index}")

    def worker(self, worker: str) -> QueueSpec:
        """Exclusive: the steps of microbatches whose keys and values this worker holds."""
        return QueueSpec(name=f"{self.prefix}.worker.{worker}", durable=False, exclusive=True, fanout=self.control)

    def coordinator(self, coordinator: str) -> QueueSpec:
        """Exclusive: the ends of trips."""
        return QueueSpec(
            name=f"{self.prefix}.coordinator.{coordinator}", durable=False, exclusive=True, fanout=self.control
        )

    def leases(self, coordinator: str) -> QueueSpec:
        """Durable: checkpoints that this coordinator holds; when it dies they expire into `requests` at once."""
        return QueueSpec(
            name=f"{self.prefix}.leases.{coordinator}",
            message_ttl_s=5.0,
            expires_s=3600.0,
            dead_letter_to=self.requests.name,
        )

    def reports(self, asker: str) -> QueueSpec:
        """Exclusive: answers to `Ask`."""
        return QueueSpec(name=f"{self.prefix}.reports.{asker}", durable=False, exclusive=True)

    @property
    def choosing(self) -> QueueSpec:
        """Exclusive and always empty: who has it chooses a stage, and nobody else does."""
        return QueueSpec(name=f"{self.prefix}.choosing", durable=False, exclusive=True)

    @property
    def control(self) -> str:
        """Fan-out exchange that every actor of the pipeline listens to."""
        return f"{self.prefix}.control"

    def shared(self, stages: int) -> tuple[QueueSpec, ...]:
        """The queues that outlive every process, in the order of declaring."""
        return (self.dead, self.requests, *(self.stage(index) for index in range(stages)))

    def exchanges(self, stages: int) -> tuple[str, ...]:
        """The direct exchanges that lead to its queues and to results; `control` is beside them."""
        passing = (self.coordinator("id"), self.leases("id"), self.reports("id"))
        return (*(exchange_of(spec.name) for spec in (*self.shared(stages), *passing)), RESULTS_EXCHANGE)


def results(job: str) -> QueueSpec:
    """Durable: the results of a job, until they are collected."""
    check_name(job)
    return QueueSpec(name=f"{RESULTS}{job}")


@lru_cache(maxsize=4096)
def exchange_of(queue: str) -> str:
    """The direct exchange that leads to a queue, which is bound to it by its own name; "": the default exchange.

    A worker's own queue shares the exchange of its stage's, so that who may write to a stage may follow a route.
    """
    found = _QUEUE.fullmatch(queue)
    if found is None:
        return RESULTS_EXCHANGE if queue.startswith(RESULTS) else ""
    stage = found["stage"] or found["worker"]
    return f"{found['pipeline']}.to.{found['alone'] or found['role'] or f'stage.{stage}'}"


def new_id(prefix: str) -> str:
    """A fresh name, such as `w1-3f9a0c1d2e`, for an actor's connection or a job."""
    return f"{prefix}-{secrets.token_hex(5)}"


def check_name(name: str) -> None:
    """Raises SettingsError unless `name` can be part of a queue's name."""
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} can't be a name: lower-case letters, digits, '.', '_' and '-', at most 63, "
            "beginning and ending with a letter or digit"
        )
