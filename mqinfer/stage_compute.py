"""A step's way through one stage without I/O: unpack -> engine -> pack -> the body that goes on.

Runs whole in the worker's one compute thread, but for the questions `fits` and `is_empty`. Queues are only names here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mqinfer.codec_choice import CodecChoice
from mqinfer.device import device_name
from mqinfer.errors import ComputeError, WireError
from mqinfer.forecast import Speed
from mqinfer.messages import Miss, MissReason, Row, Step, StepDone
from mqinfer.plan import Plan
from mqinfer.settings import WorkerSettings
from mqinfer.stage_engine import Done, StageEngine, Work
from mqinfer.tensor_codec import pack, unpack
from mqinfer.wire import MAX_STEP_BYTES, encode

#: The name under which CodecChoice chooses for every body.
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What becomes of a step: a body for the next stage, or for its owner."""

    body: bytes
    #: True: the trip ends, the body is a StepDone for the step's owner. False: a Step for the next stage.
    ends: bool
    #: Rows this stage gave up.
    misses: tuple[Miss, ...] = ()
    #: How many rows it computed.
    computed: int = 0
    #: Hidden states that go on: their bytes on the device, and packed.
    hidden_bytes: int = 0
    packed_bytes: int = 0
    #: How they were packed, and how long that took.
    codec: str = ""
    pack_s: float = 0.0
    #: Where the step's tensor could not be read: why. The step itself belongs to the dead-letter queue then.
    unreadable: str = ""


class StageCompute:
    """An engine with the codec at both of its ends."""

    def __init__(self, plan: Plan, stage: int, engine: StageEngine, *, codec: str, threads: int) -> None:
        self._plan = plan
        self._stage = stage
        self._codec = codec
        self._choice = CodecChoice()
        self._threads = threads
        self._device = torch.device(engine.device)
        self._max_tokens = MAX_STEP_BYTES // (plan.hidden_size * plan.itemsize)
        self.engine = engine

    def prepare_thread(self) -> None:
        """To be called first in the compute thread: PyTorch counts its threads by calling thread."""
        if self._threads:
            torch.set_num_threads(self._threads)

    # -- asked from the event loop ---------------------------------------------------------------

    @property
    def facts(self) -> dict[str, str]:
        """What it computes on and with, for reports."""
        return {
            "device": str(self._device),
            "device_name": device_name(self._device),
            "codec": self._codec,
            "torch": str(torch.__version__),
        }

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether these new rows can be admitted now."""
        return self.engine.fits(rows)

    @property
    def is_empty(self) -> bool:
        """Whether no row is cached: then what does not fit now never will."""
        return self.engine.cached_rows == 0

    def published(self, out: Outgoing, seconds: float) -> None:
        """The broker has confirmed it after so long: what `auto` chooses by."""
        if out.codec:
            self._choice.note(out.codec, out.hidden_bytes, pack_s=out.pack_s, publish_s=seconds)

    # -- in the compute thread -------------------------------------------------------------------

    def run(self, steps: Sequence[Step], me: str, closing: bool = False, speed: Speed | None = None) -> list[Outgoing]:
        """One forward over all steps; one answer for each, in order. `me` is this worker's own queue.

        Never raises for what a step contains. `closing`: tell owners that this worker is about to leave. `speed`: of
        this worker, as far as it is known, for owners to be told of the slowest.
        """
        for step in steps:
            self.engine.forget(step.owner, step.release)
        steps = [self._on_route(step, me, closing, speed) for step in steps]
        works: list[Work | WireError] = [self._work(step) for step in steps]
        done = iter(self.engine.run([work for work in works if isinstance(work, Work)]))
        return [
            self._refused(step, work) if isinstance(work, WireError) else self._outgoing(step, next(done))
            for step, work in zip(steps, works, strict=True)
        ]

    def _on_route(self, step: Step, me: str, closing: bool, speed: Speed | None) -> Step:
        first_trip = len(step.route) == self._stage
        tokens = sum(row.count for row in step.rows)
        mine = (speed.seconds(tokens), tokens) if speed else (0.0, 0)
        slowest_s, slowest_tokens = max(mine, (step.slowest_s, step.slowest_tokens))
        return replace(
            step,
            route=(*step.route, me) if first_trip else step.route,
            closing=step.closing or closing,
            slowest_s=slowest_s,
            slowest_tokens=slowest_tokens,
            slowest_token_s=max(step.slowest_token_s, speed.token_s if speed else 0.0),
        )

    def _work(self, step: Step) -> Work | WireError:
        try:
            if self.engine.first:
                tokens = torch.tensor(step.tokens, dtype=torch.int64, device=self._device)
                return Work(owner=step.owner, rows=step.rows, tokens=tokens, hidden=None)
            if step.hidden is None:
                return WireError(f"a step without hidden states at stage {self._stage}")
            hidden = unpack(
                step.hidden,
                dtype=getattr(torch, self._plan.dtype),
                hidden_size=self._plan.hidden_size,
                max_tokens=self._max_tokens,
                device=self._device,
            )
            if not bool(torch.isfinite(hidden.abs().amax())):  # no worker of ours sends that on
                return WireError("the hidden states are not finite")
            return Work(owner=step.owner, rows=step.rows, tokens=None, hidden=hidden)
        except WireError as error:
            return error

    def _outgoing(self, step: Step, done: Done) -> Outgoing:
        misses = step.misses + done.misses
        if done.hidden is None or not done.rows:
            return Outgoing(body=self._end(step, done, misses), ends=True, misses=done.misses, computed=len(done.rows))
        began_s = time.perf_counter()
        codec = self._choice.choose(done.hidden.nbytes) if self._codec == AUTO else self._codec
        try:
            hidden = pack(done.hidden, codec)
        except ComputeError as error:  # not finite where the codec can't carry it
            missed = tuple(self._miss(row, MissReason.COMPUTE, str(error)) for row in done.rows)
            return Outgoing(body=self._end(step, done, misses + missed), ends=True, misses=done.misses + missed)
        onward = replace(step, stage=self._stage + 1, rows=done.rows, misses=misses, tokens=(), hidden=hidden)
        return Outgoing(
            body=encode(onward),
            ends=False,
            misses=done.misses,
            computed=len(done.rows),
            codec=codec,
            pack_s=time.perf_counter() - began_s,
            hidden_bytes=done.hidden.nbytes,
            packed_bytes=sum(map(len, hidden.blobs)),
        )

    def _refused(self, step: Step, error: WireError) -> Outgoing:
        missed = tuple(self._miss(row, MissReason.COMPUTE, str(error)) for row in step.rows)
        body = encode(step_done(step, step.misses + missed))
        return Outgoing(body=body, ends=True, misses=missed, unreadable=str(error))

    def _miss(self, row: Row, reason: MissReason, detail: str) -> Miss:
        return Miss(row=row.row, epoch=row.epoch, stage=self._stage, reason=reason, detail=detail)

    @staticmethod
    def _end(step: Step, done: Done, misses: tuple[Miss, ...]) -> bytes:
        return encode(replace(step_done(step, misses), sampled=done.sampled))


def load_compute(plan: Plan, stage: int, folder: Path, settings: WorkerSettings) -> StageCompute:
    """Read the stage's tensors from `folder` onto the device. Raises: PlanError, OutOfMemory."""
    engine = StageEngine.load(
        plan, stage, folder=folder, device=settings.device, kv_bytes=settings.kv_bytes, idle_s=settings.idle_s
    )
    return StageCompute(plan, stage, engine, codec=settings.codec, threads=settings.threads)


async def load_aside(plan: Plan, stage: int, folder: Path, settings: WorkerSettings) -> StageCompute:
    """`load_compute` in a thread that ends with it. Raises: as it does.

    Every thread that PyTorch has computed in keeps a team of OpenMP's threads for as long as it lives. With the compute
    thread's they are more than there are cores, and OpenMP then lets threads sleep between any two operations instead
    of spinning: a step of one row took 68 ms on two cores, and takes 57 so.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix=f"load-{stage}")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, load_compute, plan, stage, folder, settings)
    finally:
        thread.shutdown(wait=False)


def step_done(step: Step, misses: tuple[Miss, ...]) -> StepDone:
    """The end of the step's trip, with nothing sampled."""
    return StepDone(
        plan=step.plan,
        microbatch=step.microbatch,
        number=step.number,
        route=step.route,
        misses=misses,
        closing=step.closing,
        slowest_s=step.slowest_s,
        slowest_tokens=step.slowest_tokens,
        slowest_token_s=step.slowest_token_s,
    )
