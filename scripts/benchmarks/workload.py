"""The work that all contenders of a case do: prompts of exact lengths out of this repository's documents.

Deterministic, but for edits of those documents. How the work is done is each contender's own affair.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from demo_model import FOLDER
from local_fleet import ROOT

from benchmarks.measure import SMALL

#: Rows and tokens of the job that warms a contender up: enough that every worker has computed.
WARM_ROWS, WARM_TOKENS = 16, 8
#: Of our own rows so many at least must have the first contender's tokens; at the last bit two tokens may be as likely.
AGREEING = 0.9

_DOCUMENTS = ("README.md", "docs/architecture.md", "docs/protocol.md", "docs/wire.md", "docs/operations.md")
_SEED = 4


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and how many tokens follow it, whatever they are: no end-of-sequence token ends it."""

    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs that begin at the same time, each of its own rows; most work is one job."""

    #: "float32" or "bfloat16": of weights and compute.
    dtype: str
    jobs: tuple[tuple[Row, ...], ...]
    #: Which tokens a figure counts: the useful ones of the output, or the prompts' where only those are scored.
    counted: Literal["output", "prompt"] = "output"

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of all jobs, job after job."""
        return tuple(row for job in self.jobs for row in job)

    @property
    def tokens(self) -> int:
        """How many are counted."""
        rows = self.rows
        return sum(len(row.prompt) if self.counted == "prompt" else row.output_tokens for row in rows)

    @property
    def as_one_job(self) -> Workload:
        """The same rows in one job."""
        return replace(self, jobs=(self.rows,))

    def beginning(self, rows: int, output_tokens: int) -> Workload:
        """A little of it, to warm up: one job."""
        few = (replace(row, output_tokens=min(row.output_tokens, output_tokens)) for row in self.rows[:rows])
        return replace(self, jobs=(tuple(few),))


class WrongWork(Exception):
    """A contender did something else than it was asked for: its figure would mean nothing."""


def in_order(order: Sequence[int], outputs: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Outputs of rows that were asked in this order, as the rows stand."""
    found = dict(zip(order, outputs, strict=True))
    return [found[index] for index in range(len(order))]


def check(work: Workload, outputs: Sequence[Sequence[int]], who: str) -> None:
    """Raises: WrongWork unless each row has just its number of tokens."""
    wanted = [row.output_tokens for row in work.rows]
    got = [len(output) for output in outputs]
    if wanted != got:
        raise WrongWork(f"{who}: rows have {got} tokens instead of {wanted}")


class Agreement:
    """Whether contenders draw the same greedy tokens as the first of them: a line of the report for each."""

    def __init__(self, notes: list[str], *, wanted: bool) -> None:
        """`wanted`: in bfloat16 there is nothing to agree on: every batching rounds in its own way."""
        self._notes = notes
        self._wanted = wanted
        self._first: tuple[str, list[list[int]]] | None = None
        self._seen: set[str] = set()

    def rate(
        self, work: Workload, outputs: Sequence[Sequence[int]], seconds: float, who: str, *, ours: bool = False
    ) -> float:
        """What `who` made of the work: counted tokens/s. Raises: WrongWork."""
        check(work, outputs, who)
        self.see(who, outputs, ours=ours)
        return work.tokens / seconds

    def see(self, who: str, outputs: Sequence[Sequence[int]], *, ours: bool = False) -> None:
        """Called after every run; noted of the first one of each contender. Raises: WrongWork of `ours`."""
        if not self._wanted:
            return
        mine = [list(output) for output in outputs]
        if self._first is None:
            self._first = who, mine
            self._seen.add(who)  # there is nothing to say of it
        named, theirs = self._first
        same = sum(a == b for a, b in zip(theirs, mine, strict=True))
        if ours and same < AGREEING * len(mine):
            raise WrongWork(f"{who}: the tokens of only {same} of {len(mine)} rows are those of {named}")
        if who in self._seen:
            return
        self._seen.add(who)
        self._notes.append(f"{who}: the tokens of {same} of {len(mine)} rows are those of {named}")


def mixed(dtype: str) -> Workload:
    """64 rows, 16 to 200 tokens in, 8 to 128 out."""
    draw = random.Random(_SEED)
    rows, longest_in, longest_out = (6, 32, 12) if SMALL else (64, 200, 128)
    lengths = [(draw.randint(16, longest_in), draw.randint(min(8, longest_out), longest_out)) for _ in range(rows)]
    return _one_job(dtype, lengths)


def equal(rows: int, dtype: str, tokens: int = 64) -> Workload:
    """Rows of `tokens` in and as many out."""
    return _one_job(dtype, [(8, 4)] * min(rows, 4) if SMALL else [(tokens, tokens)] * rows)


def users(dtype: str) -> Workload:
    """8 jobs of one row each, 64 tokens in and 64 out."""
    work = equal(8, dtype)
    return replace(work, jobs=tuple((row,) for row in work.rows))


def prefill(dtype: str) -> Workload:
    """64 prompts of 128 tokens that are scored: one token out, the least that a generating engine gives."""
    work = _one_job(dtype, [(16, 1)] * 4 if SMALL else [(128, 1)] * 64)
    return replace(work, counted="prompt")


def joined(dtype: str) -> tuple[Workload, Row]:
    """16 rows that decode for long, 32 tokens in and 256 out; and a prompt of 4,000 tokens that joins them."""
    rows = [(8, 96)] * 4 if SMALL else [(32, 256)] * 16
    return _one_job(dtype, rows), Row(_cut(600 if SMALL else 4000, random.Random(_SEED + 1)), 1)


def crowd() -> Workload:
    """Rows of 384 tokens in all, of which 30 fill 512 MiB with keys and values, and more than that."""
    return _one_job("float32", [(100, 4)] * 8 if SMALL else [(320, 64)] * 48)


def twice() -> Workload:
    """128 rows, 16 to 32 tokens in, 16 to 48 out, and then the same ones again."""
    draw = random.Random(_SEED)
    lengths = [(draw.randint(16, 32), draw.randint(16, 48)) for _ in range(24 if SMALL else 128)]
    work = _one_job("float32", lengths)
    return replace(work, jobs=(work.rows + work.rows,))


def texts(count: int) -> Iterator[str]:
    """Short ones, all different, out of the documents."""
    words = _text().split()
    draw = random.Random(_SEED)
    starts = (draw.randrange(len(words) - 12) for _ in range(count))
    return (f"{number} {' '.join(words[start : start + 12])}" for number, start in enumerate(starts))


def _one_job(dtype: str, lengths: Sequence[tuple[int, int]]) -> Workload:
    draw = random.Random(_SEED)
    return Workload(dtype, (tuple(Row(_cut(tokens, draw), output_tokens) for tokens, output_tokens in lengths),))


def _cut(tokens: int, draw: random.Random) -> tuple[int, ...]:
    """That many tokens in a row, from anywhere."""
    stream = _tokens()
    start = draw.randrange(len(stream) - tokens)
    return stream[start : start + tokens]


@cache
def _tokens() -> tuple[int, ...]:
    """The documents in the model's tokens; without torch, which the tokenizer of transformers would import."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    return tuple(tokenizer.encode(_text(), add_special_tokens=False).ids)


def _text() -> str:
    return "\n\n".join((ROOT / name).read_text() for name in _DOCUMENTS)
