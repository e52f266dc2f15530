"""A worker that does not work yet or for a while, but can be seen and spoken to. torch may not be imported here."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping

from mqinfer.errors import Unroutable
from mqinfer.link import bury
from mqinfer.messages import Ask, Pause, Report
from mqinfer.observe import ACTOR_READY, emit
from mqinfer.plan import Plan
from mqinfer.queues import Topology, new_id
from mqinfer.reports import make_report
from mqinfer.transports.base import Delivery, Transport
from mqinfer.verdicts import DEAD_LETTERS
from mqinfer.wire import decode, encode

#: Of a worker that knows no stage yet.
NO_STAGE = -1


class Presence:
    """Answers `ask` as a worker does, with a role that is not "worker"."""

    def __init__(
        self,
        plan: Plan,
        stage: int,
        role: str,
        facts: Callable[[], Mapping[str, str]],
        told: Callable[[Pause], None] | None = None,
    ) -> None:
        """`facts` are asked for with every report; `told` is called with every `pause`."""
        self._plan = plan
        self._stage = stage
        self._role = role
        self._facts = facts
        self._told = told
        self._topology = Topology(plan.name)
        self._id = new_id(f"s{max(stage, 0)}")  # a queue's name leads to the exchange of some stage
        self._inbox: asyncio.Queue[Delivery] = asyncio.Queue()

    async def open(self, transport: Transport) -> None:
        """From here on it is seen. Raises: TransportError."""
        queue = self._topology.worker(self._id)
        await transport.declare(queue)
        await transport.consume(queue.name, prefetch=8, sink=self._inbox.put_nowait)
        emit(ACTOR_READY, actor=queue.name)

    async def serve(self, transport: Transport) -> None:
        """Until it is cancelled. Raises: TransportError."""
        while True:
            await self._read(transport, await self._inbox.get())

    async def _read(self, transport: Transport, delivery: Delivery) -> None:
        try:
            message = decode(delivery.body)
        except DEAD_LETTERS as error:
            await bury(transport, self._topology.dead, delivery, str(error))
            return
        if isinstance(message, Ask):
            with contextlib.suppress(Unroutable):  # who asked is gone
                await transport.publish(message.reply_to, encode(self._report()))
        elif isinstance(message, Pause) and self._told is not None:
            self._told(message)
        await delivery.ack()

    def _report(self) -> Report:
        facts = {"process": str(os.getpid()), **self._facts()}
        return make_report(self._role, self._id, self._plan, {}, facts, stage=self._stage)
