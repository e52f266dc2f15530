"""What must hold: it is told what happens, counts, and says what went wrong. It changes nothing.

It counts as RabbitMQ's own Jepsen suite does: attempted, acknowledged, lost, duplicated, unexpected.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from mqinfer.errors import WireError
from mqinfer.messages import Message, Request
from mqinfer.wire import decode
from simulation.model import Truth

#: Fewer deaths of workers than this can't be held against a row that did nothing.
DEATHS_TO_BLAME = 3
#: More complaints than this say nothing new.
MOST_COMPLAINTS = 20


#: What is published to see it buried.
GARBAGE = b"garbage"


@dataclass(frozen=True, slots=True)
class Poison:
    """What computing a row does to a worker: raises or kills, once it reaches a position."""

    what: str
    at: int


@dataclass(slots=True)
class Spell:
    """When an owner computed a request."""

    owner: str
    first_s: float
    last_s: float


@dataclass(slots=True)
class Oracle:
    """One run's judge."""

    truth: Truth
    clock: Callable[[], float]
    #: A request may be computed by its old owner for so long after a new one began.
    detection_s: float
    complaints: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    #: By request.
    poisons: dict[str, Poison] = field(default_factory=dict)
    poison_kills: Counter[str] = field(default_factory=Counter)
    #: Workers that went, but for those that a poison killed: each may be held against its rows.
    deaths: int = 0
    coordinators_lost: int = 0
    #: Messages that the network brought twice: each may kill once more.
    duplicates: int = 0
    #: By request, how often its step was given up because it took too long: it may kill yet.
    overdue: Counter[str] = field(default_factory=Counter)
    #: Garbage that was put where only a dead letter may become of it.
    garbage: int = 0
    #: How often a request was published anew to `requests`, or came back twice: each copy is a lease by right.
    copies: Counter[str] = field(default_factory=Counter)
    #: Stands for all messages that entered a queue.
    digest: int = 0
    _spells: dict[str, list[Spell]] = field(default_factory=dict)

    def complain(self, what: str) -> None:
        """Something that must never happen has happened."""
        if len(self.complaints) < MOST_COMPLAINTS:
            self.complaints.append(f"{self.clock():.3f} s: {what}")

    # -- while it runs ---------------------------------------------------------------------------

    def entered(self, queue: str, body: bytes, unattended: bool) -> None:
        """A body has entered a queue; `unattended`: nobody listens to it."""
        self.counts["messages"] += 1
        self.digest = zlib.crc32(body, zlib.crc32(queue.encode(), self.digest))
        if queue.endswith(".requests") or ".leases." in queue:
            request = _read(body)
            if isinstance(request, Request):
                self._check_checkpoint(request)
                # A checkpoint that comes after its coordinator is gone (late, or twice) goes to `requests` as well.
                self.copies[_name(request)] += queue.endswith(".requests") or unattended

    def leases_lost(self, bodies: Sequence[bytes]) -> None:
        """A coordinator is gone; what it held goes back. A checkpoint may lie beside what it was to replace."""
        names = Counter(_name(message) for body in bodies if isinstance(message := _read(body), Request))
        self.copies.update({name: count - 1 for name, count in names.items()})

    def _check_checkpoint(self, request: Request) -> None:
        name = _name(request)
        expected = self.truth.outputs.get(name, ())[: len(request.output)]
        if request.output != expected:
            self.complain(f"a checkpoint of {name} has tokens {request.output}, not {expected}")

    def computing(self, owners: Sequence[str], requests: Sequence[str]) -> None:
        """A worker computes these rows."""
        now_s = self.clock()
        self.counts["rows"] += len(requests)
        for owner, request in zip(owners, requests, strict=True):
            spells = self._spells.setdefault(request, [])
            spell = next((spell for spell in spells if spell.owner == owner), None)
            if spell is None:
                spells.append(Spell(owner, now_s, now_s))
            else:
                spell.last_s = now_s

    # -- at the end ------------------------------------------------------------------------------

    def judge_rows(self, asked: Sequence[str], rows: Sequence[bytes]) -> None:
        """The rows that a job's output file has in the end."""
        found: Counter[str] = Counter()
        for raw in rows:
            row = json.loads(raw)
            found[row["custom_id"]] += 1
            self._judge_row(row["custom_id"], row)
        self.counts["attempted"] += len(asked)
        self.counts["acknowledged"] += sum(found.values())
        for name in asked:
            if not found[name]:
                self.counts["lost"] += 1
                self.complain(f"{name} is lost")
            elif found[name] > 1:
                self.counts["duplicated"] += 1
                self.complain(f"{name} has {found[name]} rows")
        for name in found.keys() - set(asked):
            self.counts["unexpected"] += 1
            self.complain(f"{name} was never asked for")

    def _judge_row(self, name: str, row: dict[str, object]) -> None:
        error = row["error"]
        if error is None:
            expected = text_of(self.truth.outputs.get(name, ()))
            text = row["response"]["body"]["choices"][0]["text"]  # type: ignore[index]
            if text != expected:
                self.counts["unexpected"] += 1
                self.complain(f"{name} was answered {text!r}, not {expected!r}")
            elif name in self.poisons:
                self.complain(f"{name} {self.poisons[name].what} and was answered")
            return
        self.counts["failures"] += 1
        # A poison's kills make others suspects at most; the last blame is each row's own, in quarantine.
        deaths = self.deaths + min(self.poison_kills.total(), DEATHS_TO_BLAME - 1)
        if name not in self.poisons and deaths < DEATHS_TO_BLAME:
            self.counts["unexpected"] += 1
            self.complain(f"{name} failed after {deaths} deaths: {error}")

    def judge_dead(self, bodies: Sequence[bytes]) -> None:
        """Only what can't be read is among the dead letters."""
        if bodies.count(GARBAGE) < self.garbage:
            self.complain(f"{self.garbage} bodies were garbage, {bodies.count(GARBAGE)} are among the dead letters")
        for body in bodies:
            if body != GARBAGE:
                self.complain(f"a {type(_read(body)).__name__} is among the dead letters")

    def judge_leases(self) -> None:
        """Nobody goes on computing what somebody else took over."""
        for request, spells in self._spells.items():
            if self.copies[request] > 1:
                continue
            for one, other in combinations(spells, 2):
                over_s = min(one.last_s, other.last_s) - max(one.first_s, other.first_s)
                if over_s > self.detection_s:
                    self.complain(f"{request} was computed for two owners at once for {over_s:.1f} s")

    def judge_poison(self) -> None:
        """A row that kills takes no more than three workers with it for each time it was asked."""
        for request, kills in self.poison_kills.items():
            # A coordinator that is lost may have the row under way; what it knew to blame it for was kept before.
            unkept = self.coordinators_lost + self.duplicates + self.overdue[request]
            allowed = DEATHS_TO_BLAME * max(self.copies[request], 1) + unkept
            if kills > allowed:
                self.complain(f"{request} killed {kills} workers")


def text_of(tokens: Sequence[int]) -> str:
    """How the simulated tokenizer writes them: one character each."""
    return "".join(chr(0x4E00 + token) for token in tokens)


def _read(body: bytes) -> Message | None:
    try:
        return decode(body)
    except WireError:
        return None


def _name(request: Request) -> str:
    return str(json.loads(request.tag)[1])
