"""Lines in, rows out: every bad line costs only itself, every stop can be gone on from."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTokenizer, make_plan
from hypothesis import given
from hypothesis import strategies as st

from mqinfer.batch_files import (
    Chunk,
    LineError,
    LineReader,
    Tag,
    count_lines,
    error_row,
    lines_digest,
    parse_line,
    read_lines,
    result_row,
)
from mqinfer.batch_output import OutputFile, Ticket
from mqinfer.errors import SettingsError
from mqinfer.messages import FinishReason, Request, Result, TokenLogprob
from mqinfer.settings import BatchSettings

PLAN = make_plan("tiny", context_tokens=40)


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def chat(**body: Any) -> bytes:
    body.setdefault("messages", [{"role": "user", "content": "hello"}])
    return line(custom_id="a", method="POST", url="/v1/chat/completions", body=body)


def completion(**body: Any) -> bytes:
    body.setdefault("prompt", "hello")
    return line(custom_id="a", method="POST", url="/v1/completions", body=body)


def read(path: Path, *lines: bytes) -> list[Chunk]:
    path.write_bytes(b"\n".join(lines) + b"\n")
    reader = LineReader(path, "job", PLAN, FakeTokenizer(), BatchSettings())  # type: ignore[arg-type]
    return list(reader.chunks(lambda number, custom_id: False))


def only(path: Path, raw: bytes) -> Request:
    (chunk,) = read(path, raw)
    assert not chunk.refusals, chunk.refusals
    return chunk.requests[1]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    return tmp_path / "prompts.jsonl"


def test_rows_that_may_take_longest_come_first_and_equals_in_their_order(path: Path) -> None:
    lengths = [5, 20, 5, 40, 20]
    lines = [completion(max_tokens=most).replace(b'"a"', b'"%d"' % at) for at, most in enumerate(lengths)]
    (chunk,) = read(path, *lines)
    assert list(chunk.requests) == [4, 2, 5, 1, 3]


def test_a_chat_line_becomes_a_request(path: Path) -> None:
    request = only(
        path,
        chat(max_tokens=5, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop=["x", "y"], logprobs=True, top_logprobs=2),
    )
    assert request.prompt == tuple(FakeTokenizer().encode("hello"))
    assert (request.max_tokens, request.stop) == (5, ("x", "y"))
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, sampling.logprobs) == (
        0.5,
        0.9,
        7,
        3,
        2,
    )


def test_a_completion_line_takes_a_text_or_token_ids(path: Path) -> None:
    assert only(path, completion()).prompt == tuple(FakeTokenizer().encode("hello"))
    assert only(path, completion(prompt=[5, 6, 7])).prompt == (5, 6, 7)


def test_the_short_form_is_a_completion(path: Path) -> None:
    request = only(path, line(custom_id="a", prompt="hello", max_tokens=3))
    assert (request.prompt, request.max_tokens) == (tuple(FakeTokenizer().encode("hello")), 3)


def test_a_line_without_settings_gets_the_defaults(path: Path) -> None:
    request = only(path, completion())
    assert request.sampling.temperature == 0
    assert request.sampling.logprobs == -1
    assert request.max_tokens == 40 - 5, "256 by default, but the context ends before"


def test_a_seed_is_made_of_the_custom_id_so_that_a_second_run_draws_the_same(path: Path) -> None:
    assert only(path, completion()).sampling.seed == only(path, chat()).sampling.seed
    assert only(path, completion()).sampling.seed != only(path, line(custom_id="b", prompt="hello")).sampling.seed


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (line(prompt="x"), "custom_id"),
        (line(custom_id=5, prompt="x"), "custom_id"),
        (line(custom_id="", prompt="x"), "custom_id"),
        (line(custom_id="a"), "prompt"),
        (line(custom_id="a", url="/v1/embeddings", body={}), "url"),
        (line(custom_id="a", url="/v1/completions", method="GET", body={"prompt": "x"}), "method"),
        (line(custom_id="a", url="/v1/completions", body=[1]), "body"),
        (line(custom_id="a", url="/v1/completions", body={"prompt": "x"}, extra=1), "extra"),
        (completion(n=2), "n"),
        (completion(temperature=3), "temperature"),
        (completion(temperature="hot"), "temperature"),
        (completion(top_p=0), "top_p"),
        (completion(max_tokens=0), "max_tokens"),
        (completion(max_tokens=True), "max_tokens"),
        (completion(stream=True), "stream"),
        (completion(presence_penalty=1), "presence_penalty"),
        (completion(model="gpt-9"), "model"),
        (completion(prompt=""), "no tokens"),
        (completion(prompt=["a", "b"]), "prompt"),
        (completion(prompt="x" * 40), "too long: 40 tokens"),
        (completion(stop=""), "stop"),
        (completion(prompt=[-1]), "vocabulary"),
        (completion(prompt=[2**70]), "vocabulary"),
        (completion(top_k=2**63), "top_k"),
        (completion(max_tokens=10_000, logprobs=20), "log-probabilities"),
        (line(custom_id="\ud800", prompt="x"), "custom_id"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {}, "\\ud800": 1}', "not supported"),
        (chat(messages=[]), "messages"),
        (chat(messages=[{"role": "robot", "content": "x"}]), "role"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "content"),
        (chat(prompt="x"), "prompt"),
        (chat(top_logprobs=50), "top_logprobs"),
    ],
)
def test_a_bad_line_costs_only_itself_and_says_what_is_wrong_and_where(path: Path, raw: bytes, words: str) -> None:
    chunks = read(path, line(custom_id="before", prompt="x"), raw, line(custom_id="after", prompt="x"))
    assert [request.tag for chunk in chunks for request in chunk.requests.values()] == [
        Tag(1, "before", "/v1/completions", "tiny").dump(),
        Tag(3, "after", "/v1/completions", "tiny").dump(),
    ]
    (bad,) = chunks[0].refusals
    assert bad.number == 2
    assert "line 2" in bad.why
    assert words in bad.why


def test_the_second_line_of_a_custom_id_is_refused(path: Path) -> None:
    (chunk,) = read(path, line(custom_id="a", prompt="x"), line(custom_id="a", prompt="y"))
    assert list(chunk.requests) == [1]
    assert "earlier line" in chunk.refusals[0].why
    assert chunk.refusals[0].custom_id is None, "the row of the custom_id is the first line's"


@given(st.binary(max_size=200))
def test_no_bytes_whatever_raise_anything_but_a_line_error(raw: bytes) -> None:
    with contextlib.suppress(LineError):
        parse_line(1, raw)


def test_blank_lines_are_passed_over_and_a_last_line_needs_no_newline(path: Path) -> None:
    path.write_bytes(b'{"a"}\n\n  \n{"b"}')
    assert [number for number, _ in read_lines(path)] == [1, 4]
    assert count_lines(path) == 4


def test_a_line_of_endless_length_is_cut_short_and_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqinfer.batch_files.MAX_LINE_BYTES", 100)
    chunks = read(path, b"x" * 1000, line(custom_id="after", prompt="x"))
    assert "longer" in chunks[0].refusals[0].why
    assert list(chunks[0].requests) == [2]


def result(number: int, **more: Any) -> Result:
    tag = Tag(number, f"id-{number}", "/v1/chat/completions", "tiny").dump()
    fields: dict[str, Any] = {
        "id": f"job.{number}",
        "job": "job",
        "tag": tag,
        "finish_reason": FinishReason.STOP,
        "prompt_tokens": 4,
        "output": (5, 6),
        "text": "hi",
    }
    return Result(**(fields | more))


def test_a_result_row_is_openais_batch_output() -> None:
    row = json.loads(result_row(result(1), str))
    assert row["custom_id"] == "id-1"
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    body = row["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hi"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}


def test_logprobs_are_given_in_the_shape_of_each_url() -> None:
    logprobs = (TokenLogprob(token=5, logprob=-0.5, top=((5, -0.5), (9, -1.5))),)
    row = json.loads(result_row(result(1, logprobs=logprobs), lambda token: f"<{token}>"))
    (entry,) = row["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], len(entry["top_logprobs"])) == ("<5>", -0.5, 2)
    tag = Tag(1, "a", "/v1/completions", "tiny").dump()
    row = json.loads(result_row(result(1, logprobs=logprobs, tag=tag), lambda token: f"<{token}>"))
    body = row["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "hi"
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"<5>": -0.5, "<9>": -1.5}]


def test_a_failure_row_says_why_and_on_which_line() -> None:
    failure = result(3, finish_reason=FinishReason.ERROR, error_code="compute", error="it broke")
    row = json.loads(result_row(failure, str))
    assert row["response"] is None
    assert row["error"] == {"code": "compute", "message": "it broke", "line": 3}


def test_an_output_file_knows_its_rows_and_repairs_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    rows = [result_row(result(1), str), error_row(2, None, "bad", code="x")]
    path.write_bytes(b"".join(rows) + result_row(result(3), str)[:-10])
    file = OutputFile(path)
    assert (file.answered, file.failed) == (1, 1)
    assert [number in file.lines for number in (1, 2, 3)] == [False, True, False]
    file.append([result_row(result(3), str)])
    file.close()
    assert [json.loads(raw)["custom_id"] for raw in path.read_bytes().splitlines()] == ["id-1", None, "id-3"]


def test_error_rows_go_when_they_are_to_be_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(error_row(1, "a", "bad", code="x") + result_row(result(2), str))
    file = OutputFile(path, retry_errors=True)
    assert (file.answered, file.failed) == (1, 0)
    file.close()
    assert len(path.read_bytes().splitlines()) == 1


@pytest.mark.parametrize("number", [-1, 10**12, "x"])
def test_a_row_of_a_line_that_no_file_has_is_not_ours(tmp_path: Path, number: object) -> None:
    path = tmp_path / "out.jsonl"
    row = json.loads(error_row(1, None, "bad", code="x"))
    row["error"]["line"] = number
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(SettingsError, match="not a batch result"):
        OutputFile(path)


@pytest.mark.parametrize("number", [0, 10**12, True, "1"])
def test_a_tag_of_a_line_that_no_file_has_is_not_ours(number: Any) -> None:
    with pytest.raises(ValueError, match="tag"):
        Tag.load(Tag(number, None, "/v1/completions", "tiny").dump())


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("my diary\n")
    with pytest.raises(SettingsError, match="not a batch result"):
        OutputFile(path)
    assert path.read_text() == "my diary\n"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_file_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="can't write"):
        OutputFile(tmp_path / "missing" / "out.jsonl")


def test_a_ticket_is_found_again_unless_the_plan_or_the_prompts_changed(tmp_path: Path) -> None:
    output, prompts = tmp_path / "out.jsonl", tmp_path / "prompts"
    prompts.write_text("one\ntwo\nthree\n")
    ticket, abandoned = Ticket.beside(output, prompts, job="one", plan="p")
    assert (ticket.enqueued, abandoned) == (0, "")
    ticket.enqueued, ticket.digest = 2, lines_digest(prompts, 2)
    ticket.save()
    prompts.write_text("one\ntwo\nanother\nand more\n")
    again, abandoned = Ticket.beside(output, prompts, job="two", plan="p")
    assert (again.job, again.enqueued, abandoned) == ("one", 2, "")
    assert Ticket.beside(output, prompts, job="two", plan="q")[1] == "one"
    prompts.write_text("zero\none\ntwo\n")
    fresh, abandoned = Ticket.beside(output, prompts, job="two", plan="p")
    assert (fresh.job, fresh.enqueued, abandoned) == ("two", 0, "one")
    again.remove()
    assert Ticket.beside(output, prompts, job="two", plan="p")[1] == ""


def test_the_digest_of_the_lines_read_is_that_of_the_file(path: Path) -> None:
    lines = [line(custom_id=f"c{i}", prompt="x") for i in range(150)]
    chunks = read(path, *lines)
    assert [chunk.digest for chunk in chunks] == [lines_digest(path, chunk.last) for chunk in chunks]


def test_a_line_of_just_the_longest_length_does_not_swallow_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqinfer.batch_files.MAX_LINE_BYTES", 100)
    for length in (99, 100, 101):
        path.write_bytes(b"x" * length + b"\n{}\n")
        assert [number for number, _ in read_lines(path)] == [1, 2], length
