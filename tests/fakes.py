"""An engine without a model, for tests of everything around it.

Its "hidden states" are a hash chained over the row's tokens and its stages, so that a wrong token, position,
stage, row or cache gives another result or an error at once.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mqinfer.messages import Miss, MissReason, Row, Sampled
from mqinfer.plan import Plan, StageSpec
from mqinfer.stage_engine import Done, Work

HIDDEN = 4
VOCABULARY = 1000
EOS = 2


def make_plan(name: str, stages: int = 2, context_tokens: int = 512) -> Plan:
    """A plan for the fake engine."""
    return Plan(
        name=name,
        model="fake",
        dtype="float32",
        stages=tuple(StageSpec(first=k, end=k + 1) for k in range(stages)),
        fingerprint="f" * 64,
        model_type="llama",
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
        context_tokens=context_tokens,
        eos_tokens=(EOS,),
    )


def _hash(*parts: object) -> int:
    """Fits a float32 exactly."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:3], "big")


def _embed(tokens: Sequence[int]) -> int:
    return _hash("embed", tuple(tokens))


def continuation(plan: Plan, prompt: Sequence[int], count: int) -> list[int]:
    """What the fake model answers."""
    tokens = list(prompt)
    for _ in range(count):
        value = _embed(tokens)
        for stage in range(len(plan.stages)):
            value = _hash(stage, value)
        tokens.append(_token(value))
    return tokens[len(prompt) :]


def _token(value: int) -> int:
    return 3 + value % (VOCABULARY - 3)  # never EOS


@dataclass
class FakeEngine:
    """Has the interface of StageEngine; keeps the tokens (stage 0) or the hashes of each row's positions."""

    plan: Plan
    stage: int
    budget_rows: int = 1000
    seconds_per_forward: float = 0.0
    seconds_per_position: float = 0.0
    #: Called with the rows before they are computed; may raise to play a crash.
    before: Callable[[Sequence[Row]], None] | None = None
    #: Every forward fails.
    broken: bool = False
    device: str = "cpu"
    kv_budget_bytes: int = 10**9
    computed: int = 0
    cache: dict[tuple[str, int], tuple[int, list[int]]] = field(default_factory=dict)
    threads: set[int] = field(default_factory=set)

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == len(self.plan.stages) - 1

    @property
    def cached_rows(self) -> int:
        return len(self.cache)

    @property
    def kv_used_bytes(self) -> int:
        return self.cached_rows

    def fits(self, rows: Sequence[Row]) -> bool:
        return len(self.cache) + len(rows) <= self.budget_rows

    def forget(self, owner: str, rows: Sequence[tuple[int, int]]) -> None:
        for row, epoch in rows:
            if (owner, row) in self.cache and self.cache[owner, row][0] <= epoch:
                del self.cache[owner, row]

    def forget_idle(self) -> int:
        return 0

    def forget_all(self) -> None:
        self.cache.clear()

    def run(self, works: Sequence[Work]) -> list[Done]:
        self.threads.add(threading.get_ident())
        positions = sum(row.count for work in works for row in work.rows)
        if seconds := self.seconds_per_forward + self.seconds_per_position * positions:
            time.sleep(seconds)
        return [self._run(work) for work in works]

    def _run(self, work: Work) -> Done:
        if self.before is not None:
            self.before(work.rows)
        values = (work.tokens if self.first else work.hidden[:, 0].to(torch.int64)).tolist()  # type: ignore[index, union-attr]
        rows, hidden, sampled, misses = [], [], [], []
        for row in work.rows:
            new, values = values[: row.count], values[row.count :]
            problem = MissReason.COMPUTE if self.broken else self._admit(work.owner, row)
            if problem is not None:
                misses.append(Miss(row=row.row, epoch=row.epoch, stage=self.stage, reason=problem))
                continue
            out = self._compute(work.owner, row, new)
            rows.append(row)
            hidden += out
            if self.last and row.sampling is not None:
                sampled.append(Sampled(row=row.row, epoch=row.epoch, token=_token(out[-1])))
        tensor = torch.tensor(hidden, dtype=torch.float32).reshape(-1, 1).expand(-1, HIDDEN).contiguous()
        return Done(
            rows=tuple(rows), hidden=None if self.last else tensor, sampled=tuple(sampled), misses=tuple(misses)
        )

    def _admit(self, owner: str, row: Row) -> MissReason | None:
        held = self.cache.get((owner, row.row))
        if held is None or held[0] < row.epoch:
            if row.start:
                return MissReason.CACHE
            if held is None and not self.fits([row]):
                return MissReason.ROOM
            self.cache[owner, row.row] = (row.epoch, [])
            return None
        return None if held[0] == row.epoch and len(held[1]) >= row.start else MissReason.CACHE

    def _compute(self, owner: str, row: Row, new: Sequence[int]) -> list[int]:
        self.computed += row.count
        positions = self.cache[owner, row.row][1]
        positions[row.start : row.start + row.count] = new
        if self.first:
            embedded = [_embed(positions[: row.start + i + 1]) for i in range(row.count)]
            return [_hash(0, value) for value in embedded]
        return [_hash(self.stage, value) for value in new]


class FakeTokenizer:
    """One token is one character."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(character) % (VOCABULARY - 3) for character in text]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(97 + token % 26) for token in tokens if token != EOS)

    def decode_token(self, token: int) -> str:
        return self.decode([token])
