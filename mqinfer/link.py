"""An actor's link to the broker: opened, lost, opened again; and the little that every actor does alike over it.

An actor is a function of a Transport that runs until it is told to stop. When its link is lost it starts afresh with
a new one: what it held is with others by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_never, wait_random_exponential

from mqinfer.errors import Refused, TransportError, Unroutable
from mqinfer.observe import BODY_REFUSED, LINK_LOST, LINK_OPENED, emit
from mqinfer.queues import QueueSpec
from mqinfer.transports.base import Delivery, Transport, cancelling

Connect = Callable[[], Awaitable[Transport]]

#: The longest pause after one failure in a row; it doubles with each, up to the most.
BACKOFF_FIRST_S = 0.2
BACKOFF_MOST_S = 10.0
#: How long a link that is no longer wanted may take to be given up.
ABANDON_S = 5.0


def now_s() -> float:
    """The event loop's clock: monotonic, and the only one that an actor measures deadlines and durations by."""
    return asyncio.get_running_loop().time()


async def keep_linked(
    actor: str, connect: Connect, session: Callable[[Transport], Awaitable[None]], stop: asyncio.Event
) -> None:
    """Run `session` over a link, and again over a new one each time the link is lost, until it returns.

    `session` itself must end when `stop` is set; between two links this function sees to it.
    Raises: Refused if the first link can't be opened, or the broker refuses what a session declares: a wrong
    address, password or queue does not mend itself.
    """
    before = cancelling()
    transport = await _linked(stop, connect())
    short = 0
    while transport is not None:
        emit(LINK_OPENED, actor=actor)
        began_s = now_s()
        try:
            # In a task of its own: Python 3.11's TaskGroup leaves its task counted as cancelled when it has failed.
            await asyncio.create_task(_run(session, transport))
            return
        except* Refused:
            raise
        except* TransportError as group:
            emit(LINK_LOST, actor=actor, error=str(first(group)))
        finally:
            await transport.close()
        if cancelling() > before:  # a cancellation that met the loss came out of the session as the loss alone
            raise asyncio.CancelledError
        short = 0 if now_s() - began_s > BACKOFF_MOST_S else short + 1
        transport = await _linked(stop, reopen(connect, short))


async def _run(session: Callable[[Transport], Awaitable[None]], transport: Transport) -> None:
    await session(transport)


async def reopen(connect: Connect, short: int = 0) -> Transport:
    """A new link; at once, unless so many sessions in a row, more than one, were short."""
    retrying = AsyncRetrying(wait=backoff(), stop=stop_never, retry=retry_if_exception_type(TransportError))
    if short > 1:
        earlier = RetryCallState(retrying, None, (), {})
        earlier.attempt_number = short - 1
        await asyncio.sleep(retrying.wait(earlier))
    return await retrying(connect)


def backoff() -> wait_random_exponential:
    """How long to pause after so many failures in a row: anything between nothing and what doubles each time.

    All of it is drawn, not a little on top: a fleet that lost its broker together must not come back together
    (Brooker, "Exponential Backoff And Jitter", 2015: full jitter).
    """
    return wait_random_exponential(multiplier=BACKOFF_FIRST_S, max=BACKOFF_MOST_S)


async def _linked(stop: asyncio.Event, connecting: Awaitable[Transport]) -> Transport | None:
    """The link, or None if `stop` is set before; then none is left open."""
    task = asyncio.ensure_future(connecting)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        await _abandon(task)
        raise
    finally:
        stopped.cancel()
    if task.done():
        return await task
    await _abandon(task)
    return None


async def _abandon(task: asyncio.Future[Transport]) -> None:
    """End it; what opens all the same, because a client swallows the cancellation, is closed, if it is not too late."""
    task.cancel()
    await asyncio.wait({task}, timeout=ABANDON_S)
    if task.done() and not task.cancelled() and task.exception() is None:
        await task.result().close()


def first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception in a group, for people to read."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


async def bury(transport: Transport, dead: QueueSpec, delivery: Delivery, reason: str) -> None:
    """Move what can't be read to the dead-letter queue, with its reason; it is there before it is gone here."""
    emit(BODY_REFUSED, queue=delivery.queue, reason=reason, bytes=len(delivery.body))
    headers = {"reason": reason[:500], "queue": delivery.queue}
    await publish_declared(transport, dead, delivery.body, persistent=True, headers=headers)
    await delivery.ack()


async def publish_declared(transport: Transport, spec: QueueSpec, body: bytes, **how: Any) -> None:
    """Publish to a queue that outlives every process; where somebody deleted it, it is made again."""
    try:
        await transport.publish(spec.name, body, **how)
    except Unroutable:
        await transport.declare(spec)
        await transport.publish(spec.name, body, **how)
