"""Names and arguments of every queue and exchange; nowhere else is a queue name built.

Every message goes through the default exchange straight to a queue, but for `Ask`, which fans out.
Why each queue is what it is stands in docs/protocol.md. No RabbitMQ client may be imported here.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from mqinfer.errors import SettingsError

#: Priorities inside the requests queue: checkpoints that come back go before what has not begun.
PRIORITY_NEW = 0
PRIORITY_BEGUN = 1

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)


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
    def requests(self) -> QueueSpec:
        """Durable: every request that no coordinator holds."""
        return QueueSpec(
            name=f"mqinfer.{self.name}.requests", max_priority=PRIORITY_BEGUN, dead_letter_to=self.dead.name
        )

    @property
    def dead(self) -> QueueSpec:
        """Durable: bodies that could not be read, with the reason in the header `reason`."""
        return QueueSpec(name=f"mqinfer.{self.name}.dead")

    def stage(self, index: int) -> QueueSpec:
        """Durable queue, transient messages: microbatches on their first trip, for whoever is free."""
        return QueueSpec(name=f"mqinfer.{self.name}.stage.{index}")

    def worker(self, worker: str) -> QueueSpec:
        """Exclusive: the steps of microbatches whose keys and values this worker holds."""
        return QueueSpec(
            name=f"mqinfer.{self.name}.worker.{worker}", durable=False, exclusive=True, fanout=self.control
        )

    def coordinator(self, coordinator: str) -> QueueSpec:
        """Exclusive: the ends of trips."""
        return QueueSpec(
            name=f"mqinfer.{self.name}.coordinator.{coordinator}", durable=False, exclusive=True, fanout=self.control
        )

    def leases(self, coordinator: str) -> QueueSpec:
        """Durable: checkpoints that this coordinator holds; when it dies they expire into `requests` at once."""
        return QueueSpec(
            name=f"mqinfer.{self.name}.leases.{coordinator}",
            message_ttl_s=5.0,
            expires_s=3600.0,
            dead_letter_to=self.requests.name,
        )

    def reports(self, asker: str) -> QueueSpec:
        """Exclusive: answers to `Ask`."""
        return QueueSpec(name=f"mqinfer.{self.name}.reports.{asker}", durable=False, exclusive=True)

    @property
    def choosing(self) -> QueueSpec:
        """Exclusive and always empty: who has it chooses a stage, and nobody else does."""
        return QueueSpec(name=f"mqinfer.{self.name}.choosing", durable=False, exclusive=True)

    @property
    def control(self) -> str:
        """Fan-out exchange that every actor of the pipeline listens to."""
        return f"mqinfer.{self.name}.control"

    def shared(self, stages: int) -> tuple[QueueSpec, ...]:
        """The queues that outlive every process, in the order of declaring."""
        return (self.dead, self.requests, *(self.stage(index) for index in range(stages)))


def results(job: str) -> QueueSpec:
    """Durable: the results of a job, until they are collected."""
    check_name(job)
    return QueueSpec(name=f"mqinfer.results.{job}")


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
