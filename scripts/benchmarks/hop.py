"""Bytes through one hop: mqinfer's transport against bare aio-pika, and what transport and codec cost a step."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import uvloop
from private_broker import PrivateBroker

from benchmarks.activations import HIDDEN_SIZE, decode_rows, forget
from benchmarks.links import IN_FLIGHT, Hops, Link, Open, aio_pika_link, busy, latencies_s, mqinfer_link
from benchmarks.measure import SMALL, Case, Contender, Goal, Limit, Notes
from benchmarks.rabbit import Rabbit
from mqinfer.messages import Row, Sampling, Step
from mqinfer.tensor_codec import pack, unpack
from mqinfer.wire import decode, encode

T = TypeVar("T")

KIB, MIB = 2**10, 2**20
#: Sizes of bodies, with how many messages a round sends: enough to be seen in the broker's ticks of 10 ms.
SIZES: Mapping[int, int] = {
    KIB: 5000,
    16 * KIB: 5000,
    64 * KIB: 4000,
    256 * KIB: 1500,
    MIB: 500,
    4 * MIB: 120,
}
LATENCIES = 300
KINDS: Mapping[str, Open] = {"mqinfer": mqinfer_link, "aio-pika": aio_pika_link}

ROWS = 32
STEPS = 1000
#: A step of a stage takes 20 ms or more; of that, transport and codec may have 5%.
STEP_MOST_MS = 0.05 * 20

if SMALL:
    SIZES = {KIB: 50, 64 * KIB: 50, 4 * MIB: 5}
    LATENCIES, STEPS = 20, 20


def cases(name: str) -> list[Case]:  # noqa: ARG001
    """Two."""
    rabbit = Rabbit()
    return [_sizes(rabbit), _step(rabbit)]


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run it as every actor of mqinfer runs."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


# -- by size ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passed:
    """What one round of messages of one size showed."""

    busy: Hops
    latencies_s: list[float]


def _told(rounds: list[Passed]) -> str:
    def middle_ms(seconds: Callable[[Passed], float]) -> str:
        return f"{1e3 * statistics.median(map(seconds, rounds)):.3g} ms"

    rate = 1 / statistics.median(passed.busy.elapsed_s for passed in rounds)
    return (
        f"{rate:,.0f} messages/s; of the broker's processor {middle_ms(lambda p: p.busy.broker_s)} a message; latency "
        f"when idle p50 {middle_ms(lambda p: _quantile(p.latencies_s, 0.5))}, "
        f"p99 {middle_ms(lambda p: _quantile(p.latencies_s, 0.99))}"
    )


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _sizes(rabbit: Rabbit) -> Case:
    notes = Notes()
    ours, rival = (f"{kind}, {label(64 * KIB)}" for kind in KINDS)
    return Case(
        "hop",
        f"One message through RabbitMQ: publish (mandatory, transient), confirm, deliver, ack, over two connections, "
        f"{IN_FLIGHT} in flight, sender and receiver in one process on uvloop.",
        "ms of Python's processor a message",
        [
            Contender(f"{kind}, {label(size)}", partial(_passing, rabbit, notes, kind, size))
            for size in SIZES
            for kind in KINDS
        ],
        goals=[Goal(ours, rival, 1.25, at_most=True)],
        warmups=0,
        notes=notes,
    )


@contextmanager
def _passing(rabbit: Rabbit, notes: Notes, kind: str, size: int) -> Iterator[Callable[[], float]]:
    body, rounds = os.urandom(size), list[Passed]()
    with rabbit.running() as broker:

        def once() -> float:
            passed = in_loop(_pass(broker, KINDS[kind], body, SIZES[size]))
            rounds.append(passed)
            notes.put(f"{kind}, {label(size)}", _told(rounds))
            return 1e3 * passed.busy.python_s

        yield once


async def _pass(broker: PrivateBroker, opened: Open, body: bytes, count: int) -> Passed:
    async with opened(broker.url) as link:
        return Passed(await busy(link, body, count, broker.pid), await latencies_s(link, body, min(count, LATENCIES)))


def label(size: int) -> str:
    """Of a number of bytes."""
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


# -- a step's ----------------------------------------------------------------------------------------


def _parts(rounds: list[Mapping[str, float]]) -> str:
    middles = {part: statistics.median(parts[part] for parts in rounds) for part in rounds[0]}
    return ", ".join(f"{part} {middle:.3f} ms" for part, middle in middles.items())


#: How a link is driven: one step after another, as where a stage takes 20 ms for each, or as many as fit.
Drive = Callable[[Link, bytes, PrivateBroker], Coroutine[Any, Any, float]]


async def _one_by_one(link: Link, body: bytes, _: PrivateBroker) -> float:
    await latencies_s(link, body, STEPS // 10)
    began_s = time.process_time()
    await latencies_s(link, body, STEPS)
    return (time.process_time() - began_s) / STEPS


async def _in_flight(link: Link, body: bytes, broker: PrivateBroker) -> float:
    return (await busy(link, body, STEPS, broker.pid)).python_s


HOWS: Mapping[str, Drive] = {"one after another": _one_by_one, f"{IN_FLIGHT} in flight": _in_flight}


def _step(rabbit: Rabbit) -> Case:
    notes = Notes()
    return Case(
        "hop of a step",
        f"A decode step of {ROWS} rows from one stage to the next: hidden states of SmolLM2 [{ROWS}, {HIDDEN_SIZE}], "
        "bfloat16, `lossless`, packed, encoded, sent over mqinfer's transport, decoded, unpacked, in one process.",
        "ms of Python's processor a step",
        [Contender(how, _ready(rabbit, notes, how)) for how in HOWS],
        goals=[Limit(next(iter(HOWS)), STEP_MOST_MS, at_most=True)],
        warmups=0,
        notes=notes,
    )


def _ready(rabbit: Rabbit, notes: Notes, how: str) -> Callable[[], AbstractContextManager[Callable[[], float]]]:
    @contextmanager
    def ready() -> Iterator[Callable[[], float]]:
        hidden = decode_rows(ROWS)
        forget()
        torch.set_num_threads(1)
        rounds: list[Mapping[str, float]] = []
        with rabbit.running() as broker:

            def once() -> float:
                parts_ms = _step_parts_ms(hidden, broker, HOWS[how])
                rounds.append(parts_ms)
                notes.put(how, _parts(rounds))
                return sum(parts_ms.values())

            yield once

    return ready


def _step_parts_ms(hidden: torch.Tensor, broker: PrivateBroker, drive: Drive) -> dict[str, float]:
    """Each part many times over; what comes out of the last is what went into the first."""
    packed, packing_ms = _timed(lambda: pack(hidden, "lossless"))
    step = replace(_step_without_hidden(), hidden=packed)
    body, encoding_ms = _timed(lambda: encode(step))
    message, decoding_ms = _timed(lambda: decode(body))
    if not isinstance(message, Step) or message.hidden is None:
        raise RuntimeError("a step was encoded and something else decoded")
    received = message.hidden
    again, unpacking_ms = _timed(
        lambda: unpack(received, dtype=hidden.dtype, hidden_size=hidden.shape[1], max_tokens=ROWS)
    )
    if not torch.equal(again, hidden):
        raise RuntimeError("lossless has lost something")
    hop_ms = 1e3 * in_loop(_driven(broker, body, drive))
    return {"pack": packing_ms, "encode": encoding_ms, "hop": hop_ms, "decode": decoding_ms, "unpack": unpacking_ms}


async def _driven(broker: PrivateBroker, body: bytes, drive: Drive) -> float:
    async with mqinfer_link(broker.url) as link:
        return await drive(link, body, broker)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and the milliseconds of the processor that it takes."""
    out = work()
    began_s = time.process_time()
    for _ in range(STEPS):
        work()
    return out, 1e3 * (time.process_time() - began_s) / STEPS


def _step_without_hidden() -> Step:
    """As a decode step of a pipeline of two stages arrives at the second, but for its hidden states."""
    rows = tuple(
        Row(row=1000 + n, epoch=0, start=200 + n, count=1, reserve=512, sampling=Sampling()) for n in range(ROWS)
    )
    workers = tuple(f"mqinfer.smollm2.worker.s{stage}-0123456789" for stage in range(2))
    return Step(
        plan="0123456789abcdef",
        owner="mqinfer.smollm2.coordinator.c-0123456789",
        microbatch=7,
        number=99,
        stage=1,
        route=workers,
        rows=rows,
        ttl_s=180.0,
    )
