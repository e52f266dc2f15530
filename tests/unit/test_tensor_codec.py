"""Codecs: exact ones to the bit, int8 within its step; golden bytes; and no Packed that could do harm is unpacked."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mqinfer.errors import ComputeError, WireError
from mqinfer.messages import Packed, Row, Step
from mqinfer.tensor_codec import CODECS, OUTLIERS, ZSTD_LEAST_BYTES, pack, unpack
from mqinfer.wire import decode

DATA = Path(__file__).parents[1] / "data"

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {2: torch.int16, 4: torch.int32}
#: Of float16: NaN with payloads, infinities, -0.0, subnormals, the largest and smallest numbers. Others: see `special`.
SPECIAL_HALVES = (0x7E01, 0xFE55, 0x7C01, 0x7C00, 0xFC00, 0x8000, 0x0000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x0400)


def activations(tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Like a residual stream: channels of unlike width, three of them massive, one massive at token 0 only."""
    random = torch.Generator().manual_seed(1)
    widths = torch.exp(0.7 * torch.randn(hidden_size, generator=random))
    numbers = torch.randn(tokens, hidden_size, generator=random) * widths
    numbers[:, torch.arange(1, 4) * hidden_size // 4] *= 100
    numbers[0, hidden_size // 3] = 25_000
    return numbers.to(dtype)


def special(dtype: torch.dtype) -> Tensor:
    """[3, 4]: what floating point has besides numbers."""
    halves = torch.tensor(SPECIAL_HALVES, dtype=torch.int32)
    if dtype is torch.float32:
        # The float16 patterns widened by hand: exponent all ones or zeros, payloads kept, both halves of the word used.
        exponents = {0x1F: 0xFF, 0: 0}
        words = [
            (h >> 15) << 31 | exponents.get(h >> 10 & 0x1F, h >> 10 & 0x1F) << 23 | (h & 0x3FF) * 0x2001
            for h in SPECIAL_HALVES
        ]
        return torch.tensor(words, dtype=torch.int64).to(torch.int32).view(dtype).view(3, 4)
    if dtype is torch.bfloat16:
        halves = (halves & 0x8000) | torch.where((halves >> 10 & 0x1F) == 0x1F, 0x7F80, 0) | (halves & 0x7F)
    return halves.to(torch.int16).view(dtype).view(3, 4)


def unpack_as(packed: Packed, tensor: Tensor) -> Tensor:
    return unpack(packed, dtype=tensor.dtype, hidden_size=tensor.shape[1], max_tokens=tensor.shape[0])


def sent(tensor: Tensor, codec: str) -> Tensor:
    """As the other side gets it."""
    return unpack_as(pack(tensor, codec), tensor)


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = BITS[one.element_size()]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))


def size_bytes(packed: Packed) -> int:
    return sum(memoryview(blob).nbytes for blob in packed.blobs)


# -- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("tokens", [1, 16, 256])
def test_exact_codecs_keep_every_bit_of_activations(codec: str, dtype: torch.dtype, tokens: int) -> None:
    tensor = activations(tokens, 576, dtype)
    assert same_bits(sent(tensor, codec), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_exact_codecs_keep_nan_payloads_infinities_signed_zeros_and_subnormals(codec: str, dtype: torch.dtype) -> None:
    tensor = special(dtype)
    assert bool(tensor.isnan().any())
    assert bool(tensor.isinf().any())
    assert same_bits(sent(tensor, codec), tensor)
    assert same_bits(sent(tensor.repeat(2000, 1), codec), tensor.repeat(2000, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lossless_keeps_each_of_the_65536_numbers_of_16_bits(dtype: torch.dtype) -> None:
    tensor = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    assert same_bits(sent(tensor, "lossless"), tensor)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40), st.sampled_from(DTYPES))
def test_lossless_keeps_any_bits(words: list[int], dtype: torch.dtype) -> None:
    tensor = torch.tensor(words, dtype=torch.int32).view(dtype).view(len(words), -1)
    assert same_bits(sent(tensor, "lossless"), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(0, 576), (0, 0), (5, 0), (1, 1)])
def test_empty_and_tiny_tensors_travel(codec: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    assert torch.equal(sent(tensor, codec), tensor)


@pytest.mark.parametrize("codec", CODECS)
def test_a_tensor_that_is_not_contiguous_travels_like_its_copy(codec: str) -> None:
    tensor = activations(579, 64, torch.bfloat16).t()[:, 3:]
    assert not tensor.is_contiguous()
    assert same_bits(sent(tensor, codec), sent(tensor.clone(memory_format=torch.contiguous_format), codec))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_leaves_the_tensor_as_it_was(codec: str, dtype: torch.dtype) -> None:
    tensor = activations(64, 96, dtype)
    before = tensor.clone()
    pack(tensor, codec)
    assert same_bits(tensor, before)


@pytest.mark.parametrize("codec", CODECS)
def test_a_tensor_that_wants_a_gradient_travels(codec: str) -> None:
    tensor = activations(4, 32, torch.float32)
    assert torch.equal(sent(tensor.clone().requires_grad_(), codec), sent(tensor, codec))


@pytest.mark.parametrize("codec", CODECS)
def test_the_unpacked_tensor_has_memory_of_its_own(codec: str) -> None:
    tensor = activations(4, 32, torch.float32)
    packed = pack(tensor, codec)
    first = unpack_as(packed, tensor)
    first.zero_()
    assert bool(unpack_as(packed, tensor).any())


def test_raw_blobs_are_views_of_the_tensor() -> None:
    tensor = torch.zeros(2, 8)
    (blob,) = pack(tensor, "raw").blobs
    tensor.fill_(1.0)
    assert struct.unpack_from("<f", blob) == (1.0,)


def test_blobs_at_odd_addresses_are_read() -> None:
    tensor = activations(64, 384, torch.float32)
    for codec in CODECS:
        packed = pack(tensor, codec)
        blobs = tuple(memoryview(b"x" + bytes(blob))[1:] for blob in packed.blobs)
        assert same_bits(unpack_as(replace(packed, blobs=blobs), tensor), unpack_as(packed, tensor))


# -- size ----------------------------------------------------------------------------------------


def test_lossless_takes_at_most_71_percent_of_bfloat16() -> None:
    tensor = activations(256, 576, torch.bfloat16)
    assert size_bytes(pack(tensor, "lossless")) <= 0.71 * tensor.nbytes


def test_lossless_takes_at_most_86_percent_of_float32() -> None:
    tensor = activations(256, 576, torch.float32)
    assert size_bytes(pack(tensor, "lossless")) <= 0.86 * tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lossless_is_never_larger_than_raw(dtype: torch.dtype) -> None:
    noise = torch.randint(-(2**31), 2**31, (64, 256), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    tensor = noise.view(dtype).view(64, -1)
    assert size_bytes(pack(tensor, "lossless")) == tensor.nbytes
    assert same_bits(sent(tensor, "lossless"), tensor)


def test_small_planes_are_left_alone_by_zstd() -> None:
    count = ZSTD_LEAST_BYTES
    sizes = [size_bytes(pack(torch.zeros(1, n, dtype=torch.bfloat16), "lossless")) for n in (count - 1, count)]
    assert sizes[0] == 2 * (count - 1)
    assert sizes[1] < 1.1 * count


def test_int8_takes_a_byte_a_number_and_little_more() -> None:
    tensor = activations(256, 576, torch.bfloat16)
    assert size_bytes(pack(tensor, "int8")) == 256 * 576 + OUTLIERS * 4 + 256 * (2 * OUTLIERS + 3 * 4)
    assert size_bytes(pack(tensor, "int8+zstd")) < 0.9 * 256 * 576


# -- int8 ----------------------------------------------------------------------------------------


def outliers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().amax(0).sort(descending=True, stable=True).indices[:OUTLIERS]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ["int8", "int8+zstd"])
def test_int8_is_off_by_half_a_step_at_most(codec: str, dtype: torch.dtype) -> None:
    tensor = activations(64, 576, dtype).float()
    kept = outliers(tensor)
    group = 192 if codec == "int8" else 576
    peaks = tensor.index_fill(1, kept, 0).abs().view(64, -1, group).amax(2)
    steps = peaks.repeat_interleave(group, 1) / 127
    error = (sent(tensor.to(dtype), codec).float() - tensor).abs()
    rounding = tensor.abs() * torch.finfo(dtype).eps
    assert bool((error.index_fill(1, kept, 0) <= 0.501 * steps + rounding).all())
    assert bool((error[:, kept] <= tensor[:, kept].abs() * 2**-8).all())


def test_int8_keeps_the_massive_channels_of_bfloat16_to_the_bit() -> None:
    tensor = activations(64, 576, torch.bfloat16)
    kept = outliers(tensor)
    assert same_bits(sent(tensor, "int8")[:, kept], tensor[:, kept])


def test_int8_with_and_without_zstd_give_the_same_numbers() -> None:
    tensor = activations(64, 576, torch.bfloat16)
    squeezed = pack(tensor, "int8+zstd")
    codes = zstandard.ZstdDecompressor().decompress(squeezed.blobs[3])
    plain = replace(squeezed, codec="int8", blobs=(*squeezed.blobs[:3], codes))
    assert same_bits(unpack_as(plain, tensor), sent(tensor, "int8+zstd"))


def test_int8_groups_are_of_one_size_and_of_192_channels_at_least() -> None:
    widths = {191: 1, 383: 1, 384: 2, 576: 3, 960: 5, 1009: 1, 4096: 16, 5120: 20}
    scales = {width: memoryview(pack(torch.ones(1, width), "int8").blobs[2]).nbytes // 4 for width in widths}
    assert scales == widths


@pytest.mark.parametrize("groups", [1, 2, 3, 32, 96])
@pytest.mark.parametrize("codec", ["int8", "int8+zstd"])
def test_int8_of_any_groups_is_read(codec: str, groups: int) -> None:
    """One for each token is what older writers have."""
    codes = (torch.arange(5 * 96).view(5, 96) * 37 % 255 - 127).to(torch.int8)
    scales = (torch.arange(5 * groups).view(5, groups) + 1) / 64
    packed = pack(torch.zeros(5, 96), "int8")
    blobs = (*packed.blobs[:2], scales.numpy().tobytes(), codes.numpy().tobytes())
    expected = codes * scales.repeat_interleave(96 // groups, 1)
    expected[:, :OUTLIERS] = 0  # of equal channels the first are kept
    assert torch.equal(unpack_as(replace(packed, codec=codec, blobs=blobs), expected), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [OUTLIERS // 2, OUTLIERS * 2])
@pytest.mark.parametrize("size", [0.0, 1.0, 2.0])
def test_int8_of_zeros_of_the_smallest_and_of_the_largest_numbers_is_finite(
    dtype: torch.dtype, hidden_size: int, size: float
) -> None:
    limits = {0.0: 0.0, 1.0: torch.finfo(dtype).smallest_normal / 2, 2.0: torch.finfo(dtype).max}
    tensor = torch.full((3, hidden_size), limits[size], dtype=dtype)
    tensor[1] *= -1
    got = sent(tensor, "int8")
    assert bool(got.isfinite().all())
    assert torch.allclose(got.double(), tensor.double(), rtol=2**-7, atol=torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("codec", ["int8", "int8+zstd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_int8_refuses_what_is_not_finite(codec: str, dtype: torch.dtype, bad: float) -> None:
    tensor = activations(16, 64, dtype)
    tensor[3, 5] = bad
    with pytest.raises(ComputeError):
        pack(tensor, codec)


def test_a_codec_that_does_not_exist_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="no such codec"):
        pack(torch.zeros(1, 1), "gzip")


# -- golden bytes --------------------------------------------------------------------------------


def golden_tensor(dtype: torch.dtype, hidden_size: int = 64) -> Tensor:
    """[64, .] of numbers that every dtype has: eighths from -15.625 to 15.625, and 1000 times as much in channel 9."""
    places = torch.arange(64 * hidden_size).view(64, hidden_size)
    numbers = (places * 7919 % 251 - 125) / 8
    numbers[:, 9] = (places[:, 9] % 31 - 15) * 1024.0
    return numbers.to(dtype)


def golden_step(codec: str, dtype: torch.dtype, hidden_size: int = 64) -> Step:
    return Step(
        plan="0123456789abcdef",
        owner="mqinfer.demo.coordinator.c-1",
        microbatch=3,
        number=0,
        stage=1,
        route=("mqinfer.demo.worker.w-1",),
        rows=(Row(row=7, epoch=0, start=0, count=64, reserve=80),),
        hidden=pack(golden_tensor(dtype, hidden_size), codec),
    )


#: Steps under their files' names in tests/data.
GOLDEN_PARAMETERS: dict[str, tuple[str, torch.dtype, int]] = {
    "hidden-raw-bfloat16": ("raw", torch.bfloat16, 64),
    "hidden-lossless-bfloat16": ("lossless", torch.bfloat16, 64),
    "hidden-lossless-float16": ("lossless", torch.float16, 64),
    "hidden-lossless-float32": ("lossless", torch.float32, 64),
    # Of channels whose largest numbers are equal it keeps others than today's writer, which keeps the first.
    "hidden-int8-bfloat16": ("int8", torch.bfloat16, 64),
    "hidden-int8-ties-bfloat16": ("int8", torch.bfloat16, 64),
    "hidden-int8-groups-bfloat16": ("int8", torch.bfloat16, 384),
    "hidden-int8+zstd-float32": ("int8+zstd", torch.float32, 64),
}
GOLDEN = {name: golden_step(*parameters) for name, parameters in GOLDEN_PARAMETERS.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_tensors_are_read(name: str) -> None:
    codec, dtype, hidden_size = GOLDEN_PARAMETERS[name]
    step = decode((DATA / f"{name}.bin").read_bytes())
    assert isinstance(step, Step)
    assert step.hidden is not None
    assert (step.hidden.codec, getattr(torch, step.hidden.dtype)) == (codec, dtype)
    tensor = golden_tensor(dtype, hidden_size)
    got = unpack_as(step.hidden, tensor)
    if codec.startswith("int8"):
        assert float((got.float() - tensor.float()).abs().max()) <= 0.5 * 15.625 / 127 + 15.625 * 2**-9
    else:
        assert same_bits(got, tensor)


@pytest.mark.parametrize("name", ["hidden-raw-bfloat16", "hidden-int8-ties-bfloat16", "hidden-int8-groups-bfloat16"])
def test_the_golden_tensors_without_zstd_are_written(name: str) -> None:
    step = decode((DATA / f"{name}.bin").read_bytes())
    assert step == GOLDEN[name]


# -- hostile Packed ------------------------------------------------------------------------------

TENSOR = activations(64, 96, torch.bfloat16)
#: With more than one scale a token.
GROUPED = activations(16, 384, torch.bfloat16)


def frame(content: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


def with_blob(place: int, change: Callable[[bytes], bytes]) -> Callable[[Packed], Packed]:
    def changed(packed: Packed) -> Packed:
        blobs = [bytes(blob) for blob in packed.blobs]
        blobs[place] = change(blobs[place])
        return replace(packed, blobs=tuple(blobs))

    return changed


COUNT = TENSOR.numel()
HOSTILE: dict[str, tuple[str, Callable[[Packed], Packed]]] = {
    "an unknown codec": ("raw", lambda p: replace(p, codec="pickle")),
    "another codec's blobs": ("raw", lambda p: replace(p, codec="lossless")),
    "another dtype": ("raw", lambda p: replace(p, dtype="float16")),
    "an unknown dtype": ("raw", lambda p: replace(p, dtype="int4")),
    "no shape": ("raw", lambda p: replace(p, shape=())),
    "three dimensions": ("raw", lambda p: replace(p, shape=(64, 96, 1))),
    "another hidden size": ("raw", lambda p: replace(p, shape=(96, 64))),
    "a hidden size that the blobs do not have": ("raw", lambda p: replace(p, shape=(64, 97))),
    "too many tokens": ("raw", lambda p: replace(p, shape=(65, 96))),
    "fewer tokens than bytes": ("raw", lambda p: replace(p, shape=(63, 96))),
    "a negative number of tokens": ("raw", lambda p: replace(p, shape=(-1, 96))),
    "no blobs": ("raw", lambda p: replace(p, blobs=())),
    "a blob too many": ("raw", lambda p: replace(p, blobs=(*p.blobs, b""))),
    "a byte missing": ("raw", with_blob(0, lambda b: b[:-1])),
    "a byte too many": ("raw", with_blob(0, lambda b: b + b"\0")),
    "zstd where none is allowed": ("raw", with_blob(0, frame)),
    "mantissas too short": ("lossless", with_blob(1, lambda b: b[:-1])),
    "compressed mantissas": ("lossless", with_blob(1, frame)),
    "exponents too long": ("lossless", with_blob(0, lambda b: bytes(COUNT + 1))),
    "an empty frame": ("lossless", with_blob(0, lambda b: b"")),
    "a frame cut short": ("lossless", with_blob(0, lambda b: b[:-1])),
    "a frame's magic alone": ("lossless", with_blob(0, lambda b: b[:4])),
    "something behind the frame": ("lossless", with_blob(0, lambda b: b + b"\0")),
    "two frames": ("lossless", with_blob(0, lambda b: frame(bytes(COUNT - 9)) + frame(bytes(9)))),
    "a frame of fewer bytes": ("lossless", with_blob(0, lambda b: frame(bytes(COUNT - 1)))),
    "a frame of more bytes": ("lossless", with_blob(0, lambda b: frame(bytes(COUNT + 1)))),
    "a bomb": ("lossless", with_blob(0, lambda b: frame(bytes(2**25))[: COUNT - 1])),
    "a frame that does not say its size": (
        "lossless",
        with_blob(0, lambda b: frame(bytes(COUNT), write_content_size=False)),
    ),
    "a skippable frame": ("lossless", with_blob(0, lambda b: b"\x50\x2a\x4d\x18" + struct.pack("<I", 8) + bytes(8))),
    "a channel that does not exist": ("int8", with_blob(0, lambda b: struct.pack("<I", 96) + b[4:])),
    "a huge channel": ("int8", with_blob(0, lambda b: b"\xff" * len(b))),
    "too few channels": ("int8", with_blob(0, lambda b: b[:-4])),
    "scales too short": ("int8", with_blob(2, lambda b: b[:-4])),
    "no scales": ("int8", with_blob(2, lambda b: b"")),
    "scales of five groups of 96 channels": ("int8", with_blob(2, lambda b: 5 * b)),
    "more scales than channels": ("int8", with_blob(2, lambda b: 192 * b)),
    "scales of two groups, one missing": ("int8", with_blob(2, lambda b: (2 * b)[:-4])),
    "a scale for no token": ("int8", lambda p: replace(p, shape=(0, 96), blobs=(p.blobs[0], b"", bytes(4), b""))),
    "a bad scale in the last group": ("int8", with_blob(2, lambda b: b + b[:-4] + bytes(4))),
    "a scale of zero": ("int8", with_blob(2, lambda b: bytes(4) + b[4:])),
    "a scale that is no number": ("int8", with_blob(2, lambda b: struct.pack("<f", float("nan")) + b[4:])),
    "a scale that makes infinity": ("int8", with_blob(2, lambda b: struct.pack("<f", 3e38) + b[4:])),
    "codes in zstd where none is allowed": ("int8", with_blob(3, frame)),
    "a bomb of codes": ("int8+zstd", with_blob(3, lambda b: frame(bytes(2**25))[: COUNT - 1])),
}


@pytest.mark.parametrize(("codec", "change"), HOSTILE.values(), ids=HOSTILE)
def test_a_packed_that_could_do_harm_is_refused_in_little_memory(
    codec: str, change: Callable[[Packed], Packed]
) -> None:
    hostile = change(pack(TENSOR, codec))
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            unpack_as(hostile, TENSOR)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= 8 * TENSOR.nbytes


def test_a_frame_that_says_less_than_it_holds_is_refused() -> None:
    honest = bytearray(frame(bytes(COUNT + 4096)))
    assert (
        struct.unpack_from("<H", honest, 5)[0] + 256 == COUNT + 4096
    )  # two bytes of content size after the descriptor
    struct.pack_into("<H", honest, 5, COUNT - 256)
    assert zstandard.frame_content_size(bytes(honest)) == COUNT
    packed = pack(TENSOR, "lossless")
    with pytest.raises(WireError, match="zstd"):
        unpack_as(replace(packed, blobs=(bytes(honest), *packed.blobs[1:])), TENSOR)


@given(st.data())
def test_any_blobs_end_in_a_tensor_or_in_a_wire_error(data: st.DataObject) -> None:
    tensor = data.draw(st.sampled_from([TENSOR, GROUPED]))
    packed = pack(tensor, data.draw(st.sampled_from(CODECS)))
    blobs = [bytearray(blob) for blob in packed.blobs]
    blob = data.draw(st.sampled_from(blobs))
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(blob) - 1), st.integers(0, 255)), max_size=6)):
        blob[place] = byte
    try:
        got = unpack_as(replace(packed, blobs=tuple(map(bytes, blobs))), tensor)
    except WireError:
        return
    assert (got.shape, got.dtype) == (tensor.shape, tensor.dtype)


# -- threads -------------------------------------------------------------------------------------


def test_several_threads_may_pack_and_unpack_at_once() -> None:
    tensors = [activations(512, 512 + 64 * n, torch.bfloat16) for n in range(4)] * 8
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda tensor: sent(tensor, "lossless"), tensors))
    assert all(map(same_bits, got, tensors))
