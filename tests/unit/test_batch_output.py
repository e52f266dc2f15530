"""An output file on a disk that fails: what it holds stays whole, and nothing is taken as written that is not."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest

from mqinfer.batch_files import error_row
from mqinfer.batch_output import OutputFile, Ticket
from mqinfer.errors import OutputError, SettingsError

ROW = error_row(1, "a", "bad", code="x")


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond this in the body: the kernel writes what fits and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fits_only_in_part_is_taken_back_and_told(tmp_path: Path) -> None:
    path = tmp_path / "out"
    file = OutputFile(path)
    file.append([ROW])
    with largest_file(len(ROW) + 10), pytest.raises(OutputError, match=rf"can't write {path}: File too large\. "):
        file.append([ROW])
    assert path.read_bytes() == ROW
    with pytest.raises(OutputError, match="run the same command again"):
        file.append([ROW])  # there is room now, but the run has said that it ends
    assert path.read_bytes() == ROW
    file.close()
    again = OutputFile(path)
    again.append([ROW])
    again.close()
    assert path.read_bytes() == ROW + ROW


def test_a_device_that_is_full_is_told_by_name_and_cause(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "out")
    file._file.close()
    file._file = FileIO("/dev/full", "ab")
    with pytest.raises(OutputError, match="out: No space left on device"):
        file.append([ROW])
    file.close()


def test_rows_that_did_not_reach_the_disk_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanished(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = OutputFile(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", vanished)
    with pytest.raises(OutputError, match="Input/output error"):
        file.append([ROW])
    file.close()
    assert (tmp_path / "out").read_bytes() == b""


def test_what_others_appended_meanwhile_is_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out"
    file = OutputFile(path)
    path.write_bytes(ROW * 3)
    with largest_file(3 * len(ROW)), pytest.raises(OutputError):
        file.append([ROW])
    file.close()
    assert path.read_bytes() == ROW * 3


def test_a_ticket_that_can_not_be_written_stays_as_it_was(tmp_path: Path) -> None:
    ticket = Ticket(tmp_path / "out.job", "job-1", "p")
    ticket.save()
    before = (tmp_path / "out.job").read_bytes()
    ticket.enqueued = 5
    with largest_file(10), pytest.raises(OutputError, match=r"out\.job: File too large"):
        ticket.save()
    assert (tmp_path / "out.job").read_bytes() == before


def test_a_ticket_that_can_not_be_read_does_not_begin_another_job(tmp_path: Path) -> None:
    (tmp_path / "out.job").mkdir()
    (tmp_path / "p").write_text("{}\n")
    with pytest.raises(SettingsError, match=r"can't read .*out\.job: Is a directory"):
        Ticket.beside(tmp_path / "out", tmp_path / "p", job="two", plan="p")
