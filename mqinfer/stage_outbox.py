"""Where a worker's steps go: to the next stage, or back to their owners, with what could not be computed."""

from __future__ import annotations

import contextlib

from mqinfer.errors import Unroutable
from mqinfer.link import publish_declared
from mqinfer.messages import Miss, MissReason, Step
from mqinfer.queues import Topology
from mqinfer.stage_compute import Outgoing, step_done
from mqinfer.stage_counts import StageCounts
from mqinfer.transports.base import Transport
from mqinfer.wire import encode


class StageOutbox:
    """Returns when the broker has confirmed."""

    def __init__(self, transport: Transport, topology: Topology, stage: int, counts: StageCounts) -> None:
        self._transport = transport
        self._topology = topology
        self._stage = stage
        self._counts = counts

    async def to_next(self, step: Step, out: Outgoing) -> None:
        """To the next stage's queue, or on the step's route. Raises: TransportError."""
        if len(step.route) <= self._stage + 1:
            await publish_declared(
                self._transport, self._topology.stage(self._stage + 1), out.body, ttl_s=step.ttl_s or None
            )
            return
        try:
            await self._transport.publish(step.route[self._stage + 1], out.body)
        except Unroutable:
            await self.give_up(step, MissReason.GONE, "the next worker is gone", beside=out.misses)

    async def to_owner(self, owner: str, body: bytes) -> None:
        """To whoever has that queue, or to nobody. Raises: TransportError."""
        with contextlib.suppress(Unroutable):  # the coordinator is gone; its rows are forgotten when idle
            await self._transport.publish(owner, body)

    async def give_up(self, step: Step, reason: MissReason, detail: str, *, beside: tuple[Miss, ...] = ()) -> None:
        """End the trip here with all rows missed, but for those that were missed already `beside`."""
        known = {miss.row for miss in beside}
        missed = tuple(
            Miss(row=row.row, epoch=row.epoch, stage=self._stage, reason=reason, detail=detail)
            for row in step.rows
            if row.row not in known
        )
        self._counts.missed(missed)
        await self.to_owner(step.owner, encode(step_done(step, step.misses + beside + missed)))
