"""The dead letters of a pipeline: looked at without taking them away, sent back where they came from, thrown away.

A letter is a body that nobody could use, as it was, with the headers `reason` and `queue`. What is told of it are its
kind and counts, never a text or a token. How it is shown belongs to the doors.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mqinfer.errors import Refused, TransportError, Unroutable, WireError
from mqinfer.messages import KINDS, Ask, JobTotal, Message, Release, Report, Request, Result, Step, StepDone
from mqinfer.queues import PRIORITY_BEGUN, PRIORITY_NEW, Topology
from mqinfer.transports.base import Delivery, Transport
from mqinfer.wire import MAGIC, PREFIX_BYTES, decode

#: What the broker says is ready comes within this; what does not is in somebody else's hands.
ARRIVAL_S = 2.0

_KIND_OF: Mapping[type, str] = {kind: name for name, kind in KINDS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One dead letter, ours until it is settled."""

    #: Its place in the queue, the oldest is 1.
    number: int
    delivery: Delivery
    #: The queue that it came from; "" where it does not say.
    queue: str
    #: Why nobody could use it; "" where it does not say.
    reason: str
    #: None where the body can't be read.
    message: Message | None

    @property
    def kind(self) -> str:
        """The kind of its message; "" where the body can't be read."""
        return "" if self.message is None else _KIND_OF[type(self.message)]

    @property
    def body_bytes(self) -> int:
        """How long its body is."""
        return len(self.delivery.body)

    def facts(self) -> dict[str, str]:
        """What may be told of its message: ids and counts."""
        facts = {} if self.message is None else _facts(self.message)
        return {name: printable(str(value)) for name, value in facts.items()}

    def prefix(self) -> bytes:
        """The beginning of the body: the prefix of ours; of anything else, which may be text, just four bytes."""
        body = self.delivery.body
        return body[: PREFIX_BYTES if body.startswith(MAGIC) else len(MAGIC)]


@dataclass(slots=True)
class Taken:
    """Letters in our hands, in their order; what is not settled goes back to its place."""

    letters: Sequence[Letter]
    #: How many there were in all when we looked.
    total: int
    _settled: set[int] = field(default_factory=set)

    async def remove(self, letter: Letter) -> None:
        """The letter is done with. Raises: Disconnected."""
        await letter.delivery.ack()
        self._settled.add(letter.number)

    def left(self) -> list[Letter]:
        """Those that go back."""
        return [letter for letter in self.letters if letter.number not in self._settled]


@asynccontextmanager
async def taken(transport: Transport, topology: Topology, limit: int) -> AsyncIterator[Taken]:
    """The oldest letters, at most `limit`; at the end those that were not removed are dead letters as before.

    While they are held nobody else sees them; where this process dies the broker has them back. Raises: TransportError.
    """
    queue = topology.dead.name
    state = await transport.inspect(queue)
    total = 0 if state is None else state.ready
    deliveries = await _take(transport, queue, min(limit, total)) if total else []
    found = Taken([read(number, delivery) for number, delivery in enumerate(deliveries, 1)], total)
    try:
        yield found
    finally:
        with contextlib.suppress(TransportError):  # they go back by themselves then
            for letter in found.left():
                await letter.delivery.requeue()


async def _take(transport: Transport, queue: str, count: int) -> list[Delivery]:
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    subscription = await transport.consume(queue, prefetch=count, sink=arrived.put_nowait)
    deliveries: list[Delivery] = []
    with contextlib.suppress(TimeoutError):
        while len(deliveries) < count:
            async with asyncio.timeout(ARRIVAL_S):
                deliveries.append(await arrived.get())
    await subscription.cancel()
    while not arrived.empty():
        deliveries.append(arrived.get_nowait())
    return deliveries


def read(number: int, delivery: Delivery) -> Letter:
    """What the delivery says; the reason may have been the pipeline's, so a body may well be readable."""
    try:
        message = decode(delivery.body)
    except WireError:
        message = None
    queue, reason = (printable(delivery.headers.get(name, "")) for name in ("queue", "reason"))
    return Letter(number=number, delivery=delivery, queue=queue, reason=reason, message=message)


async def send_back(transport: Transport, topology: Topology, letter: Letter) -> str:
    """Publish a letter to the queue that it came from. Why that is no use, or "" when it is there, confirmed.

    The letter itself stays: it is to be removed when this said "". Raises: Disconnected.
    """
    ours = (f"mqinfer.{topology.name}.", "mqinfer.results.")
    if not letter.queue.startswith(ours) or letter.queue == topology.dead.name:
        return (
            f"it came from {letter.queue}, no queue of this pipeline" if letter.queue else "it does not say its queue"
        )
    if isinstance(letter.message, Step) and not await _exists(transport, letter.message.owner):
        return "its coordinator is gone: who replays its rows is another one, which knows nothing of this step"
    message = letter.message
    try:
        await transport.publish(
            letter.queue,
            letter.delivery.body,
            persistent=message is None or isinstance(message, Request | Result | JobTotal),
            priority=PRIORITY_BEGUN if isinstance(message, Request) and message.output else PRIORITY_NEW,
            ttl_s=message.ttl_s or None if isinstance(message, Step) else None,
        )
    except Unroutable:
        return f"the queue {letter.queue} is gone" + _owner(topology, letter.queue)
    return ""


def _owner(topology: Topology, queue: str) -> str:
    for role in ("worker", "coordinator"):
        if queue.startswith(f"mqinfer.{topology.name}.{role}."):
            return f" with its {role}: its rows are computed again elsewhere"
    return ""


async def _exists(transport: Transport, queue: str) -> bool:
    try:
        return await transport.inspect(queue) is not None
    except Refused:  # another link owns it
        return True


def printable(text: str) -> str:
    """Without what could play tricks on a terminal: anybody may have written it."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _facts(message: Message) -> Mapping[str, object]:
    match message:
        case Request():
            counts = {"prompt tokens": len(message.prompt), "output tokens": len(message.output)}
            own = {"id": message.id, "job": message.job, "plan": message.plan, **counts}
            return own | {"max_tokens": message.max_tokens, "failures": message.failures}
        case Step():
            return _step_facts(message)
        case StepDone():
            own = {"plan": message.plan, "microbatch": message.microbatch, "number": message.number}
            return own | {"sampled": len(message.sampled), "misses": len(message.misses), "closing": message.closing}
        case Release():
            return {"plan": message.plan, "owner": message.owner, "rows": len(message.rows)}
        case Result():
            own = {"id": message.id, "job": message.job, "finish reason": message.finish_reason.value}
            counts = {"prompt tokens": message.prompt_tokens, "output tokens": len(message.output)}
            return own | counts | ({"error code": message.error_code} if message.error_code else {})
        case JobTotal():
            return {"job": message.job, "total": message.total}
        case Ask():
            return {"plan": message.plan, "reply to": message.reply_to}
        case Report():
            return {"role": message.role, "id": message.id, "stage": message.stage}
        case _:
            return {"plan": message.plan}


def _step_facts(step: Step) -> Mapping[str, object]:
    hidden = step.hidden
    return {
        "plan": step.plan,
        "owner": step.owner,
        "microbatch": step.microbatch,
        "number": step.number,
        "stage": step.stage,
        "workers on its route": len(step.route),
        "rows": len(step.rows),
        "new positions": sum(row.count for row in step.rows),
        "misses": len(step.misses),
        "hidden": "none" if hidden is None else f"{hidden.codec}, {hidden.dtype}, {list(hidden.shape)}",
    }
