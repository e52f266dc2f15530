"""The files of a batch job: lines in, rows out, and what is needed to go on after a stop. No queues here.

Nothing is kept per line but a few bytes, so that a file of a million lines fits in little memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from mqinfer.errors import RequestError, SettingsError
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
from mqinfer.settings import BatchSettings
from mqinfer.tokenizer import Tokenizer

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
        if not isinstance(number, int) or not isinstance(custom_id, str | None):
            raise ValueError("not a batch line's tag")
        return cls(number, custom_id, str(url), str(model))


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, the line) for every line that is not blank; an oversize one comes cut short."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
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
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        raise LineError(f"line {number}: custom_id is missing or not a text of 1 to 512 characters", None)
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
        raise RequestError(f"field {min(unknown)}: is not supported here")
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
    prompt = _prompt(line, tokenizer)
    room = plan.context_tokens - len(prompt)
    if not prompt:
        raise RequestError("the prompt has no tokens")
    if room < 1:
        raise RequestError(f"the prompt is too long: {len(prompt)} tokens, the model takes {plan.context_tokens}")
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

    #: By line number.
    requests: dict[int, Request]
    refusals: list[Refusal]
    #: Number of the last line looked at.
    last: int


class LineReader:
    """Turns the lines of an input file into requests of one job."""

    def __init__(self, path: Path, job: str, plan: Plan, tokenizer: Tokenizer, settings: BatchSettings) -> None:
        self.path = path
        self._job = job
        self._plan = plan
        self._tokenizer = tokenizer
        self._settings = settings

    def chunks(self, has: Callable[[int, str | None], bool], size: int = 64) -> Iterator[Chunk]:
        """The lines that do not have their row, `size` lines of input at a time. Raises: OSError."""
        lines = read_lines(self.path)
        seen: set[int] = set()
        while batch := list(islice(lines, size)):
            chunk = Chunk({}, [], batch[-1][0])
            for number, raw in batch:
                self._sort(number, raw, chunk, seen, has)
            yield chunk

    def _sort(
        self, number: int, raw: bytes, chunk: Chunk, seen: set[int], has: Callable[[int, str | None], bool]
    ) -> None:
        try:
            line = parse_line(number, raw)
            mark = fingerprint(line.custom_id)
            if mark in seen:
                raise LineError(f"line {number}: custom_id {line.custom_id!r} is on an earlier line already", None)
            seen.add(mark)
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
        return error_row(tag.number, tag.custom_id, result.error, code=result.error_code)
    body = response_body(result, url=tag.url, model=tag.model, token_text=token_text)
    return batch_row(row_id=result.id, custom_id=tag.custom_id, body=body, error=None)


def error_row(number: int, custom_id: str | None, message: str, *, code: str) -> bytes:
    """The output line for an input line that failed."""
    error = {"code": code, "message": message, "line": number}
    return batch_row(row_id=f"line-{number}", custom_id=custom_id, body=None, error=error)


def fingerprint(name: str) -> int:
    """64 bits that stand for a custom_id, so that a million of them fit in memory."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class OutputFile:
    """The results file, open for appending; what it held already is known."""

    def __init__(self, path: Path, *, retry_errors: bool = False) -> None:
        """Repairs a torn last line. Raises: SettingsError where the file can't be written or isn't ours."""
        self.path = path
        #: Fingerprints of the custom_ids that have a row, and the numbers of lines without id that have one.
        self.ids: set[int] = set()
        self.lines: set[int] = set()
        self.answered = 0
        self.failed = 0
        try:
            if path.exists():
                self._repair(retry_errors)
            self._file: BinaryIO = path.open("ab")
        except OSError as error:
            raise SettingsError(f"can't write {path}: {error.strerror}") from error

    def append(self, rows: list[bytes]) -> None:
        """Returns when the rows are on disk. Raises: OSError."""
        self._file.write(b"".join(rows))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def _repair(self, retry_errors: bool) -> None:
        kept = self.path.with_name(self.path.name + ".repair")
        try:
            if self._copy_good(kept, retry_errors):
                kept.replace(self.path)
        finally:
            kept.unlink(missing_ok=True)

    def _copy_good(self, kept: Path, retry_errors: bool) -> bool:
        """Whether anything was left out."""
        changed = False
        with self.path.open("rb") as old, kept.open("wb") as new:
            for raw in old:
                if raw.endswith(b"\n") and self._know(raw, retry_errors):
                    new.write(raw)
                else:
                    changed = True
            new.flush()
            os.fsync(new.fileno())
        return changed

    def _know(self, raw: bytes, retry_errors: bool) -> bool:
        """Take note of a row; False where it is not to stay."""
        try:
            row = json.loads(raw)
            custom_id, error = row["custom_id"], row["error"]
        except (ValueError, TypeError, KeyError):
            raise SettingsError(
                f"{self.path} has a line that is not a batch result: give -o another file, or remove this one"
            ) from None
        if error and retry_errors:
            return False
        self.failed += bool(error)
        self.answered += not error
        if custom_id is not None:
            self.ids.add(fingerprint(custom_id))
        if error:
            self.lines.add(int(error.get("line", 0)))
        return True


@dataclass(slots=True)
class Ticket:
    """Beside an output file: which job of the fleet is filling it, so that a later run goes on with the same one."""

    #: None: nothing is kept, the job dies with this process.
    path: Path | None
    job: str
    plan: str
    #: Every line up to here that has no row was enqueued.
    enqueued: int = 0

    @classmethod
    def beside(cls, output: Path, *, job: str, plan: str) -> tuple[Ticket, bool]:
        """The ticket of an earlier run with the same plan, and True; or a new one for `job`, and False."""
        path = output.with_name(output.name + ".job")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            old = json.loads(path.read_text())
            if old["plan"] == plan:
                return cls(path, str(old["job"]), plan, int(old["enqueued"])), True
        return cls(path, job, plan), False

    def save(self) -> None:
        """Raises: OSError."""
        if self.path is None:
            return
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps({"job": self.job, "plan": self.plan, "enqueued": self.enqueued}))
        new.replace(self.path)

    def remove(self) -> None:
        """The job is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
