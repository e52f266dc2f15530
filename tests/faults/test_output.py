"""What happens to the output file of a job: the disk is full, the mount goes away."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from counts import Report
from processes import rows
from roster import Job, Roster
from workload import SHORT


@contextlib.contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own. Raises: CalledProcessError where we may not mount."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def _may_mount(folder: Path) -> bool:
    try:
        with _small_disk(folder / "probe", "64k"):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False


def _stops(job: Job) -> str:
    """Wait for its end; what it says to people."""
    assert job.actor.wait() == 2, job.fleet.logs()
    said = job.actor.said()
    assert "Traceback" not in said, said
    (sentence,) = [line for line in said.splitlines() if line.startswith("mqinfer: ")]
    return sentence


def test_a_full_disk_stops_the_job_in_a_sentence_and_it_goes_on_later(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault = "disk full under the output file"
    if _may_mount(tmp_path):
        report.done = "a file system of 32 KiB, made bigger afterwards"
        with _small_disk(tmp_path / "disk", "32k") as disk:
            job = healed.job(SHORT, disk.parent)
            job.actor.kill()  # its files belong on the small disk
            prompts, output = job.output.with_suffix(".prompts"), disk / "out.jsonl"
            job = healed.run(prompts, output, SHORT)
            report.note = _stops(job)
            assert "No space left" in report.note
            subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
            healed.run(prompts, output, SHORT).finish(answers, report)
    else:  # an fsync that fails stands for the disk
        report.done = "fsync says ENOSPC"
        _fsync_fails("ENOSPC", "No space left", healed, answers, report, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(("number", "words"), [("EIO", "Input/output error"), ("ESTALE", "Stale file handle")])
def test_a_vanished_mount_stops_the_job_in_a_sentence_and_it_goes_on_later(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path, number: str, words: str
) -> None:
    report.fault, report.done = "output on a vanished mount", f"fsync says {number}"
    _fsync_fails(number, words, healed, answers, report, tmp_path)


def _fsync_fails(
    number: str, words: str, roster: Roster, answers: dict[str, str], report: Report, folder: Path
) -> None:
    job = roster.job(SHORT, folder, sabotage=f"fsync:{number}:4")
    report.note = _stops(job)
    assert words in report.note
    assert 0 < len(rows(job.output)) < len(SHORT)
    roster.run(job.output.with_suffix(".prompts"), job.output, SHORT).finish(answers, report)


@pytest.mark.faults
def test_a_folder_that_vanished_under_the_output_file_loses_nothing(
    healed: Roster, answers: dict[str, str], report: Report, tmp_path: Path
) -> None:
    report.fault, report.done = "output on a vanished mount", "unmounted under the job, mounted again later"
    if not _may_mount(tmp_path):
        pytest.skip("no right to mount; the same with ESTALE runs everywhere")
    prompts_only = healed.job(SHORT, tmp_path)
    prompts_only.actor.kill()
    prompts = prompts_only.output.with_suffix(".prompts")
    with _small_disk(tmp_path / "disk", "8m") as disk:
        kept = tmp_path / "elsewhere"
        kept.mkdir()
        subprocess.run(["mount", "--bind", disk, kept], check=True)
        try:
            job = healed.run(prompts, disk / "out.jsonl", SHORT)
            job.reach(0.2)
            subprocess.run(["umount", "-l", disk], check=True)
            code = job.actor.wait()
            report.note = f"it ended with {code}"
            # Its open file is on the disk that went away: what is there counts as soon as it is back.
            subprocess.run(["mount", "--bind", kept, disk], check=True)
            healed.run(prompts, disk / "out.jsonl", SHORT).finish(answers, report)
        finally:
            subprocess.run(["umount", "-l", kept], check=False)
