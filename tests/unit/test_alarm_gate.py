"""The gate that publishes pass while a broker has no alarm, without a broker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mqinfer.observe import LINK_BLOCKED, LINK_UNBLOCKED, add_sink
from mqinfer.transports import rabbitmq_alarm
from mqinfer.transports.rabbitmq_alarm import Gate


async def test_an_alarm_that_began_and_ended_in_one_turn_of_the_loop_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop's clock stands still within a turn: the alarm took no time at all."""
    monkeypatch.setattr(rabbitmq_alarm, "_now_s", lambda: 5.0)
    told: list[str] = []
    remove = add_sink(lambda event, fields: told.append(event))
    gate = Gate("link", 0.01)

    async def publish() -> None:
        async with gate.passing():
            gate.shut("memory")
            gate.open()
            await never()

    try:
        async with asyncio.timeout(30):
            with pytest.raises(TimeoutError):
                await publish()
    finally:
        remove()
    assert told == [LINK_BLOCKED, LINK_UNBLOCKED]
    assert gate.blockage().reason == ""


async def never() -> Any:
    """A confirm that does not come."""
    await asyncio.get_running_loop().create_future()
