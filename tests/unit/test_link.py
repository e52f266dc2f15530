"""Opening a link, losing it, opening it again; and what all actors do alike over it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import pytest
from tenacity import AsyncRetrying, RetryCallState

from mqinfer import link
from mqinfer.errors import Disconnected, Refused, Unroutable, WireError
from mqinfer.link import bury, first, keep_linked, publish_declared
from mqinfer.queues import QueueSpec, new_id
from mqinfer.transports.base import Delivery, Transport
from mqinfer.transports.memory import MemoryTransport, open_memory

PATIENCE_S = 10.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(link, "BACKOFF_MOST_S", 0.002)


class Links:
    """Opens links to one memory broker; the tries whose numbers are in `refused` fail."""

    def __init__(self, *refused: int) -> None:
        self.opened: list[MemoryTransport] = []
        self.tries = 0
        self._refused = refused
        self._name = new_id("test")

    async def open(self) -> Transport:
        self.tries += 1
        if self.tries in self._refused:
            raise Refused("wrong password")
        self.opened.append(open_memory(self._name))
        return self.opened[-1]


async def is_closed(transport: Transport) -> bool:
    """Whether the link was closed, not lost."""
    async with asyncio.timeout(PATIENCE_S):
        await transport.closed()
    return True


async def run(links: Links, session: Callable[[Transport], object], stop: asyncio.Event | None = None) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await keep_linked("test", links.open, session, stop or asyncio.Event())  # type: ignore[arg-type]


async def test_a_session_that_returns_ends_the_link_and_all() -> None:
    links = Links()

    async def session(transport: Transport) -> None:
        await transport.declare(QueueSpec(name="q"))

    await run(links, session)
    assert len(links.opened) == 1
    assert await is_closed(links.opened[0])


async def test_a_lost_link_is_followed_by_a_fresh_session_over_a_new_one() -> None:
    links = Links()

    async def session(transport: Transport) -> None:
        if len(links.opened) < 3:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(transport.closed())
                await links.opened[-1].lose()

    await run(links, session)
    assert len(links.opened) == 3


async def test_a_first_link_that_is_refused_is_told_at_once() -> None:
    links = Links(1)

    async def session(transport: Transport) -> None:
        raise AssertionError("there is no link")

    with pytest.raises(Refused, match="wrong password"):
        await run(links, session)
    assert links.tries == 1


async def test_a_later_link_is_tried_for_until_it_is_there() -> None:
    links = Links(2, 3, 4)

    async def session(transport: Transport) -> None:
        if len(links.opened) == 1:
            raise Disconnected

    await run(links, session)
    assert (links.tries, len(links.opened)) == (5, 2)


async def test_what_is_no_fault_of_the_link_ends_the_actor_and_the_link() -> None:
    links = Links()

    async def session(transport: Transport) -> None:
        raise WireError

    with pytest.raises(WireError):
        await run(links, session)
    assert await is_closed(links.opened[0])


async def test_stop_ends_the_wait_for_a_first_link() -> None:
    stop, asked, cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def never() -> Transport:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError("unreachable")

    async def session(transport: Transport) -> None:
        raise AssertionError("there is no link")

    task = asyncio.ensure_future(keep_linked("test", never, session, stop))
    await asyncio.wait_for(asked.wait(), PATIENCE_S)
    stop.set()
    await asyncio.wait_for(task, PATIENCE_S)
    await asyncio.wait_for(cancelled.wait(), PATIENCE_S)


async def test_stop_ends_the_tries_for_a_new_link() -> None:
    stop = asyncio.Event()
    links = Links(*range(2, 10_000))

    async def session(transport: Transport) -> None:
        asyncio.get_running_loop().call_later(0.01, stop.set)
        raise Disconnected

    await run(links, session, stop)
    assert len(links.opened) == 1


def pause_s(failures: int) -> float:
    state = RetryCallState(AsyncRetrying(), None, (), {})
    state.attempt_number = failures
    return link.backoff()(state)


def test_the_pause_after_a_failure_doubles_up_to_the_most_and_is_drawn_anew_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "BACKOFF_FIRST_S", 0.2)
    monkeypatch.setattr(link, "BACKOFF_MOST_S", 10.0)
    for failures, most_s in ((1, 0.2), (2, 0.4), (4, 1.6), (7, 10.0), (1000, 10.0)):
        pauses = [pause_s(failures) for _ in range(200)]
        assert all(0 <= pause <= most_s for pause in pauses)
        assert max(pauses) > most_s / 2  # fails once in 2 ** 200
        assert len(set(pauses)) > 100


async def test_sessions_that_end_at_once_are_paused_between_by_the_same_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    links, asked = Links(), []

    def wait(state: RetryCallState) -> float:
        asked.append(state.attempt_number)
        return 0.0

    monkeypatch.setattr(link, "backoff", lambda: wait)

    async def session(transport: Transport) -> None:
        if len(links.opened) < 5:
            raise Disconnected

    await run(links, session)
    assert asked == [1, 2, 3]


def test_the_first_of_nested_errors_is_found() -> None:
    inner = Disconnected("inner")
    assert first(ExceptionGroup("", [ExceptionGroup("", [inner, ValueError()]), KeyError()])) is inner


async def one_delivery(transport: Transport, queue: str) -> Delivery:
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    await transport.consume(queue, prefetch=1, sink=arrived.put_nowait)
    return await asyncio.wait_for(arrived.get(), PATIENCE_S)


async def test_publishing_makes_a_queue_that_was_deleted_again() -> None:
    transport = open_memory(new_id("test"))
    with pytest.raises(Unroutable):
        await transport.publish("q", b"lost")
    await publish_declared(transport, QueueSpec(name="q"), b"kept", headers={"a": "b"})
    delivery = await one_delivery(transport, "q")
    assert (delivery.body, delivery.headers) == (b"kept", {"a": "b"})


async def test_what_can_not_be_read_is_buried_whole_with_its_reason_and_is_gone_here() -> None:
    name = new_id("test")
    transport, other, dead = open_memory(name), open_memory(name), QueueSpec(name="dead")
    await transport.declare(QueueSpec(name="q"))
    await transport.publish("q", b"garbage")
    await bury(transport, dead, await one_delivery(transport, "q"), "not ours: " + "x" * 1000)
    buried = await one_delivery(transport, "dead")
    assert buried.body == b"garbage"
    assert buried.headers["queue"] == "q"
    assert buried.headers["reason"].startswith("not ours: ")
    assert len(buried.headers["reason"]) == 500
    await transport.close()  # would bring back what was not settled
    state = await other.inspect("q")
    assert state is not None
    assert state.ready == 0


async def test_it_is_in_the_dead_letters_before_it_is_gone_here() -> None:
    transport, dead = open_memory(new_id("test")), QueueSpec(name="dead")
    await transport.declare(QueueSpec(name="q"))
    await transport.publish("q", b"garbage")
    delivery = await one_delivery(transport, "q")

    async def refuse(*_: object, **__: object) -> None:
        raise Disconnected

    transport.publish = refuse  # type: ignore[method-assign]
    with pytest.raises(Disconnected):
        await bury(transport, dead, delivery, "not ours")
    assert delivery in transport.unsettled  # type: ignore[comparison-overlap]


async def test_a_link_that_opens_although_nobody_waits_for_it_any_more_is_closed() -> None:
    links = Links()
    connecting, given_up = asyncio.Event(), asyncio.Event()

    async def connect() -> Transport:
        connecting.set()
        with suppress(asyncio.CancelledError):  # as a client may swallow it
            await asyncio.Event().wait()
        given_up.set()
        return await links.open()

    stop = asyncio.Event()
    keeping = asyncio.create_task(keep_linked("test", connect, never, stop))
    await connecting.wait()
    stop.set()
    async with asyncio.timeout(PATIENCE_S):
        await keeping
    assert given_up.is_set()
    assert await is_closed(links.opened[0])


async def test_a_link_that_opened_just_when_its_actor_was_cancelled_is_closed() -> None:
    links = Links()
    opens = asyncio.Event()

    async def connect() -> Transport:
        await opens.wait()
        return await links.open()

    keeping = asyncio.create_task(keep_linked("test", connect, never, asyncio.Event()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    opens.set()
    while not links.opened:
        await asyncio.sleep(0)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    assert await is_closed(links.opened[0])


async def test_an_actor_that_is_cancelled_while_its_link_is_lost_does_not_go_on() -> None:
    links = Links()
    begun = asyncio.Event()

    async def session(transport: Transport) -> None:
        begun.set()
        try:
            await transport.closed()
        except asyncio.CancelledError:
            raise Disconnected("lost while it was cancelled") from None

    keeping = asyncio.create_task(keep_linked("test", links.open, session, asyncio.Event()))
    await begun.wait()
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(PATIENCE_S):
            await keeping
    assert keeping.cancelled()
    assert len(links.opened) == 1


async def never(_: Transport) -> None:
    """No session comes about."""
    pytest.fail("there was no link to have it over")
