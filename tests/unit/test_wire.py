"""Bodies: what goes in comes out, the bytes are those of tests/data, and no damaged body is read."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqinfer.errors import WireError
from mqinfer.messages import (
    KINDS,
    Ask,
    FinishReason,
    JobTotal,
    Message,
    Miss,
    MissReason,
    Packed,
    Pause,
    Probe,
    Release,
    Report,
    Request,
    Result,
    Row,
    Sampled,
    Sampling,
    Step,
    StepDone,
    StepTaken,
    TokenLogprob,
)
from mqinfer.wire import MAX_BODY_BYTES, MAX_HEADER_BYTES, PREFIX_BYTES, decode, encode

DATA = Path(__file__).parents[1] / "data"
PLAN = "0123456789abcdef"

LOGPROB = TokenLogprob(token=300, logprob=-0.25, top=((300, -0.25), (7, -2.5)))
ROWS = (
    Row(row=7, epoch=1, start=40, count=1, reserve=90, sampling=Sampling(temperature=0.5, top_p=0.75, seed=2**62)),
    Row(row=8, epoch=0, start=0, count=3, reserve=20),
    Row(row=9, epoch=0, start=5, count=1, reserve=70_000, sampling=Sampling()),
)
MISS = Miss(row=10, epoch=2, stage=0, reason=MissReason.CACHE, detail="evicted")
STEP = Step(
    plan=PLAN,
    owner="mqinfer.demo.coordinator.c-1",
    microbatch=3,
    number=12,
    stage=0,
    route=("mqinfer.demo.worker.w-1", "mqinfer.demo.worker.w-2"),
    rows=ROWS,
    release=((4, 0), (5, 1)),
    alone=True,
    tokens=(1, 300, 70_000, 4, 5),
)
HIDDEN = Packed(codec="raw", dtype="bfloat16", shape=(5, 2), blobs=(bytes(range(20)),))

#: One of every kind, under its file's name in tests/data.
GOLDEN: dict[str, Message] = {
    "request": Request(
        id="r-1",
        job="job-1",
        plan=PLAN,
        tag="line 1",
        prompt=(1, 2, 70_000),
        output=(300,),
        logprobs=(LOGPROB,),
        max_tokens=16,
        stop=("\n\n", "Ende – 終"),
        ignore_eos=True,
        sampling=Sampling(temperature=0.7, top_k=40, top_p=0.9, seed=5, logprobs=2),
        failures=1,
    ),
    "request-plain": Request(id="r-2", job="job-1", plan=PLAN, prompt=(1,), max_tokens=1),
    "step-tokens": STEP,
    "step-hidden": replace(STEP, stage=1, tokens=(), hidden=HIDDEN, misses=(MISS,), alone=False, closing=True),
    "step-expiring": replace(STEP, ttl_s=90.0),
    "step-paced": replace(STEP, slowest_s=0.125, slowest_tokens=48),
    "step-position-paced": replace(STEP, slowest_s=0.125, slowest_tokens=48, slowest_token_s=0.0009765625),
    "step-traced": replace(STEP, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    "step-taken": StepTaken(plan=PLAN, microbatch=3, number=0, worker="mqinfer.demo.worker.w-1"),
    "step-passed": StepTaken(plan=PLAN, microbatch=3, number=4, worker="mqinfer.demo.worker.w-1", passed=True),
    "step-done": StepDone(
        plan=PLAN,
        microbatch=3,
        number=12,
        route=("mqinfer.demo.worker.w-1",),
        sampled=(Sampled(row=7, epoch=1, token=300, logprob=LOGPROB), Sampled(row=9, epoch=0, token=2)),
        misses=(MISS,),
        closing=True,
    ),
    "step-done-paced": StepDone(
        plan=PLAN, microbatch=3, number=12, route=("mqinfer.demo.worker.w-1",), slowest_s=0.125, slowest_tokens=48
    ),
    "step-done-position-paced": StepDone(
        plan=PLAN,
        microbatch=3,
        number=12,
        route=("mqinfer.demo.worker.w-1",),
        slowest_s=0.125,
        slowest_tokens=48,
        slowest_token_s=0.0009765625,
    ),
    "release": Release(plan=PLAN, owner="mqinfer.demo.coordinator.c-1", rows=((4, 0), (5, 1))),
    "probe": Probe(plan=PLAN),
    "result": Result(
        id="r-1",
        job="job-1",
        tag="line 1",
        finish_reason=FinishReason.STOP,
        prompt_tokens=3,
        output=(300, 2),
        text="Grüße",
        logprobs=(LOGPROB,),
    ),
    "result-error": Result(
        id="r-3",
        job="job-1",
        finish_reason=FinishReason.ERROR,
        prompt_tokens=0,
        error_code="too_long",
        error="the prompt is too long",
    ),
    "job-total": JobTotal(job="job-1", total=1_000_000),
    "pause": Pause(plan=PLAN, paused=True),
    "ask": Ask(plan=PLAN, reply_to="mqinfer.demo.reports.s-1"),
    "report": Report(
        role="coordinator",
        id="c-1",
        host="alpha",
        stage=-1,
        clock_s=12.5,
        values={"rows": 3.0, "steps_total": 1e6},
        facts={"version": "0.1.0"},
    ),
}

numbers = st.integers(0, 2**63 - 1)
texts = st.text(max_size=20)
any_float = st.floats(allow_nan=False)
pairs = st.tuples(numbers, numbers)


def many(item: st.SearchStrategy[Any], most: int = 4) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(item, max_size=most).map(tuple)


samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 1e9),
    top_k=numbers,
    top_p=st.floats(0, 1),
    seed=numbers,
    logprobs=st.integers(-1, 20),
)
logprobs = st.builds(TokenLogprob, token=numbers, logprob=any_float, top=many(st.tuples(numbers, any_float)))
misses = st.builds(Miss, row=numbers, epoch=numbers, stage=numbers, reason=st.sampled_from(MissReason), detail=texts)
sampled = st.builds(Sampled, row=numbers, epoch=numbers, token=numbers, logprob=st.none() | logprobs)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    names = draw(st.lists(numbers, max_size=5, unique=True))
    row = st.builds(
        Row, epoch=numbers, start=numbers, count=st.integers(1, 9), reserve=numbers, sampling=st.none() | samplings
    )
    rows = tuple(replace(draw(row), row=name) for name in names)
    positions, stage = sum(row.count for row in rows), draw(st.integers(0, 3))
    blobs = draw(many(st.binary(max_size=200)))
    return Step(
        plan=draw(texts),
        owner=draw(texts),
        microbatch=draw(numbers),
        number=draw(numbers),
        stage=stage,
        route=tuple(draw(st.lists(texts, min_size=stage, max_size=5))),
        rows=rows,
        misses=draw(many(misses)),
        release=draw(many(pairs)),
        ttl_s=draw(st.floats(0, 1e9)),
        slowest_s=draw(st.floats(0, 1e9)),
        slowest_tokens=draw(numbers),
        slowest_token_s=draw(st.floats(0, 1e9)),
        traceparent=draw(st.text(max_size=55)),
        alone=draw(st.booleans()),
        closing=draw(st.booleans()),
        tokens=() if stage else draw(st.tuples(*[numbers] * positions)),
        hidden=Packed(codec=draw(texts), dtype=draw(texts), shape=(positions, 8), blobs=blobs) if stage else None,
    )


messages = st.one_of(
    steps(),
    st.builds(
        Request,
        id=texts,
        job=texts,
        plan=texts,
        tag=texts,
        prompt=many(numbers),
        output=many(numbers),
        logprobs=many(logprobs),
        max_tokens=numbers,
        stop=many(texts),
        ignore_eos=st.booleans(),
        sampling=samplings,
        failures=numbers,
    ),
    st.builds(StepTaken, plan=texts, microbatch=numbers, number=numbers, worker=texts, passed=st.booleans()),
    st.builds(
        StepDone,
        plan=texts,
        microbatch=numbers,
        number=numbers,
        route=many(texts),
        sampled=many(sampled),
        misses=many(misses),
        closing=st.booleans(),
        slowest_s=st.floats(0, 1e9),
        slowest_tokens=numbers,
        slowest_token_s=st.floats(0, 1e9),
    ),
    st.builds(Release, plan=texts, owner=texts, rows=many(pairs)),
    st.builds(Probe, plan=texts),
    st.builds(
        Result,
        id=texts,
        job=texts,
        tag=texts,
        finish_reason=st.sampled_from(FinishReason),
        prompt_tokens=numbers,
        output=many(numbers),
        text=texts,
        logprobs=many(logprobs),
        error_code=texts,
        error=texts,
    ),
    st.builds(JobTotal, job=texts, total=numbers),
    st.builds(Ask, plan=texts, reply_to=texts),
    st.builds(
        Report,
        role=texts,
        id=texts,
        host=texts,
        stage=st.integers(-1, 9),
        clock_s=any_float,
        values=st.dictionaries(texts, any_float, max_size=4),
        facts=st.dictionaries(texts, texts, max_size=4),
    ),
)


@given(messages)
def test_what_is_encoded_is_decoded_again(message: Message) -> None:
    assert decode(encode(message)) == message


def test_the_golden_messages_are_of_every_kind() -> None:
    assert {type(message) for message in GOLDEN.values()} == set(KINDS.values())


def test_every_field_of_every_kind_is_somewhere_in_the_golden_messages() -> None:
    plain = {kind: [m for m in GOLDEN.values() if type(m) is kind] for kind in KINDS.values()}
    for kind, examples in plain.items():
        for field in fields(kind):
            assert any(getattr(example, field.name) != field.default for example in examples), (kind, field.name)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_bytes_are_written(name: str) -> None:
    assert encode(GOLDEN[name]) == (DATA / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_bytes_are_read(name: str) -> None:
    assert decode((DATA / f"{name}.bin").read_bytes()) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_body_cut_short_at_any_byte_is_refused(name: str) -> None:
    body = (DATA / f"{name}.bin").read_bytes()
    for length in range(len(body)):
        with pytest.raises(WireError):
            decode(body[:length])


@pytest.mark.parametrize("name", GOLDEN)
def test_a_body_with_any_byte_flipped_is_refused(name: str) -> None:
    body = bytearray((DATA / f"{name}.bin").read_bytes())
    for place in range(len(body)):
        for mask in (0x01, 0x80, 0xFF):
            body[place] ^= mask
            with pytest.raises(WireError):
                decode(bytes(body))
            body[place] ^= mask


def test_a_body_with_one_byte_more_is_refused() -> None:
    with pytest.raises(WireError, match="lengths"):
        decode(encode(STEP) + b"\0")


def test_another_version_is_refused_by_its_number() -> None:
    body = bytearray(encode(STEP))
    body[4] = 2
    with pytest.raises(WireError, match="version 2"):
        decode(body)


def test_blobs_are_aligned_views_of_the_body() -> None:
    body = encode(replace(STEP, stage=1, tokens=(), hidden=replace(HIDDEN, blobs=(b"<first>", b"", b"<third>"))))
    message = decode(body)
    assert isinstance(message, Step)
    assert message.hidden is not None
    assert [bytes(blob) for blob in message.hidden.blobs] == [b"<first>", b"", b"<third>"]
    assert all(isinstance(blob, memoryview) and blob.obj is body for blob in message.hidden.blobs)
    assert body.index(b"<first>") % 64 == body.index(b"<third>") % 64 == 0


def test_a_body_can_be_read_from_a_memoryview() -> None:
    assert decode(memoryview(encode(STEP))) == STEP


def test_a_decode_row_costs_few_bytes() -> None:
    def step(rows: int) -> bytes:
        parts = tuple(Row(row=i, epoch=0, start=40, count=1, reserve=90, sampling=Sampling()) for i in range(rows))
        return encode(replace(STEP, rows=parts, tokens=(5,) * rows))

    assert (len(step(100)) - len(step(50))) / 50 <= 9


def test_a_body_over_the_readers_limit_is_refused() -> None:
    body = encode(STEP)
    with pytest.raises(WireError, match="the limit is"):
        decode(body, limit_bytes=len(body) - 1)
    assert decode(body, limit_bytes=len(body)) == STEP


def test_a_body_over_the_limit_is_not_written() -> None:
    hidden = replace(HIDDEN, blobs=(bytes(MAX_BODY_BYTES - 100),))
    with pytest.raises(WireError, match="a body of"):
        encode(replace(STEP, stage=1, tokens=(), hidden=hidden))


def test_a_header_over_the_limit_is_not_written() -> None:
    result = GOLDEN["result"]
    assert isinstance(result, Result)
    with pytest.raises(WireError, match="a header of"):
        encode(replace(result, text="x" * MAX_HEADER_BYTES))


def test_an_integer_where_a_float_is_meant_is_written_as_the_float() -> None:
    request = GOLDEN["request"]
    assert isinstance(request, Request)
    decoded = decode(encode(replace(request, sampling=Sampling(temperature=1))))
    assert isinstance(decoded, Request)
    assert type(decoded.sampling.temperature) is float


BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("request", {"max_tokens": -1}),
    ("request", {"max_tokens": 2**63}),
    ("request", {"max_tokens": True}),
    ("request", {"max_tokens": "7"}),
    ("request", {"prompt": [1, 2]}),
    ("request", {"prompt": (1, -2)}),
    ("request", {"prompt": (1, 2.0)}),
    ("request", {"prompt": (1, True)}),
    ("request", {"prompt": (2**63,)}),
    ("request", {"tag": "x" * (2**16 + 1)}),
    ("request", {"tag": "\ud800"}),
    ("request", {"tag": b"x"}),
    ("request", {"ignore_eos": 1}),
    ("request", {"stop": ("a", None)}),
    ("request", {"sampling": None}),
    ("request", {"sampling": Sampling(temperature=math.nan)}),
    ("request", {"sampling": Sampling(temperature=math.inf)}),
    ("request", {"sampling": Sampling(temperature=-0.5)}),
    ("request", {"sampling": Sampling(temperature=10**400)}),
    ("request", {"sampling": Sampling(top_p=1.5)}),
    ("request", {"sampling": Sampling(logprobs=-2)}),
    ("request", {"sampling": Sampling(seed=2**63)}),
    ("request", {"logprobs": (replace(LOGPROB, logprob=math.nan),)}),
    ("request", {"logprobs": (replace(LOGPROB, top=((1,),)),)}),
    ("result", {"finish_reason": "done"}),
    ("result", {"finish_reason": []}),
    ("report", {"values": {"x": math.nan}}),
    ("report", {"values": {1: 1.0}}),
    ("report", {"values": ()}),
    ("step-tokens", {"tokens": (1, 2, 3, 4)}),
    ("step-tokens", {"tokens": (1, 2, 3, 4, 5, 6)}),
    ("step-tokens", {"hidden": HIDDEN}),
    ("step-tokens", {"slowest_s": math.inf}),
    ("step-done", {"slowest_s": -1.0}),
    ("step-tokens", {"slowest_token_s": -1.0}),
    ("step-done", {"slowest_token_s": math.inf}),
    ("step-tokens", {"ttl_s": -1.0}),
    ("step-tokens", {"ttl_s": math.inf}),
    ("step-tokens", {"traceparent": "0" * 56}),
    ("step-tokens", {"traceparent": None}),
    ("step-tokens", {"rows": (replace(ROWS[0], count=0), *ROWS[1:])}),
    ("step-tokens", {"rows": (replace(ROWS[0], start=-1), *ROWS[1:])}),
    ("step-tokens", {"rows": (replace(ROWS[0], row=9), *ROWS[1:])}),
    ("step-tokens", {"rows": tuple(replace(ROWS[0], row=n) for n in range(4097)), "tokens": (1,) * 4097}),
    ("step-hidden", {"hidden": None}),
    ("step-hidden", {"tokens": (1, 2, 3, 4, 5)}),
    ("step-hidden", {"hidden": replace(HIDDEN, shape=(4, 2))}),
    ("step-hidden", {"hidden": replace(HIDDEN, shape=(5, 2, 1))}),
    ("step-hidden", {"hidden": replace(HIDDEN, shape=(5, 2, 1, 1, 1))}),
    ("step-hidden", {"hidden": replace(HIDDEN, blobs=(b"",) * 9)}),
    ("step-hidden", {"hidden": replace(HIDDEN, blobs=("text",))}),
    ("step-hidden", {"hidden": replace(HIDDEN, blobs=(memoryview(b"abcdef")[::2],))}),
    ("step-hidden", {"route": ()}),
]


@pytest.mark.parametrize(("name", "changes"), BAD_FIELDS)
def test_a_field_of_the_wrong_type_or_out_of_bounds_is_not_written(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        encode(replace(GOLDEN[name], **changes))


def test_what_is_no_message_is_not_written() -> None:
    with pytest.raises(WireError):
        encode(Sampling())  # type: ignore[arg-type]


def test_errors_name_the_field_and_not_its_content() -> None:
    request = GOLDEN["request"]
    with pytest.raises(WireError) as caught:
        encode(replace(request, tag="secret" * 2**16))
    assert "Request.tag" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_prefix_has_32_bytes_and_nothing_else_before_the_header() -> None:
    assert encode(GOLDEN["probe"])[PREFIX_BYTES:] == b"\x82\xa4kind\xa5probe\xa4plan\xb0" + PLAN.encode()
