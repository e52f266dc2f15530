"""One stage as its worker sees it: model + cache + sampler. Synchronous, no I/O; a step in, a step's end out.

What waits where, what travels how and who owns a row are not known here. What fails here fails for single rows.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mqinfer.attention import Extent
from mqinfer.errors import ComputeError, OutOfMemory
from mqinfer.kv_cache import Entry, KVCache, Refusal
from mqinfer.messages import Miss, MissReason, Row, Sampled
from mqinfer.observe import COMPUTE_FAILED, STAGE_LOADED, emit
from mqinfer.plan import Plan
from mqinfer.sampler import Sampler
from mqinfer.stage_model import StageModel
from mqinfer.verdicts import MISS_REASONS

#: A miss's detail is for people: more text than this is noise.
DETAIL_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One microbatch's step at this stage."""

    owner: str
    rows: tuple[Row, ...]
    #: First stage: int64 [sum of counts].
    tokens: Tensor | None
    #: Later stages: [sum of counts, hidden_size].
    hidden: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of a Work."""

    #: Rows that were computed, in their order.
    rows: tuple[Row, ...]
    #: [sum of their counts, hidden_size]; None on the last stage and where no row was computed.
    hidden: Tensor | None
    #: Last stage: tokens of those rows that were to be sampled.
    sampled: tuple[Sampled, ...]
    #: All other rows.
    misses: tuple[Miss, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One row on its way through the engine."""

    owner: str
    row: Row
    #: The row's part of the work's tensor.
    inputs: Tensor
    entry: Entry | None = None
    refusal: Refusal | None = None
    hidden: Tensor | None = None
    sampled: Sampled | None = None

    @property
    def extent(self) -> Extent:
        """Where the row's new positions go. Raises: ComputeError if it was never prepared."""
        if self.entry is None:
            raise ComputeError("a row without an entry")
        return Extent(self.entry.keys, self.entry.values, self.row.start, self.row.count)


class StageEngine:
    """The layers of one stage with the cache of the rows they serve."""

    def __init__(self, model: StageModel, cache: KVCache, *, stage: int, vocab_size: int, idle_s: float) -> None:
        self.device = model.device
        self.first = model.first
        self.last = model.last
        self.weight_bytes = model.weight_bytes
        self._model = model
        self._cache = cache
        self._sampler = Sampler()
        self._stage = stage
        self._vocab_size = vocab_size
        self._idle_s = idle_s

    @classmethod
    def load(
        cls,
        plan: Plan,
        stage: int,
        *,
        folder: Path,
        device: str = "cpu",
        kv_bytes: int,
        idle_s: float = 120.0,
    ) -> StageEngine:
        """Read the stage out of a checkpoint. Raises: PlanError, OutOfMemory."""
        began_s, peak_bytes = time.monotonic(), _peak_bytes()
        model = StageModel.load(plan, stage, folder=folder, device=device)
        grown_bytes = _peak_bytes() - peak_bytes
        spec = plan.stages[stage]
        emit(
            STAGE_LOADED,
            stage=stage,
            layers=f"[{spec.first}, {spec.end})",
            weight_bytes=model.weight_bytes,
            peak_bytes=grown_bytes,
            seconds=time.monotonic() - began_s,
            kv_bytes=kv_bytes,
        )
        cache = KVCache(shapes=model.shapes, dtype=model.dtype, device=model.device, budget_bytes=kv_bytes)
        return cls(model, cache, stage=stage, vocab_size=plan.vocab_size, idle_s=idle_s)

    # -- asking: from any thread ---------------------------------------------------------------

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether these new rows can be admitted together now."""
        return self._cache.fits(rows)

    @property
    def kv_used_bytes(self) -> int:
        """Bytes that keys and values take."""
        return self._cache.used_bytes

    @property
    def kv_budget_bytes(self) -> int:
        """Bytes that keys and values may take."""
        return self._cache.budget_bytes

    @property
    def cached_rows(self) -> int:
        """Rows that keys and values are kept of."""
        return len(self._cache)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one position takes."""
        return self._cache.bytes_per_token

    # -- doing: in the compute thread ----------------------------------------------------------

    def forget(self, owner: str, rows: Sequence[tuple[int, int]]) -> None:
        """Drop those of the (row, epoch) pairs that are here with this epoch or an earlier one."""
        self._cache.forget(owner, rows)

    def forget_idle(self) -> int:
        """Drop rows that nobody asked for in a long time: their coordinator is gone. How many."""
        return self._cache.forget_idle(self._idle_s)

    def forget_all(self) -> None:
        """Drop every row."""
        self._cache.forget_all()

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Done]:
        """One forward over all works; one answer for each, in order.

        Never raises for what a work contains: after a failure each work runs alone, then each row; a row that
        fails alone becomes a Miss and loses its entry.
        """
        jobs = [self._jobs(work) for work in works]
        for wave in _waves(jobs):
            self._run_wave(wave)
        return [self._done(group) for group in jobs]

    def _jobs(self, work: Work) -> list[Job]:
        inputs = work.tokens if self.first else work.hidden
        counts = [row.count for row in work.rows]
        if inputs is None or min(counts, default=1) < 1 or sum(counts) != inputs.shape[0]:
            refusal = Refusal(MissReason.COMPUTE, "the tensor does not fit the rows")
            nothing = torch.empty(0, device=self.device)
            return [Job(owner=work.owner, row=row, inputs=nothing, refusal=refusal) for row in work.rows]
        parts = inputs.split_with_sizes(counts)
        jobs = [Job(owner=work.owner, row=row, inputs=part) for row, part in zip(work.rows, parts, strict=True)]
        if self.first and not self._in_vocabulary(inputs):
            for job in jobs:
                if not self._in_vocabulary(job.inputs):
                    job.refusal = Refusal(MissReason.COMPUTE, "a token outside of the vocabulary")
        return jobs

    def _in_vocabulary(self, tokens: Tensor) -> bool:
        """On a GPU an index out of range would take the whole process with it."""
        return bool(((tokens >= 0) & (tokens < self._vocab_size)).all())

    def _run_wave(self, groups: Sequence[Sequence[Job]]) -> None:
        ready = []
        for group in groups:
            for job in group:
                self._prepare(job)
            ready.append([job for job in group if job.refusal is None])
        self._attempt([group for group in ready if group])

    def _prepare(self, job: Job) -> None:
        """Give the job its entry, or the reason why it has none."""
        job.refusal = job.refusal or self._out_of_range(job.row)
        if job.refusal is not None:
            return
        try:
            with _translated():
                prepared = self._cache.prepare(job.owner, job.row)
        except ComputeError as error:  # the device has less memory than the budget
            self._give_up(job, error)
            return
        if isinstance(prepared, Refusal):
            job.refusal = prepared
        else:
            job.entry = prepared

    def _out_of_range(self, row: Row) -> Refusal | None:
        if row.start >= 0 and row.start + row.count <= self._model.max_tokens:
            return None
        return Refusal(MissReason.NEVER, f"the model's positions end at {self._model.max_tokens}")

    def _attempt(self, groups: Sequence[Sequence[Job]]) -> None:
        """All groups in one forward; where that fails each group by itself, then each job."""
        jobs = [job for group in groups for job in group]
        error = self._failure(jobs) if jobs else None
        if error is None:
            return
        emit(COMPUTE_FAILED, stage=self._stage, error=str(error))
        if len(jobs) == 1:
            self._give_up(jobs[0], error)
            return
        for alone in groups if len(groups) > 1 else [[job] for job in jobs]:
            self._attempt([alone])

    def _failure(self, jobs: Sequence[Job]) -> ComputeError | None:
        """Compute; what went wrong, without the frames that hold on to the forward's memory."""
        try:
            with _translated():
                self._compute(jobs)
        except ComputeError as error:
            failure = type(error)(str(error))
        else:
            return None
        if isinstance(failure, OutOfMemory) and self.device.type == "cuda":
            torch.cuda.empty_cache()
        return failure

    def _compute(self, jobs: Sequence[Job]) -> None:
        """Nothing is kept of a forward that raises: lengths advance at its end."""
        wanted = [at for at, job in enumerate(jobs) if job.row.sampling is not None] if self.last else []
        out = self._model.forward(torch.cat([job.inputs for job in jobs]), [job.extent for job in jobs], wanted)
        if self.last:
            self._sample([jobs[at] for at in wanted], out)
        else:
            self._split(jobs, out)
        for job in jobs:
            if job.refusal is None and job.entry is not None:
                self._cache.advance(job.entry, job.row.start + job.row.count)

    def _split(self, jobs: Sequence[Job], hidden: Tensor) -> None:
        """Give each job its part of the hidden states."""
        counts = [job.row.count for job in jobs]
        for job, part in zip(jobs, hidden.split_with_sizes(counts), strict=True):
            job.hidden = part
        self._check_finite(jobs, hidden, counts)

    def _sample(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """Give each job its token; logits: [len(jobs), vocab_size]."""
        good = self._check_finite(jobs, logits, [1] * len(jobs))
        logits = logits if len(good) == len(jobs) else logits[good]  # a copy takes as long as drawing
        rows = [jobs[at].row for at in good]
        samplings = [row.sampling for row in rows if row.sampling is not None]
        drawn = self._sampler.sample(logits, samplings, [row.start + row.count for row in rows]) if good else []
        for at, draw in zip(good, drawn, strict=True):
            row = jobs[at].row
            jobs[at].sampled = Sampled(row=row.row, epoch=row.epoch, token=draw.token, logprob=draw.logprob)

    def _check_finite(self, jobs: Sequence[Job], out: Tensor, counts: Sequence[int]) -> list[int]:
        """Give up the jobs whose part of `out` holds an infinity or NaN; indices of the others."""
        # Both let NaN through; 10 times faster than isfinite, and nothing as large as `out` is made.
        finite = torch.isfinite(torch.maximum(out.amax(dim=1), -out.amin(dim=1)))
        if bool(finite.all()):
            return list(range(len(jobs)))
        good = [bool(part.all()) for part in finite.split_with_sizes(list(counts))]
        for job, is_good in zip(jobs, good, strict=True):
            if not is_good:
                self._give_up(job, ComputeError("not finite"))
        return [at for at, is_good in enumerate(good) if is_good]

    def _give_up(self, job: Job, error: ComputeError) -> None:
        """A row that failed is replayed from its beginning; what is left of it here would only take room."""
        reason = MISS_REASONS[type(error)]
        job.refusal = Refusal(reason, str(error))
        job.entry = None  # or its tensors would outlive the drop until the run ends
        self._cache.drop(job.owner, job.row.row)

    def _done(self, jobs: Sequence[Job]) -> Done:
        computed = [job for job in jobs if job.refusal is None]
        hidden = [job.hidden for job in computed if job.hidden is not None]
        return Done(
            rows=tuple(job.row for job in computed),
            hidden=torch.cat(hidden) if hidden else None,
            sampled=tuple(job.sampled for job in computed if job.sampled is not None),
            misses=tuple(self._miss(job.row, job.refusal) for job in jobs if job.refusal is not None),
        )

    def _miss(self, row: Row, refusal: Refusal) -> Miss:
        return Miss(row=row.row, epoch=row.epoch, stage=self._stage, reason=refusal.reason, detail=refusal.detail)


def _waves(groups: Sequence[Sequence[Job]]) -> Iterator[list[list[Job]]]:
    """What can run in one forward: a row that is there several times (a repeated step) runs in as many."""
    times: Counter[tuple[str, int]] = Counter()
    waves: dict[int, list[list[Job]]] = {}
    for group in groups:
        by_wave: dict[int, list[Job]] = {}
        for job in group:
            key = (job.owner, job.row.row)
            by_wave.setdefault(times[key], []).append(job)
            times[key] += 1
        for wave, jobs in by_wave.items():
            waves.setdefault(wave, []).append(jobs)
    yield from (waves[wave] for wave in sorted(waves))


@contextmanager
def _translated() -> Iterator[None]:
    """Whatever PyTorch or the family's code raises becomes a ComputeError, short and without data."""
    try:
        yield
    except ComputeError:
        raise
    except Exception as error:
        kind = OutOfMemory if _is_memory(error) else ComputeError
        text = str(error).partition("\n")[0][:DETAIL_CHARS]
        raise kind(f"{type(error).__name__}: {text}") from error


def _is_memory(error: Exception) -> bool:
    """PyTorch has a type for the GPU's memory and none for the host's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _peak_bytes() -> int:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
