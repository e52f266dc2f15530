"""Dead letters over both transports: looked at without taking them away, sent back, thrown away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mqinfer.dead_letters import Letter, send_back, taken
from mqinfer.errors import Disconnected
from mqinfer.link import bury
from mqinfer.messages import FinishReason, Message, Packed, Probe, Request, Result, Row, Step
from mqinfer.queues import QueueSpec, Topology, new_id
from mqinfer.transports import open_transport
from mqinfer.transports.base import Delivery, QueueState, Transport
from mqinfer.wire import encode

PATIENCE_S = 20.0
PROMPT = (7000001, 7000002, 7000003)


@pytest.fixture
def topology() -> Topology:
    return Topology(new_id("dead"))


@pytest.fixture
async def link(transport_url: str, topology: Topology) -> AsyncIterator[Transport]:
    """A link with the queues of a pipeline of two stages."""
    transport = await open_transport(transport_url)
    for spec in topology.shared(2):
        await transport.declare(spec)
    yield transport
    await transport.close()
    cleaner = await open_transport(transport_url)
    for spec in topology.shared(2):
        await cleaner.delete(spec.name)
    await cleaner.close()


@pytest.fixture
async def other(transport_url: str) -> AsyncIterator[Transport]:
    """Somebody else's link to the same broker."""
    transport = await open_transport(transport_url)
    yield transport
    await transport.close()


def request(output: tuple[int, ...] = ()) -> Request:
    return Request(id="job.1", job="job", plan="p", prompt=PROMPT, output=output, max_tokens=9, tag="the tag")


def step(owner: str) -> Step:
    row = Row(row=1, epoch=0, start=0, count=3, reserve=9)
    hidden = Packed(codec="raw", dtype="float32", shape=(3, 4), blobs=(bytes(48),))
    return Step(
        plan="p", owner=owner, microbatch=1, number=0, stage=1, route=("w",), rows=(row,), hidden=hidden, ttl_s=60.0
    )


async def dead(link: Transport, topology: Topology, queue: str, body: bytes | Message, reason: str = "r") -> None:
    """Let it die as actors do."""
    headers = {"reason": reason, "queue": queue}
    raw = body if isinstance(body, bytes) else encode(body)
    await link.publish(topology.dead.name, raw, persistent=True, headers=headers)


async def one(link: Transport, topology: Topology) -> str:
    """Send the only dead letter back, and remove it where that worked; what was said."""
    async with taken(link, topology, 1) as found:
        (letter,) = found.letters
        why = await send_back(link, topology, letter)
        if not why:
            await found.remove(letter)
        return why


async def first(link: Transport, queue: str) -> Delivery:
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    await link.consume(queue, prefetch=1, sink=arrived.put_nowait)
    return await asyncio.wait_for(arrived.get(), PATIENCE_S)


async def letters(link: Transport, topology: Topology, limit: int = 100) -> list[Letter]:
    async with taken(link, topology, limit) as found:
        return list(found.letters)


async def test_looking_takes_nothing_away_and_keeps_the_order(
    link: Transport, other: Transport, topology: Topology
) -> None:
    for number in range(5):
        await dead(link, topology, topology.stage(number % 2).name, b"body %d" % number, f"reason {number}")
    for _ in range(2):
        async with taken(link, topology, 3) as found:
            assert found.total == 5
            assert [letter.delivery.body for letter in found.letters] == [b"body 0", b"body 1", b"body 2"]
            assert [letter.reason for letter in found.letters] == ["reason 0", "reason 1", "reason 2"]
    assert [letter.number for letter in await letters(other, topology)] == [1, 2, 3, 4, 5]
    assert await other.inspect(topology.dead.name) == QueueState(5, 0)


async def test_where_there_is_no_queue_there_are_no_letters(link: Transport, topology: Topology) -> None:
    assert await letters(link, Topology(new_id("never"))) == []
    assert await letters(link, topology) == []


async def test_letters_in_our_hands_come_back_when_our_link_is_lost(
    link: Transport, other: Transport, topology: Topology
) -> None:
    await dead(link, topology, topology.requests.name, b"body")
    async with taken(link, topology, 1):
        await link.close()
    async with asyncio.timeout(PATIENCE_S):
        while await other.inspect(topology.dead.name) != QueueState(1, 0):
            await asyncio.sleep(0.01)


async def test_what_actors_bury_is_told_by_kind_ids_and_counts_and_never_by_text_or_token(
    link: Transport, topology: Topology
) -> None:
    result = Result(
        id="i", job="j", tag="t", finish_reason=FinishReason.STOP, prompt_tokens=3, output=(7000004,), text="the text"
    )
    for message in (request((7000004,)), step("c"), result, Probe(plan="p")):
        await link.publish(topology.stage(0).name, encode(message))
    await link.publish(topology.stage(0).name, b"the text of a stranger")
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    await link.consume(topology.stage(0).name, prefetch=0, sink=arrived.put_nowait)
    for _ in range(5):
        await bury(link, topology.dead, await asyncio.wait_for(arrived.get(), PATIENCE_S), "why")
    found = await letters(link, topology)
    assert [letter.kind for letter in found] == ["request", "step", "result", "probe", ""]
    assert {letter.queue for letter in found} == {topology.stage(0).name}
    assert found[0].facts()["prompt tokens"] == "3"
    assert found[0].facts()["id"] == "job.1"
    assert found[1].facts()["hidden"] == "raw, float32, [3, 4]"
    assert [len(letter.prefix()) for letter in found] == [32, 32, 32, 32, 4]
    told = repr([(letter.facts(), letter.reason, letter.queue) for letter in found])
    assert not any(secret in told for secret in ("700000", "the text", "the tag", "stranger"))


async def test_what_a_stranger_wrote_can_not_play_tricks_on_a_terminal(link: Transport, topology: Topology) -> None:
    await dead(link, topology, "q\x1b]0;x\x07", b"body", "red \x1b[31m\nline")
    (letter,) = await letters(link, topology)
    assert letter.reason.isprintable()
    assert letter.queue.isprintable()


@pytest.mark.parametrize("output", [(), (5,)])
async def test_a_request_goes_back_as_it_was_and_is_dead_no_more(
    link: Transport, topology: Topology, output: tuple[int, ...]
) -> None:
    await dead(link, topology, topology.requests.name, request(output))
    assert await one(link, topology) == ""
    assert await link.inspect(topology.dead.name) == QueueState(0, 0)
    delivery = await first(link, topology.requests.name)
    assert delivery.body == encode(request(output))
    assert "reason" not in delivery.headers


async def test_a_step_goes_back_while_its_coordinator_lives(
    link: Transport, other: Transport, topology: Topology
) -> None:
    owner = topology.coordinator("c-1")
    await other.declare(owner)
    await dead(link, topology, topology.stage(1).name, step(owner.name))
    assert await one(link, topology) == ""
    assert (await first(link, topology.stage(1).name)).body == encode(step(owner.name))


async def test_what_has_nowhere_to_go_stays_dead_and_it_is_said_why(
    link: Transport, other: Transport, topology: Topology
) -> None:
    owner = topology.coordinator("c-1")
    await other.declare(owner)
    nowhere = {
        "its coordinator is gone": (topology.stage(1).name, step(topology.coordinator("c-gone").name)),
        "is gone with its worker": (topology.worker("s1-gone").name, step(owner.name)),
        "is gone with its coordinator": (topology.coordinator("c-gone").name, b"garbage"),
        "is gone": (topology.stage(7).name, b"garbage"),
        "it does not say its queue": ("", b"garbage"),
        "no queue of this pipeline": ("amq.somebody-elses", b"garbage"),
        f"it came from {topology.dead.name}": (topology.dead.name, b"garbage"),
    }
    for words, (queue, body) in nowhere.items():
        await dead(link, topology, queue, body)
        assert words in await one(link, topology)
        assert await link.inspect(topology.dead.name) == QueueState(1, 0)
        await link.purge(topology.dead.name)


async def test_a_letter_is_dead_until_it_is_confirmed_at_its_place(
    link: Transport, other: Transport, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    await dead(link, topology, topology.requests.name, request())

    async def lost(*_: object, **__: object) -> None:
        raise Disconnected

    monkeypatch.setattr(link, "publish", lost)
    with pytest.raises(Disconnected):
        await one(link, topology)
    assert await other.inspect(topology.dead.name) == QueueState(1, 0)


async def test_one_letter_is_removed_and_the_others_stay_in_order(link: Transport, topology: Topology) -> None:
    for number in range(3):
        await dead(link, topology, topology.requests.name, b"body %d" % number)
    async with taken(link, topology, 2) as found:
        await found.remove(found.letters[1])
    assert [letter.delivery.body for letter in await letters(link, topology)] == [b"body 0", b"body 2"]


async def test_a_letter_to_a_job_goes_back_to_its_results(link: Transport, topology: Topology) -> None:
    spec = QueueSpec(name=f"mqinfer.results.{new_id('job')}")
    await link.declare(spec)
    await dead(link, topology, spec.name, b"garbage")
    assert await one(link, topology) == ""
    assert await link.inspect(spec.name) == QueueState(1, 0)
    await link.delete(spec.name)
