"""A batch job's output file and the ticket beside it: what is needed to go on after a stop. No queues here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from mqinfer.batch_files import MOST_LINES, count_lines, fingerprint, lines_digest
from mqinfer.compact_sets import FingerprintSet, LineSet
from mqinfer.errors import OutputError, SettingsError


class OutputFile:
    """The results file, open for appending; what it held already is known."""

    def __init__(self, path: Path, *, retry_errors: bool = False, job: str = "") -> None:
        """Repairs a torn last line; with `job`, no rows but that job's may stand there.

        Raises: SettingsError where the file can't be written or isn't ours.
        """
        self.path = path
        self._prefix = f"batch_req_{job}." if job else ""
        #: Fingerprints of the custom_ids that have a row, and the numbers of lines without id that have one.
        self.ids = FingerprintSet()
        self.lines = LineSet()
        self.answered = 0
        self.failed = 0
        #: Why nothing more can be written; "" while all is well.
        self._broken = ""
        try:
            if path.exists():
                self._read(retry_errors)
            self._file = FileIO(path, "ab")
            self._end = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise SettingsError(f"can't write {path}: {error.strerror}") from error

    def append(self, rows: list[bytes]) -> None:
        """Returns when the rows are on disk.

        Raises: OutputError; then none of these rows is to be taken as written, the file ends with the row before
        them as far as the disk allows, and nothing is ever appended to it again.
        """
        if self._broken:
            raise OutputError(self._broken)
        data = b"".join(rows)
        try:
            with _going_on(self.path):
                self._write(data)
        except OutputError as error:
            self._broken = str(error)
            self._take_back(len(data))
            raise
        self._end += len(data)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def _take_back(self, most_bytes: int) -> None:
        """What came of the last write. Where even that fails, the next run cuts the torn line off."""
        with suppress(OSError):
            if self._end < os.fstat(self._file.fileno()).st_size <= self._end + most_bytes:
                self._file.truncate(self._end)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def _read(self, retry_errors: bool) -> None:
        self.ids = FingerprintSet(expect=count_lines(self.path))
        whole_bytes, dropped = 0, 0
        with self.path.open("rb") as file:
            for raw in file:
                if raw.endswith(b"\n"):
                    whole_bytes += len(raw)
                    dropped += not self._know(raw, retry_errors)
        if dropped:
            self._rewrite(whole_bytes)
        elif whole_bytes < self.path.stat().st_size:
            os.truncate(self.path, whole_bytes)

    def _rewrite(self, whole_bytes: int) -> None:
        """Without the error rows."""
        kept = self.path.with_name(self.path.name + ".kept")
        with self.path.open("rb") as old, kept.open("wb") as new:
            while old.tell() < whole_bytes:
                if not json.loads(raw := old.readline())["error"]:
                    new.write(raw)
            new.flush()
            os.fsync(new.fileno())
        kept.replace(self.path)

    def _know(self, raw: bytes, retry_errors: bool) -> bool:
        """Take note of a row; False where it is not to stay."""
        try:
            row = json.loads(raw)
            custom_id, error = row["custom_id"], row["error"]
            line = int(error.get("line", 0)) if error else 0
            ours = str(row["id"]).startswith(self._prefix)
            if not 0 <= line <= MOST_LINES:
                raise ValueError("no line's number")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise SettingsError(
                f"{self.path} has a line that is not a batch result: give -o another file, or remove this one"
            ) from None
        if not ours:
            raise SettingsError(f"{self.path} has rows of another job: give -o another file")
        if error and retry_errors:
            return False
        self.failed += bool(error)
        self.answered += not error
        if custom_id is not None:
            self.ids.add(fingerprint(custom_id))
        elif error:
            self.lines.add(line)
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
    #: Lines up to here may have been.
    announced: int = 0
    #: Digest of the announced lines, see `lines_digest`: a file that was changed there is another job's.
    digest: str = ""

    @classmethod
    def beside(cls, output: Path, prompts: Path, *, job: str, plan: str) -> tuple[Ticket, str]:
        """The ticket of an earlier run that this run goes on with, or a new one for `job`; and an abandoned job.

        The second is the job of an earlier run with another plan or changed prompts, "" where there is none.
        Raises: SettingsError where there is a ticket that can't be read: a new job would do its work again.
        """
        path = output.with_name(output.name + ".job")
        fresh = cls(path, job, plan, digest=lines_digest(prompts, 0))
        try:
            old = cls(path, **json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return fresh, ""
        except OSError as error:
            raise SettingsError(f"can't read {path}: {error.strerror or error}") from error
        if old.plan == plan and lines_digest(prompts, max(old.announced, old.enqueued)) == old.digest:
            return old, ""
        return fresh, old.job

    def save(self) -> None:
        """Raises: OutputError; the ticket is as it was then."""
        if self.path is None:
            return
        new = self.path.with_name(self.path.name + ".new")
        kept = ("job", "plan", "enqueued", "announced", "digest")
        fields = {name: getattr(self, name) for name in kept}
        with _going_on(self.path):
            new.write_text(json.dumps(fields))
            new.replace(self.path)

    def remove(self) -> None:
        """The job is over. Raises: OutputError."""
        if self.path is not None:
            with _going_on(self.path):
                self.path.unlink(missing_ok=True)


@contextmanager
def _going_on(path: Path) -> Iterator[None]:
    """A disk that is full or gone becomes a sentence that says how to go on."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"can't write {path}: {error.strerror or error}. What it holds is whole, the rest of the results waits: "
            "make room or bring the disk back, then run the same command again"
        ) from error
