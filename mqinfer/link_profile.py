"""How long messages take through a broker: from publishing to the delivery in the hands of the same process.

What a link of workers does with one message, without compute: publish, confirm, deliver, ack.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from dataclasses import replace

from mqinfer.errors import TransportError
from mqinfer.host_profile import LinkProfile
from mqinfer.queues import new_id, results
from mqinfer.transports.base import Delivery, Transport

#: A message that only has tokens; and one with hidden states.
SMALL_BYTES, LARGE_BYTES = 2**10, 2**20
#: Messages of each size that count, after some that do not.
MESSAGES, WARM_MESSAGES = 15, 3
#: How long one may take: the queue is gone with its link, and what was in it never comes.
WAIT_S = 30.0


async def measure(transport: Transport) -> LinkProfile:
    """By messages to a queue of its own. Raises: TransportError."""
    spec = replace(
        results(new_id("profile")), durable=False, exclusive=True, expires_s=None
    )  # what the operator may make
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    await transport.declare(spec)
    subscription = await transport.consume(spec.name, prefetch=1, sink=arrived.put_nowait)
    try:
        small_s = await _median_s(transport, spec.name, arrived, SMALL_BYTES)
        large_s = await _median_s(transport, spec.name, arrived, LARGE_BYTES)
    finally:
        await subscription.cancel()
        await transport.delete(spec.name)
    return LinkProfile(hop_s=small_s, bytes_per_s=(LARGE_BYTES - SMALL_BYTES) / max(large_s - small_s, 1e-6))


async def _median_s(transport: Transport, queue: str, arrived: asyncio.Queue[Delivery], size_bytes: int) -> float:
    seconds = []
    for _ in range(WARM_MESSAGES + MESSAGES):
        body = os.urandom(size_bytes)
        began_s = time.perf_counter()
        try:
            async with asyncio.timeout(WAIT_S):
                await transport.publish(queue, body)
                delivery = await arrived.get()
        except TimeoutError as error:
            raise TransportError(f"no message came back through the broker within {WAIT_S:g} s") from error
        seconds.append(time.perf_counter() - began_s)
        await delivery.ack()
    return statistics.median(seconds[WARM_MESSAGES:])
