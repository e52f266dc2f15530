"""What a transport promises: the contract in words, proved by tests/contract for every transport.

A `Transport` is one actor's link to a broker and lives in one event loop.

* **publish** returns when the broker has taken responsibility (confirmed and routed). `Unroutable` says that
  the queue does not exist and the message is nowhere; `Disconnected` says that it may or may not be there.
* **consume** hands each delivery to `sink`, a plain function that must only store it. At most `prefetch`
  deliveries of a subscription are unsettled at any time. A queue's messages of one priority come in order.
* A delivery is settled once, by `ack` or `requeue`. What is unsettled when the link ends (or was handed to a
  subscription that is cancelled and then requeued) is delivered again, with `redelivered` set, near its old place.
* What the broker's user may not do is Forbidden. A queue that is there need not be ours to make: `declare` is content.
  A publish that is forbidden ends the link: `closed()` raises Forbidden then.
* A link that is lost is lost for good: `closed()` raises `Disconnected`, every call raises it, exclusive queues are
  gone. The actor opens a new transport and starts afresh; nothing reconnects under its feet. A consumer
  cancelled by the broker (queue deleted, consumer timeout) ends the link in the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mqinfer.queues import QueueSpec


class Delivery(Protocol):
    """One message, ours until settled."""

    @property
    def body(self) -> bytes: ...
    @property
    def queue(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def redelivered(self) -> bool: ...

    async def ack(self) -> None:
        """The message is done with and goes. Raises: Disconnected (it will be delivered again)."""

    async def requeue(self) -> None:
        """The message goes back, for anyone. Raises: Disconnected (it goes back all the same)."""


Sink = Callable[[Delivery], None]


class Subscription(Protocol):
    """A running consumer."""

    async def cancel(self) -> None:
        """No delivery reaches the sink after this returns; those it already got are still ours to settle."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """What the broker says of a queue."""

    #: Messages that wait for a consumer.
    ready: int
    consumers: int


@dataclass(frozen=True, slots=True)
class Blockage:
    """How a broker short of memory or disk holds up who publishes."""

    #: What the broker says is wrong just now; "" where it takes everything.
    reason: str = ""
    #: How long it took nothing from this link, over its whole life.
    total_s: float = 0.0


class Transport(Protocol):
    """One actor's link to the broker. See the module's docstring."""

    async def declare(self, spec: QueueSpec) -> None:
        """Make the queue (and its exchanges) if it is not there. Raises: Refused if it differs."""

    async def declare_exchange(self, name: str, *, fanout: bool = False) -> None:
        """Make the exchange if it is not there, ahead of its queues and for who may not make it. Raises: Forbidden."""

    async def publish(
        self,
        queue: str,
        body: bytes,
        *,
        persistent: bool = False,
        priority: int = 0,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Waits while the broker has an alarm, see `blockage`. Raises: Unroutable, Disconnected."""

    async def broadcast(self, exchange: str, body: bytes) -> None:
        """To every queue bound to the fan-out exchange; nobody there is no error. Raises: Disconnected."""

    async def consume(self, queue: str, *, prefetch: int, sink: Sink) -> Subscription:
        """`prefetch` 0 means no limit. Raises: Unroutable where the queue does not exist."""

    async def inspect(self, queue: str) -> QueueState | None:
        """None where the queue does not exist."""

    async def purge(self, queue: str) -> int:
        """Remove what is ready; how many there were. Raises: Unroutable."""

    async def delete(self, queue: str) -> int:
        """Remove the queue; how many ready messages went with it. Nothing happens where it does not exist."""

    def blockage(self) -> Blockage:
        """Whether the broker keeps this link from publishing, and how long it did."""

    async def closed(self) -> None:
        """Waits until the link ends; raises Disconnected if it was lost, returns after `close`."""

    async def close(self) -> None:
        """Ends the link; unsettled deliveries go back to their queues. Never raises."""


def cancelling() -> int:
    """How often somebody has asked for the cancellation of the task that runs; what else cancels it is no request."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0
