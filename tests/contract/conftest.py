"""Fixtures of the contract tests; what they are made of is link_harness.py."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from link_harness import Inbox, Links, NewQueue

from mqinfer.queues import QueueSpec, new_id, results
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport


@pytest.fixture(autouse=True)
def no_stray_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A task whose exception nobody looked at, or that was forgotten, is an error of the test that made it."""
    yield
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


@pytest.fixture
async def new_queue(transport_url: str) -> AsyncIterator[NewQueue]:
    """Makes specs with fresh names; these queues are removed at the end."""
    names: list[str] = []

    def make(**fields: Any) -> QueueSpec:
        names.append(results(new_id("test")).name)  # behind an exchange, as every queue of ours is
        return QueueSpec(name=names[-1], **fields)

    yield make
    cleaner = await open_transport(transport_url)
    for name in names:
        await cleaner.delete(name)
    await cleaner.close()


@pytest.fixture
async def links(transport_url: str, new_queue: NewQueue) -> AsyncIterator[Links]:
    """The way to links. All are closed at the end, before the queues are removed."""
    async with AsyncExitStack() as stack:
        yield Links(transport_url, stack)


@pytest.fixture
async def link(links: Links) -> Transport:
    """A link."""
    return await links.open()


@pytest.fixture
async def other(links: Links) -> Transport:
    """A second link to the same broker."""
    return await links.open()


@pytest.fixture
def inbox() -> Inbox:
    """A sink."""
    return Inbox()
