"""Bugs to be planted, each of which the simulation must find: that it can fail is shown by making it fail.

Each replaces one piece of the product by a wrong one. `scripts/simulate --planted` plants one after the other.
No bug is what the design makes harmless: a step that is lost, acked too early or put back to nowhere is replayed, a
checkpoint that lacks a token is one of a moment before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from mqinfer import batch_rows, coordinator, kv_cache, leases, queues, scheduler, stage_worker
from mqinfer.rows import LiveRow
from mqinfer.verdicts import Verdict


@dataclass(frozen=True, slots=True)
class Bug:
    """A wrong attribute of some class or module."""

    #: What is wrong, for people.
    what: str
    owner: Any
    name: str
    #: Given the right one, makes the wrong one.
    wrong: Callable[[Any], Any]

    @contextmanager
    def plant(self) -> Iterator[None]:
        """The bug is there."""
        with mock.patch.object(self.owner, self.name, self.wrong(self.owner.__dict__[self.name])):
            yield


def _settle_on_arrival(right: Any) -> Any:
    async def admit(self: Any, request: Any, delivery: Any, round_: int) -> None:
        await right(self, request, delivery, round_)
        for held in self._held.values():
            if held.lease.delivery is delivery:
                await delivery.ack()
                held.lease.delivery = Settled()

    return admit


class Settled:
    """In the place of a delivery that was settled too early."""

    async def ack(self) -> None:
        """It was."""


def _settle_before_result(right: Any) -> Any:
    async def finish(self: Any, ended: Any) -> None:
        held = self._held[ended.row.number]
        await held.lease.settle()
        del self._held[ended.row.number]
        self._ids.discard(ended.row.request.id)
        await self._publish_result(coordinator.result_of(ended, self._tokenizer))
        await self._intake.tune()

    return finish


def _epoch_ignored(right: Any) -> Any:
    def prepare(self: Any, owner: str, row: Any) -> Any:
        entry = self.entry(owner, row.row)
        return right(self, owner, row if entry is None else replace(row, epoch=entry.epoch))

    return prepare


def _absence_ignored(right: Any) -> Any:
    def admit(self: Any, key: Any, row: Any) -> Any:
        entry = right(self, key, replace(row, start=0, count=row.start + row.count))
        if isinstance(entry, kv_cache.Entry):
            entry.length = row.start
        return entry

    return admit


def _never_due(right: Any) -> Any:
    return lambda self, held, now_s: False


def _doubled_tokens(right: Any) -> Any:
    def checkpoint(self: LiveRow) -> Any:
        request = right(self)
        return replace(request, output=(*request.output, *request.output[-1:]))

    return checkpoint


def _old_delivery_first(right: Any) -> Any:
    async def renew(self: Any, lease: Any, checkpoint: Any, now_s: float) -> Any:
        async with lease.lock:
            await lease.delivery.ack()
        number = str(next(self._numbers))
        request = checkpoint()
        if request is None:
            return None
        arrival = self._expected[number] = asyncio.get_running_loop().create_future()
        await self._transport.publish(
            self._spec.name, leases.encode(request), persistent=True, headers={"renewal": number}
        )
        lease.delivery = await arrival
        lease.round, lease.renewed_at_s = -1, now_s
        return request

    return renew


def _repeats_written(right: Any) -> Any:
    return lambda self, number, custom_id: False


def _ack_before_written(right: Any) -> Any:
    async def land(self: Any, arrivals: Any) -> Any:
        for arrival in arrivals:
            await arrival.delivery.ack()
        results = [(batch_rows._tag(a.message), a.message) for a in arrivals]
        await self._write_results(results)
        return [tag.number for tag, _ in results]

    return land


def _shared_owner_queue(right: Any) -> Any:
    return lambda self, worker: replace(right(self, worker), exclusive=False, durable=True)


def _late_ends_count(right: Any) -> Any:
    def done(self: Any, end: Any, now_s: float) -> Any:
        microbatch = self.microbatches.get(end.microbatch)
        return right(self, end if microbatch is None else replace(end, number=microbatch.step), now_s)

    return done


def _misses_ignored(right: Any) -> Any:
    return lambda self, end, now_s: right(self, replace(end, misses=()), now_s)


def _given_back_to_nobody(right: Any) -> Any:
    async def give_back(self: Any, held: Any) -> None:
        await held.lease.settle()

    return give_back


def _redelivered_computed(right: Any) -> Any:
    async def accept(self: Any, taken: Any) -> bool:
        return True

    return accept


def _buried_nowhere(right: Any) -> Any:
    async def bury(transport: Any, dead: Any, delivery: Any, reason: str) -> None:
        return None  # neither moved nor settled

    return bury


def _acked_only(right: Any) -> Any:
    async def bury(transport: Any, dead: Any, delivery: Any, reason: str) -> None:
        await delivery.ack()

    return bury


def _taken_unheard(right: Any) -> Any:
    return lambda self, step, now_s: None


def _blame_not_kept(right: Any) -> Any:
    return lambda self: replace(right(self), failures=0)


def _never_released(right: Any) -> Any:
    return lambda self, microbatch: []


def _never_forgotten(right: Any) -> Any:
    return lambda self, idle_s: 0


def _greedy_intake(right: Any) -> Any:
    return lambda self, round_: (0, 0)


def _never_fails(right: Any) -> Any:
    return lambda reason, failures: Verdict.REPLAY


BUGS: Mapping[str, Bug] = {
    "settled-on-arrival": Bug(
        "a request is settled before anything follows from it",
        coordinator.CoordinatorSession,
        "_admit",
        _settle_on_arrival,
    ),
    "settled-before-result": Bug(
        "a lease is settled before the result is out",
        coordinator.CoordinatorSession,
        "_finish",
        _settle_before_result,
    ),
    "epoch-ignored": Bug("a worker computes rows of any epoch", kv_cache.KVCache, "prepare", _epoch_ignored),
    "absence-ignored": Bug(
        "a worker computes over what it does not hold", kv_cache.KVCache, "_admit", _absence_ignored
    ),
    "lease-not-renewed": Bug("leases are never renewed", coordinator.CoordinatorSession, "_due", _never_due),
    "checkpoint-repeats-a-token": Bug("a checkpoint has its last token twice", LiveRow, "checkpoint", _doubled_tokens),
    "old-delivery-first": Bug(
        "the old delivery is settled before the checkpoint is there", leases.LeaseQueue, "renew", _old_delivery_first
    ),
    "repeat-not-dropped": Bug("a result that comes twice is written twice", batch_rows.Rows, "has", _repeats_written),
    "ack-before-written": Bug("a result is acked before it is on disk", batch_rows.Rows, "land", _ack_before_written),
    "owner-queue-stays": Bug("a dead worker's queue stays", queues.Topology, "worker", _shared_owner_queue),
    "late-end-counts": Bug("a late end of trip counts", scheduler.Scheduler, "done", _late_ends_count),
    "misses-ignored": Bug("a missed row counts as computed", scheduler.Scheduler, "done", _misses_ignored),
    "given-back-to-nobody": Bug(
        "a drained coordinator's requests are lost", coordinator.CoordinatorSession, "_give_back", _given_back_to_nobody
    ),
    "redelivered-computed": Bug(
        "a step whose worker died is computed again", stage_worker.WorkerSession, "_accept", _redelivered_computed
    ),
    "buried-nowhere": Bug("what can't be read is held for ever", stage_worker, "bury", _buried_nowhere),
    "buried-is-lost": Bug("what can't be read is thrown away", coordinator, "bury", _acked_only),
    "taken-unheard": Bug("a coordinator does not hear who takes a step", scheduler.Scheduler, "taken", _taken_unheard),
    "blame-kept-late": Bug("a row goes on before its blame is kept", LiveRow, "ready", lambda right: True),
    "blame-not-kept": Bug("blame dies with its coordinator", LiveRow, "checkpoint", _blame_not_kept),
    "never-released": Bug(
        "workers are not told what they may forget", scheduler.Scheduler, "_releases", _never_released
    ),
    "never-forgotten": Bug("idle rows are never forgotten", kv_cache.KVCache, "forget_idle", _never_forgotten),
    "greedy-intake": Bug(
        "a coordinator takes more than it may", coordinator.CoordinatorSession, "_held_now", _greedy_intake
    ),
    "never-fails": Bug("a row that kills is tried for ever", scheduler, "decide", _never_fails),
}
