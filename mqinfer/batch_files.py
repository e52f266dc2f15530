"""The files of a batch job: lines in, rows out, and what is needed to go on after a stop. No queues here.

Nothing is kept per line but a few bytes, so that a file of a million lines fits in little memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mqinfer.compact_sets import FingerprintSet
from mqinfer.errors import RequestError
from mqinfer.messages import Request, Result
from mqinfer.openai_bodies import (
    COMPLETIONS,
    ChatBody,
    CompletionBody,
    TokenText,
    batch_row,
    failed,
    parse_body,
    response_body,
    sampling,
)
from mqinfer.plan import Plan
from mqinfer.requests import check_logprobs
from mqinfer.settings import BatchSettings
from mqinfer.tokenizer import Tokenizer

#: The number of a line is nowhere larger: so many bits may be kept of them.
MOST_LINES = 10**9
#: A longer line is refused unread.
MAX_LINE_BYTES = 16 * 2**20
#: The keys of a line in OpenAI's batch format; every other line is in the short form.
_LINE_KEYS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input that can be asked for."""

    number: int
    custom_id: str
    url: str
    body: ChatBody | CompletionBody


@dataclass(frozen=True, slots=True)
class Tag:
    """What a request carries along so that its result can be written by whoever gets it."""

    number: int
    custom_id: str | None
    url: str
    model: str

    def dump(self) -> str:
        """As `Request.tag`."""
        return json.dumps([self.number, self.custom_id, self.url, self.model])

    @classmethod
    def load(cls, tag: str) -> Tag:
        """Raises: ValueError where it is not one of ours."""
        number, custom_id, url, model = json.loads(tag)
        if type(number) is not int or not 0 < number <= MOST_LINES or not isinstance(custom_id, str | None):
            raise ValueError("not a batch line's tag")
        return cls(number, custom_id, str(url), str(model))


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, the line) for every line that is not blank; an oversize one comes cut short."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
            if line.strip():
                yield number, line


def count_lines(path: Path) -> int:
    """How many lines `read_lines` will give, about: blank ones count too."""
    with path.open("rb") as file:
        lines, last = 0, b"\n"
        while chunk := file.read(2**20):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last != b"\n")


def parse_line(number: int, raw: bytes) -> Line:
    """Raises: RequestError that says what is wrong; its `custom_id` attribute has the id where there is one."""
    if len(raw) > MAX_LINE_BYTES:
        raise LineError(f"line {number}: longer than {MAX_LINE_BYTES} bytes", None)
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise LineError(f"line {number}: not JSON: {error}", None) from None
    if not isinstance(line, dict):
        raise LineError(f"line {number}: not a JSON object", None)
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512 or not custom_id.isprintable():
        raise LineError(f"line {number}: custom_id is missing or not a text of 1 to 512 printable characters", None)
    try:
        url, body = _long_form(line) if _LINE_KEYS & line.keys() - {"custom_id"} else _short_form(line)
        return Line(number, custom_id, url, parse_body(url, body))
    except RequestError as error:
        raise LineError(f"line {number}: {error}", custom_id) from None


class LineError(RequestError):
    """The line can't be asked for."""

    def __init__(self, message: str, custom_id: str | None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


def _long_form(line: dict[str, Any]) -> tuple[str, Any]:
    if unknown := line.keys() - _LINE_KEYS:
        raise RequestError(f"field {min(unknown)!r}: is not supported here")
    if line.get("method", "POST") != "POST":
        raise RequestError(f"field method: {line['method']!r} is not POST")
    if not isinstance(line.get("body"), dict):
        raise RequestError("field body: is missing or not an object")
    return str(line.get("url", "")), line["body"]


def _short_form(line: dict[str, Any]) -> tuple[str, Any]:
    return COMPLETIONS, {key: value for key, value in line.items() if key != "custom_id"}


def to_request(line: Line, *, job: str, plan: Plan, tokenizer: Tokenizer, settings: BatchSettings) -> Request:
    """Raises: RequestError where the model can't take it."""
    _check_model(line.body.model, plan)
    check_logprobs(line.body.limit() or settings.max_tokens, line.body.alternatives())
    prompt = _prompt(line, tokenizer)
    room = plan.context_tokens - len(prompt)
    if not prompt:
        raise RequestError("the prompt has no tokens")
    if room < 1:
        raise RequestError(f"the prompt is too long: {len(prompt)} tokens, the model takes {plan.context_tokens}")
    if not all(0 <= token < plan.vocab_size for token in prompt):
        raise RequestError(f"field prompt: a token id is not in the model's vocabulary of {plan.vocab_size}")
    return Request(
        id=f"{job}.{line.number}",
        job=job,
        plan=plan.digest,
        tag=Tag(line.number, line.custom_id, line.url, plan.name).dump(),
        prompt=tuple(prompt),
        max_tokens=min(line.body.limit() or settings.max_tokens, room),
        stop=line.body.stops(),
        ignore_eos=line.body.ignore_eos,
        sampling=sampling(line.body, temperature=settings.temperature, name=line.custom_id),
    )


def _prompt(line: Line, tokenizer: Tokenizer) -> list[int]:
    if isinstance(line.body, ChatBody):
        return tokenizer.encode_chat([message.plain() for message in line.body.messages])
    return tokenizer.encode(line.body.prompt) if isinstance(line.body.prompt, str) else line.body.prompt


def _check_model(model: str | None, plan: Plan) -> None:
    names = {plan.name, plan.model, Path(plan.model).name}
    if model is not None and model not in names:
        raise RequestError(f"field model: {model!r} is not served here, only {Path(plan.model).name!r}")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A line that can't be asked for."""

    number: int
    custom_id: str | None
    why: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """What some lines of the input come to."""

    #: Keyed by line number, those that may take longest first: few rows are left to compute alone at the end.
    requests: dict[int, Request]
    refusals: list[Refusal]
    #: Number of the last line looked at, and `lines_digest` up to it.
    last: int
    digest: str


class LineReader:
    """Turns the lines of an input file into requests of one job."""

    def __init__(self, path: Path, job: str, plan: Plan, tokenizer: Tokenizer, settings: BatchSettings) -> None:
        self.path = path
        self._job = job
        self._plan = plan
        self._tokenizer = tokenizer
        self._settings = settings
        self._lines: int | None = None

    def count(self) -> int:
        """As `count_lines`, which reads the whole file, but only once."""
        if self._lines is None:
            self._lines = count_lines(self.path)
        return self._lines

    def chunks(self, has: Callable[[int, str | None], bool], size: int = 64) -> Iterator[Chunk]:
        """The lines that do not have their row, `size` lines of input at a time. Raises: OSError."""
        lines = read_lines(self.path)
        seen = FingerprintSet(expect=self.count())
        digest = hashlib.blake2b(digest_size=16)
        while batch := list(islice(lines, size)):
            for _, raw in batch:
                digest.update(raw.strip())
            chunk = Chunk({}, [], batch[-1][0], digest.hexdigest())
            for number, raw in batch:
                self._sort(number, raw, chunk, seen, has)
            yield replace(chunk, requests=dict(sorted(chunk.requests.items(), key=lambda each: -each[1].max_tokens)))

    def _sort(
        self, number: int, raw: bytes, chunk: Chunk, seen: FingerprintSet, has: Callable[[int, str | None], bool]
    ) -> None:
        try:
            line = parse_line(number, raw)
            if not seen.add(fingerprint(line.custom_id)):
                raise LineError(f"line {number}: custom_id {line.custom_id!r} is on an earlier line already", None)
            if not has(number, line.custom_id):
                chunk.requests[number] = self._request(line)
        except LineError as error:
            chunk.refusals.append(Refusal(number, error.custom_id, str(error)))

    def _request(self, line: Line) -> Request:
        try:
            return to_request(line, job=self._job, plan=self._plan, tokenizer=self._tokenizer, settings=self._settings)
        except RequestError as error:
            raise LineError(f"line {line.number}: {error}", line.custom_id) from None


def result_row(result: Result, token_text: TokenText) -> bytes:
    """The output line for a result."""
    tag = Tag.load(result.tag)
    if failed(result):
        return error_row(tag.number, tag.custom_id, result.error, code=result.error_code, row_id=result.id)
    body = response_body(result, url=tag.url, model=tag.model, token_text=token_text)
    return batch_row(row_id=result.id, custom_id=tag.custom_id, body=body, error=None)


def error_row(number: int, custom_id: str | None, message: str, *, code: str, row_id: str = "") -> bytes:
    """The output line for an input line that failed."""
    error = {"code": code, "message": message, "line": number}
    return batch_row(row_id=row_id or f"line-{number}", custom_id=custom_id, body=None, error=error)


def fingerprint(name: str) -> int:
    """64 bits that stand for a custom_id, so that a million of them fit in memory."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def lines_digest(path: Path, last: int) -> str:
    """Stands for the lines of a prompts file up to number `last`."""
    digest = hashlib.blake2b(digest_size=16)
    for number, raw in read_lines(path):
        if number > last:
            break
        digest.update(raw.strip())
    return digest.hexdigest()
