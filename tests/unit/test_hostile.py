"""Bodies made to do harm, with a right prefix and checksum: each ends in a message or WireError, in little memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mqinfer.errors import WireError
from mqinfer.messages import KINDS
from mqinfer.wire import MAX_BODY_BYTES, MAX_HEADER_BYTES, decode, encode

DATA = Path(__file__).parents[1] / "data"
GOLDEN = [path.read_bytes() for path in sorted(DATA.glob("*.bin"))]

#: What a header may become in memory: three bytes make a pair of small integers, of 72 bytes in Python.
GROWTH = 32
SLACK_BYTES = 2**17


def sealed(header: bytes, behind: bytes = b"", **prefix: Any) -> bytes:
    """A body with a prefix that fits, but for what is given of `prefix`, and the right checksum for it."""
    sizes = {"header_bytes": len(header), "behind_bytes": len(behind)}
    values = {"magic": b"\x93MQI", "version": 1, "flags": 0} | sizes | prefix
    start = struct.pack("<4sHHQQ", *values.values())
    return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start + header + behind)) + header + behind


def parts(body: bytes) -> tuple[bytes, bytes]:
    """Header, and what is behind it."""
    (header_bytes,) = struct.unpack_from("<Q", body, 8)
    return body[32 : 32 + header_bytes], body[32 + header_bytes :]


def survive(body: bytes) -> None:
    """Read it: what comes out is a message, that can be written again, or WireError."""
    try:
        message = decode(body)
    except WireError:
        return
    assert type(message) in KINDS.values()
    assert decode(encode(message)) == message


def refuse_in_little_memory(body: bytes) -> None:
    decode(GOLDEN[0])
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode(body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= GROWTH * len(body) + SLACK_BYTES


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one branch replaced, removed, doubled or added."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 3)) == 0:
        return draw(anything)
    if isinstance(tree, dict):
        key = draw(st.sampled_from(sorted(tree)))
        change = draw(st.sampled_from(("remove", "add", "inside")))
        rest = {name: value for name, value in tree.items() if name != key}
        if change == "inside":
            return {name: draw(mutated(value)) if name == key else value for name, value in tree.items()}
        return rest if change == "remove" else tree | {draw(st.text(max_size=8)): draw(anything)}
    place = draw(st.integers(0, len(tree) - 1))
    middle = draw(st.sampled_from(([], [tree[place], tree[place]], [draw(mutated(tree[place]))])))
    return [*tree[:place], *middle, *tree[place + 1 :]]


@given(st.binary(max_size=300))
def test_random_bytes_are_survived(body: bytes) -> None:
    survive(body)


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_random_headers_and_blobs_under_a_right_checksum_are_survived(header: bytes, behind: bytes) -> None:
    survive(sealed(header, behind))


@given(anything)
def test_any_msgpack_in_the_place_of_a_header_is_survived(tree: Any) -> None:
    survive(sealed(msgpack.packb(tree)))


@given(st.data())
def test_a_message_with_a_changed_branch_is_survived(data: st.DataObject) -> None:
    header, behind = parts(data.draw(st.sampled_from(GOLDEN)))
    tree = data.draw(mutated(msgpack.unpackb(header, strict_map_key=False)))
    survive(sealed(msgpack.packb(tree), behind))


@given(st.data())
def test_a_message_with_changed_bytes_is_survived(data: st.DataObject) -> None:
    header, behind = parts(data.draw(st.sampled_from(GOLDEN)))
    whole = bytearray(header + behind)
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)):
        whole[place] = byte
    survive(sealed(bytes(whole[: len(header)]), bytes(whole[len(header) :])))


@given(st.data())
def test_a_message_whose_header_ends_elsewhere_is_survived(data: st.DataObject) -> None:
    header, behind = parts(data.draw(st.sampled_from(GOLDEN)))
    whole = header + behind
    end = data.draw(st.integers(0, len(whole)))
    survive(sealed(whole[:end], whole[end:]))


lengths = st.integers(0, 2**64 - 1) | st.sampled_from((0, 2**31, 2**32, 2**63, 2**64 - 1, 2**64 - 32))


@given(lengths, lengths)
def test_declared_lengths_that_do_not_add_up_are_refused(header: int, behind: int) -> None:
    body = sealed(b"x", b"y", header_bytes=header, behind_bytes=behind)
    if (header, behind) not in ((0, 2), (1, 1), (2, 0)):
        with pytest.raises(WireError):
            decode(body)


@pytest.mark.parametrize("prefix", [{"magic": b"MQIN"}, {"version": 0}, {"version": 2}, {"flags": 1}, {"flags": 2**15}])
def test_a_prefix_of_another_kind_is_refused(prefix: dict[str, Any]) -> None:
    header, behind = parts(GOLDEN[0])
    with pytest.raises(WireError):
        decode(sealed(header, behind, **prefix))


def field(name: bytes, value: bytes) -> bytes:
    """A request's header with just this field."""
    return b"\x82\xa4kind\xa7request" + bytes([0xA0 + len(name)]) + name + value


HEADERS = {
    "an empty header": b"",
    "a list": b"\x90",
    "no pairs": b"\x80",
    "more pairs than bytes": b"\xdf\xff\xff\xff\xff",
    "a map without its kind": b"\x81\xa4plan\xa1x",
    "its kind last": b"\x82\xa4plan\xa1x\xa4kind\xa5probe",
    "its kind twice": b"\x83\xa4kind\xa5probe\xa4kind\xa5probe\xa4plan\xa1x",
    "an unknown kind": b"\x81\xa4kind\xa5bogus",
    "a kind that is no string": b"\x81\xa4kind\x05",
    "an unknown field": b"\x83\xa4kind\xa5probe\xa4plan\xa1x\xa4more\x05",
    "a field twice": b"\x83\xa4kind\xa5probe\xa4plan\xa1x\xa4plan\xa1x",
    "without a field": b"\x81\xa4kind\xa5probe",
    "a key that is a number": b"\x82\xa4kind\xa5probe\x05\xa1x",
    "a string that is bytes": b"\x82\xa4kind\xa5probe\xa4plan\xc4\x01x",
    "a string that is not UTF-8": b"\x82\xa4kind\xa5probe\xa4plan\xa1\xff",
    "a string longer than the header": b"\x82\xa4kind\xa5probe\xa4plan\xdb\xff\xff\xff\xff",
    "an extension": b"\x82\xa4kind\xa5probe\xa4plan\xc7\x00\x05",
    "a timestamp": b"\x82\xa4kind\xa5probe\xa4plan\xd6\xff\x00\x00\x00\x00",
    "a byte that msgpack never uses": b"\x82\xa4kind\xa5probe\xa4plan\xc1",
    "bytes after the map": b"\x82\xa4kind\xa5probe\xa4plan\xa1x\x00",
    "more tokens than bytes": field(b"prompt", b"\xdd\xff\xff\xff\xff"),
    "an integer over 64 bits": field(b"prompt", b"\x91\xcf" + b"\xff" * 8),
    "another first key": b"\x82\xa4what\xa5probe\xa4plan\xa1x",
    "a table with a key twice": b"\x87\xa4kind\xa6report\xa4role\xa0\xa2id\xa0\xa4host\xa0\xa5stage\x00\xa7clock_s\xcb"
    + bytes(8)
    + b"\xa5facts\x82\xa1x\xa0\xa1x\xa0",
    "nested arrays": field(b"prompt", b"\x91" * 100_000),
    "nested arrays that declare more than is there": field(b"prompt", b"\xdd\x00\x00\xff\xff" * 50_000),
    "arrays in the place of tokens": field(b"prompt", b"\xdc\xff\xff" + b"\xdd\x00\x00\xff\xff" * 65_535),
    "nested maps": field(b"prompt", b"\x81\xa0" * 100_000),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_not_as_it_should_be_is_refused_in_little_memory(header: bytes) -> None:
    refuse_in_little_memory(sealed(header))


def many(item: bytes) -> bytes:
    """An array of 256 KiB of these."""
    count = 2**18 // len(item)
    return b"\xdd" + struct.pack(">I", count) + item * count


LARGE = {
    "small tokens": field(b"prompt", many(b"\x07")),
    "large tokens": field(b"prompt", many(b"\xcd\xff\xff")),
    "nil for tokens": field(b"prompt", many(b"\xc0")),
    "short strings": field(b"stop", many(b"\xa2ab")),
    "log-probabilities": field(b"logprobs", many(b"\x92\x00\xcb" + bytes(8))),
    "pairs": b"\x82\xa4kind\xa7release\xa4rows" + many(b"\x92\x00\x00"),
    "rows": b"\x82\xa4kind\xa4step\xa4rows" + many(b"\x95\x00\x00\x00\x01\x00"),
}


@pytest.mark.parametrize("header", LARGE.values(), ids=LARGE)
def test_a_header_takes_memory_in_proportion_to_its_length(header: bytes) -> None:
    refuse_in_little_memory(sealed(header))


def test_a_header_over_its_limit_is_refused_unread() -> None:
    header = field(b"tag", b"\xdb" + struct.pack(">I", MAX_HEADER_BYTES) + bytes(MAX_HEADER_BYTES))
    with pytest.raises(WireError, match="a header of"):
        decode(sealed(header))


def test_a_body_over_its_limit_is_refused_unread() -> None:
    header, _ = parts(GOLDEN[0])
    with pytest.raises(WireError, match="the limit is"):
        decode(sealed(header, bytes(MAX_BODY_BYTES)))


def hidden(lengths: list[int], behind_end: int = 0) -> tuple[bytes, int]:
    """Header of a step with blobs of these lengths, and how many zeros go before the first."""
    tree = {
        "kind": "step",
        "plan": "p",
        "owner": "o",
        "microbatch": 0,
        "number": 0,
        "stage": 1,
        "route": ["w"],
        "rows": [[0, 0, 0, 1, 1]],
        "hidden": ["raw", "float32", [1, 2], lengths],
    }
    header = bytes(msgpack.packb(tree))
    return header, -(32 + len(header)) % 64


def test_a_step_with_its_blob_is_read() -> None:
    header, zeros = hidden([8])
    survive(sealed(header, bytes(zeros) + b"12345678"))
    decode(sealed(header, bytes(zeros) + b"12345678"))


@pytest.mark.parametrize(
    "lengths", [[7], [9], [], [8, 1], [2**63 - 1], [2**64 - 1], [-1], [8, 0], [8.0], [None], [[8]]]
)
def test_blobs_that_do_not_fill_the_body_just_so_are_refused(lengths: list[int]) -> None:
    header, zeros = hidden(lengths)
    refuse_in_little_memory(sealed(header, bytes(zeros) + b"12345678"))


def test_bytes_between_blobs_that_are_not_zero_are_refused() -> None:
    header, zeros = hidden([8])
    with pytest.raises(WireError, match="not zero"):
        decode(sealed(header, b"x" * zeros + b"12345678"))
