"""A file of prompts over a fleet of fake engines: rows, resuming, detaching, memory."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTokenizer, continuation, make_plan
from fleet import PATIENCE_S, Fleet

from mqinfer.batch_files import LineReader, error_row
from mqinfer.batch_job import BatchJob, collect, enqueue_all
from mqinfer.batch_output import OutputFile, Ticket
from mqinfer.batch_rows import Progress, Rows
from mqinfer.errors import Disconnected, OutputError, SettingsError, TransportError
from mqinfer.link import Connect, first
from mqinfer.messages import Request
from mqinfer.producer import Producer
from mqinfer.queues import Topology, new_id, results
from mqinfer.settings import BatchSettings
from mqinfer.transports import open_transport
from mqinfer.transports.base import Transport

TOKENIZER: Any = FakeTokenizer()


@pytest.fixture
async def fleet(transport_url: str) -> AsyncIterator[Fleet]:
    fleet = Fleet(transport_url, make_plan(new_id("t")))
    yield fleet
    await fleet.close()


def write_prompts(path: Path, count: int, *, bad: tuple[int, ...] = ()) -> Path:
    good = {i: {"custom_id": f"id-{i}", "prompt": f"prompt {i}", "max_tokens": 4} for i in range(1, count + 1)}
    lines = ["nonsense" if i in bad else json.dumps(line) for i, line in good.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def connecting(url: str) -> Connect:
    async def connect() -> Transport:
        return await open_transport(url)

    return connect


class Run:
    """One run of the batch command's inner part."""

    def __init__(self, fleet: Fleet, prompts: Path, output: Path, *, window: int = 64) -> None:
        self._fleet = fleet
        self.file = OutputFile(output)
        self.rows = Rows(self.file, TOKENIZER.decode_token)
        self.ticket, abandoned = Ticket.beside(output, prompts, job=new_id("job"), plan=fleet.plan.digest)
        reader = LineReader(prompts, self.ticket.job, fleet.plan, TOKENIZER, BatchSettings())
        self.job = BatchJob(reader, self.rows, self.ticket, fleet.plan, window=window, abandoned=abandoned)
        self.stop = asyncio.Event()

    async def go(self) -> None:
        try:
            await asyncio.wait_for(self.job.run(connecting(self._fleet.url), self.stop), PATIENCE_S)
        finally:
            self.file.close()

    async def go_until(self, enough: Callable[[Progress], bool], *, kill: bool = False) -> None:
        """Then stop as Ctrl-C does, or leave everything as SIGKILL does."""
        task = asyncio.ensure_future(self.go())
        async with asyncio.timeout(PATIENCE_S):
            while not enough(self.rows.progress):
                await asyncio.sleep(0.002)
        if kill:
            task.cancel()
        self.stop.set()
        await asyncio.wait({task})


def answers(output: Path) -> dict[str | None, Any]:
    rows = [json.loads(raw) for raw in output.read_bytes().splitlines()]
    by_id = {row["custom_id"]: row for row in rows}
    assert len(by_id) == len(rows), "one row per custom_id"
    return by_id


def check(fleet: Fleet, output: Path, count: int) -> None:
    rows = answers(output)
    assert set(rows) == {f"id-{i}" for i in range(1, count + 1)}
    for i in range(1, count + 1):
        body = rows[f"id-{i}"]["response"]["body"]
        tokens = continuation(fleet.plan, TOKENIZER.encode(f"prompt {i}"), 4)
        assert body["choices"][0]["text"] == TOKENIZER.decode(tokens)


def start(fleet: Fleet, **fake: Any) -> None:
    for stage in (0, 1):
        fleet.worker(stage, **fake)
    fleet.coordinator()


async def test_a_file_of_prompts_is_answered_row_by_row(fleet: Fleet, tmp_path: Path) -> None:
    start(fleet)
    prompts, output = write_prompts(tmp_path / "p", 200), tmp_path / "out"
    run = Run(fleet, prompts, output)
    await run.go()
    check(fleet, output, 200)
    assert run.job.finished
    assert not output.with_name("out.job").exists()
    transport = await open_transport(fleet.url)
    assert await transport.inspect(results(run.ticket.job).name) is None, "the job's queue goes when it is done"
    await transport.close()


async def test_a_job_that_was_stopped_before_its_queue_could_go_is_not_done_yet(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(fleet)
    prompts, output = write_prompts(tmp_path / "p", 5), tmp_path / "out"
    run = Run(fleet, prompts, output)

    async def cut(_self: Producer) -> None:
        run.stop.set()
        raise TransportError("the link is down")

    with monkeypatch.context() as patched:
        patched.setattr(Producer, "forget", cut)
        await run.go()
    assert (run.job.answered, run.job.finished) == (True, False)
    again = Run(fleet, prompts, output)
    await again.go()
    assert again.job.finished
    check(fleet, output, 5)
    transport = await open_transport(fleet.url)
    assert await transport.inspect(results(run.ticket.job).name) is None
    await transport.close()


async def test_bad_lines_become_error_rows_beside_the_rest(fleet: Fleet, tmp_path: Path) -> None:
    start(fleet)
    prompts, output = write_prompts(tmp_path / "p", 10, bad=(3,)), tmp_path / "out"
    run = Run(fleet, prompts, output)
    await run.go()
    rows = answers(output)
    assert rows[None]["error"]["line"] == 3
    assert len(rows) == 10
    assert (run.rows.progress.answered, run.rows.progress.failed) == (9, 1)


@pytest.mark.parametrize("kill", [False, True])
async def test_a_job_that_was_stopped_goes_on_and_does_nothing_twice(fleet: Fleet, tmp_path: Path, kill: bool) -> None:
    start(fleet, seconds_per_forward=0.002)
    prompts, output = write_prompts(tmp_path / "p", 150, bad=(7,)), tmp_path / "out"
    await Run(fleet, prompts, output).go_until(lambda progress: progress.answered >= 20, kill=kill)
    kept = answers(output)
    assert len(kept) < 150
    again = Run(fleet, prompts, output)
    assert again.rows.progress.done == len(kept)
    await again.go()
    rows = answers(output)
    assert len(rows) == 150
    assert rows[None]["error"]["line"] == 7
    assert all(rows[name] == row for name, row in kept.items())


async def test_a_finished_job_run_again_does_nothing(fleet: Fleet, tmp_path: Path) -> None:
    start(fleet)
    prompts, output = write_prompts(tmp_path / "p", 5, bad=(2,)), tmp_path / "out"
    await Run(fleet, prompts, output).go()
    before = output.read_bytes()
    computed = [actor.engine.computed for actor in fleet.actors if actor.engine]
    await Run(fleet, prompts, output).go()
    assert output.read_bytes() == before
    assert [actor.engine.computed for actor in fleet.actors if actor.engine] == computed


async def test_an_empty_file_is_done_at_once(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"")
    await Run(fleet, tmp_path / "p", tmp_path / "out").go()
    assert (tmp_path / "out").read_bytes() == b""


async def test_no_more_than_the_window_is_enqueued(fleet: Fleet, tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "p", 1000), tmp_path / "out"
    run = Run(fleet, prompts, output, window=100)
    transport = await open_transport(fleet.url)
    most = 0
    task = asyncio.ensure_future(run.go())
    for _ in range(40):
        await asyncio.sleep(0.01)
        state = await transport.inspect(Topology(fleet.plan.name).requests.name)
        most = max(most, state.ready if state else 0)
    assert 64 <= most <= 100 + 64
    start(fleet)
    await task
    await transport.close()
    check(fleet, output, 1000)


async def test_requests_that_were_lost_are_enqueued_again(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqinfer.batch_job.STALL_S", 0.1)
    prompts, output = write_prompts(tmp_path / "p", 30), tmp_path / "out"
    task = asyncio.ensure_future(Run(fleet, prompts, output).go())
    transport = await open_transport(fleet.url)
    requests = Topology(fleet.plan.name).requests.name
    async with asyncio.timeout(PATIENCE_S):
        while (state := await transport.inspect(requests)) is None or state.ready < 30:
            await asyncio.sleep(0.01)
    assert await transport.purge(requests) == 30
    await transport.close()
    start(fleet)
    await task
    check(fleet, output, 30)


async def test_a_detached_job_is_collected_by_whoever_knows_its_name(fleet: Fleet, tmp_path: Path) -> None:
    start(fleet)
    prompts, output = write_prompts(tmp_path / "p", 100, bad=(50,)), tmp_path / "out"
    job, progress = new_id("job"), Progress()
    reader = LineReader(prompts, job, fleet.plan, TOKENIZER, BatchSettings())
    connect = connecting(fleet.url)
    assert await enqueue_all(reader, fleet.plan, job, connect, progress, asyncio.Event())
    assert progress.done == 100
    file = OutputFile(output, job=job)
    rows = Rows(file, TOKENIZER.decode_token)
    assert await asyncio.wait_for(collect(job, rows, connect, asyncio.Event(), wait=True), PATIENCE_S)
    file.close()
    assert len(answers(output)) == 100
    with pytest.raises(SettingsError, match="there is no job"):
        await collect(job, rows, connect, asyncio.Event(), wait=True)


def test_a_file_with_the_rows_of_another_job_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_bytes(error_row(1, "a", "bad", code="x", row_id="job-1.1"))
    OutputFile(output, job="job-1").close()
    with pytest.raises(SettingsError, match="another job"):
        OutputFile(output, job="job-2")


async def test_a_collection_whose_link_is_lost_at_the_very_end_still_ends(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(fleet)
    prompts, job, connect = write_prompts(tmp_path / "p", 5), new_id("job"), connecting(fleet.url)
    reader = LineReader(prompts, job, fleet.plan, TOKENIZER, BatchSettings())
    await enqueue_all(reader, fleet.plan, job, connect, Progress(), asyncio.Event())
    file = OutputFile(tmp_path / "out", job=job)
    rows, lost = Rows(file, TOKENIZER.decode_token), []
    land = Rows.land

    async def land_and_lose(self: Rows, arrivals: Any) -> list[int]:
        numbers = await land(self, arrivals)
        if not lost and self.progress.done == 5 and self.total is not None:
            lost.append(True)
            raise Disconnected
        return numbers

    monkeypatch.setattr(Rows, "land", land_and_lose)
    assert await asyncio.wait_for(collect(job, rows, connect, asyncio.Event(), wait=True), PATIENCE_S)
    file.close()
    assert lost
    check(fleet, tmp_path / "out", 5)


class FullDisk:
    """Takes so many bytes of output files and no more; stands in for `os.write` beneath them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        write = OutputFile._write

        def write_some(file: OutputFile, data: bytes) -> None:
            fits = data[: self.free_bytes]
            self.free_bytes -= len(fits)
            write(file, fits)
            if len(fits) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(OutputFile, "_write", write_some)


@pytest.mark.parametrize("torn", [False, True], ids=["taken back", "torn"])
async def test_a_full_disk_ends_the_run_in_a_sentence_and_the_next_one_goes_on(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    prompts, output = write_prompts(tmp_path / "p", 60), tmp_path / "out"
    disk = FullDisk(monkeypatch, 5000)
    if torn:
        monkeypatch.setattr(OutputFile, "_take_back", lambda self, most_bytes: None)
    start(fleet)
    run = Run(fleet, prompts, output)
    with pytest.raises(ExceptionGroup) as caught:
        await run.go()
    assert isinstance(first(caught.value), OutputError)
    assert str(output) in str(first(caught.value))
    whole = [raw for raw in output.read_bytes().splitlines(keepends=True) if raw.endswith(b"\n")]
    assert len(whole) == run.rows.progress.done or torn  # whole rows of a torn write are on disk and not acked
    assert run.rows.progress.done <= len(whole) < 60
    assert torn or output.read_bytes() == b"".join(whole)
    disk.free_bytes = 1 << 30
    await Run(fleet, prompts, output).go()
    check(fleet, output, 60)


async def test_what_could_not_be_written_is_not_acked(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, output, job = write_prompts(tmp_path / "p", 20), tmp_path / "out", new_id("job")
    connect = connecting(fleet.url)
    reader = LineReader(prompts, job, fleet.plan, TOKENIZER, BatchSettings())
    await enqueue_all(reader, fleet.plan, job, connect, Progress(), asyncio.Event())
    start(fleet)
    disk = FullDisk(monkeypatch, 0)
    file = OutputFile(output, job=job)
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(
            collect(job, Rows(file, TOKENIZER.decode_token), connect, asyncio.Event(), wait=True), PATIENCE_S
        )
    file.close()
    assert isinstance(first(caught.value), OutputError)
    assert output.read_bytes() == b""
    disk.free_bytes = 1 << 30
    again = OutputFile(output, job=job)
    await asyncio.wait_for(
        collect(job, Rows(again, TOKENIZER.decode_token), connect, asyncio.Event(), wait=True), PATIENCE_S
    )
    again.close()
    check(fleet, output, 20)


async def test_a_ticket_that_can_not_be_written_ends_the_run_and_the_next_one_goes_on(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, output = write_prompts(tmp_path / "p", 30), tmp_path / "out"
    start(fleet)
    (tmp_path / "out.job.new").mkdir()  # in the way of its new version
    with pytest.raises(OutputError, match=r"can't write .*out\.job: Is a directory"):
        await Run(fleet, prompts, output).go()
    (tmp_path / "out.job.new").rmdir()
    await Run(fleet, prompts, output).go()
    check(fleet, output, 30)


async def test_a_prompts_file_that_was_changed_is_another_job(fleet: Fleet, tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "p", 30), tmp_path / "out"
    first = Run(fleet, prompts, output)
    await first.go_until(lambda progress: first.ticket.enqueued == 30)
    prompts.write_text(json.dumps({"custom_id": "new", "prompt": "new", "max_tokens": 2}) + "\n" + prompts.read_text())
    start(fleet)
    await Run(fleet, prompts, output).go()
    assert set(answers(output)) == {"new", *(f"id-{i}" for i in range(1, 31))}


async def test_lines_that_may_have_been_enqueued_when_a_run_died_are_known_to_the_next(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: object) -> None:
        raise RuntimeError("killed")

    prompts, output = write_prompts(tmp_path / "p", 30), tmp_path / "out"
    first = Run(fleet, prompts, output)
    with monkeypatch.context() as patch:
        patch.setattr(Producer, "submit", die)
        with pytest.raises(ExceptionGroup):
            await first.go()
    assert first.ticket.enqueued == 0
    prompts.write_text(prompts.read_text().replace("id-30", "new"))
    second = Run(fleet, prompts, output)
    second.file.close()
    assert second.ticket.job != first.ticket.job


async def test_lines_that_a_lost_link_did_not_enqueue_go_out_again_at_once(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, lost = Producer.submit, asyncio.Event()

    async def lose_the_first(producer: Producer, requests: Any) -> None:
        if lost.is_set():
            await submit(producer, requests)
            return
        lost.set()
        raise TransportError("lost")

    monkeypatch.setattr(Producer, "submit", lose_the_first)
    monkeypatch.setattr("mqinfer.batch_job.STALL_S", 3600.0)
    start(fleet)
    await Run(fleet, write_prompts(tmp_path / "p", 10), tmp_path / "out", window=10).go()
    check(fleet, tmp_path / "out", 10)


async def test_lines_appended_to_the_prompts_file_are_done_by_the_next_run(fleet: Fleet, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = Run(fleet, write_prompts(tmp_path / "p", 20), output)
    await first.go_until(lambda progress: first.ticket.enqueued == 20)
    start(fleet)
    second = Run(fleet, write_prompts(tmp_path / "p", 30), output)
    assert second.ticket.job == first.ticket.job
    await second.go()
    check(fleet, output, 30)


async def test_a_collection_that_was_stopped_goes_on(fleet: Fleet, tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "p", 60), tmp_path / "out"
    job, connect = new_id("job"), connecting(fleet.url)
    reader = LineReader(prompts, job, fleet.plan, TOKENIZER, BatchSettings())
    await enqueue_all(reader, fleet.plan, job, connect, Progress(), asyncio.Event())
    nothing = OutputFile(output, job=job)
    assert not await collect(job, Rows(nothing, TOKENIZER.decode_token), connect, asyncio.Event(), wait=False)
    nothing.close()
    start(fleet, seconds_per_forward=0.005)
    stop, file = asyncio.Event(), OutputFile(output, job=job)
    rows = Rows(file, TOKENIZER.decode_token)
    task = asyncio.ensure_future(collect(job, rows, connect, stop, wait=True))
    async with asyncio.timeout(PATIENCE_S):
        while rows.progress.done < 10:
            await asyncio.sleep(0.002)
    stop.set()
    assert not await task
    file.close()
    again = OutputFile(output, job=job)
    rest = Rows(again, TOKENIZER.decode_token)
    assert await asyncio.wait_for(collect(job, rest, connect, asyncio.Event(), wait=True), PATIENCE_S)
    again.close()
    check(fleet, output, 60)


def test_a_request_says_which_line_it_was(tmp_path: Path) -> None:
    plan = make_plan("p")
    reader = LineReader(write_prompts(tmp_path / "p", 3), "job", plan, TOKENIZER, BatchSettings())
    (chunk,) = reader.chunks(lambda number, custom_id: number == 2)
    assert [request.id for request in chunk.requests.values() if isinstance(request, Request)] == ["job.1", "job.3"]
