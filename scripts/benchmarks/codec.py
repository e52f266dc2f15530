"""The codecs on a model's own hidden states: size, speed, and what they change in its answers, beside others'.

Speed is in MB/s of the tensor's bytes and of one thread's time on its processor. Answers are those of the model in
float32 whose hidden states travel in bfloat16 through the codec at three cuts, against those of the whole model: what
`raw` changes is bfloat16's rounding.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import zstandard
from torch import Tensor

from benchmarks.activations import CHUNK_TOKENS, CHUNKS, CUTS, HIDDEN_SIZE, answers, decode_rows, forget, hidden_states
from benchmarks.measure import SMALL, Case, Contender, Limit, Notes, Unavailable
from mqinfer.messages import Packed
from mqinfer.tensor_codec import CODECS, pack, unpack

#: How often a round packs and unpacks each tensor; the median counts.
REPEATS = 3 if SMALL else 30
DECODE_ROWS = (16, 32)


@dataclass(frozen=True, slots=True)
class Way:
    """A way to turn a tensor into bytes and back."""

    pack: Callable[[Tensor], Any]
    unpack: Callable[[Any, Tensor], Tensor]
    size_bytes: Callable[[Any], int]


@dataclass(frozen=True, slots=True)
class Speed:
    """On one tensor: medians, seconds of one thread's processor."""

    in_s: float
    out_s: float


def cases(name: str) -> list[Case]:  # noqa: ARG001
    """Speed, size, answers."""
    return [*_speeds(), _decode(), _sizes(), _answers()]


# -- the ways ----------------------------------------------------------------------------------------


def _ours(codec: str) -> Way:
    return Way(partial(pack, codec=codec), _unpack, _packed_bytes)


def _unpack(packed: Packed, like: Tensor) -> Tensor:
    return unpack(packed, dtype=like.dtype, hidden_size=like.shape[1], max_tokens=like.shape[0])


def _packed_bytes(packed: Packed) -> int:
    return sum(memoryview(blob).nbytes for blob in packed.blobs)


def _plain_zstd() -> Way:
    """The tensor's bytes through zstd's level 1, exponents and mantissas mixed as they are."""
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def restore(frame: bytes, like: Tensor) -> Tensor:
        data = bytearray(decompressor.decompress(frame))
        return torch.frombuffer(data, dtype=like.dtype).view(like.shape)

    return Way(lambda x: compressor.compress(x.contiguous().view(torch.uint8).numpy().data), restore, len)


def _blockwise() -> Way:
    """Raises: Unavailable."""
    try:
        functional = importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise Unavailable(f"bitsandbytes can't be imported here: {error}") from error
    quantize = partial(functional.quantize_blockwise, blocksize=256)
    return Way(
        lambda x: quantize(x.float()),
        lambda packed, like: functional.dequantize_blockwise(*packed).to(like.dtype),
        lambda packed: packed[0].numel() + packed[1].absmax.numel() * 4,
    )


WAYS: dict[str, Callable[[], Way]] = {
    **{codec: partial(_ours, codec) for codec in CODECS},
    "zstd, level 1": _plain_zstd,
    "bitsandbytes blockwise, 8 bits": _blockwise,
}


def _contenders(once: Callable[[Way], float]) -> list[Contender]:
    return [Contender(name, _ready(make, once)) for name, make in WAYS.items()]


def _ready(make: Callable[[], Way], once: Callable[[Way], float]) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def ready() -> Iterator[Callable[[], float]]:
        way = make()
        hidden_states()
        try:
            yield partial(once, way)
        finally:
            forget()

    return ready


# -- speed -------------------------------------------------------------------------------------------


def _speeds() -> list[Case]:
    work = (
        f"Hidden states of SmolLM2 before its layers {', '.join(map(str, CUTS))} [{CHUNK_TOKENS}, {HIDDEN_SIZE}], "
        "bfloat16, a prefill's chunk, "
    )
    return [
        Case(
            "codec in",
            f"{work}packed on one thread.",
            "MB/s",
            _contenders(lambda way: _megabytes_s([speed.in_s for speed in _chunk_speeds(way)])),
            goals=[Limit("int8", 700)],
        ),
        Case(
            "codec out",
            f"{work}unpacked on one thread.",
            "MB/s",
            _contenders(lambda way: _megabytes_s([speed.out_s for speed in _chunk_speeds(way)])),
            goals=[Limit("int8", 2000)],
        ),
    ]


def _chunk_speeds(way: Way) -> list[Speed]:
    return [_speed(way, hidden) for hidden in hidden_states()]


def _megabytes_s(seconds: Sequence[float]) -> float:
    return sum(hidden.nbytes for hidden in hidden_states()) / 1e6 / sum(seconds)


def _speed(way: Way, hidden: Tensor) -> Speed:
    torch.set_num_threads(1)
    turns = [_turn(way, hidden) for _ in range(REPEATS)]
    return Speed(statistics.median(turn.in_s for turn in turns), statistics.median(turn.out_s for turn in turns))


def _turn(way: Way, hidden: Tensor) -> Speed:
    began_s = time.thread_time()
    packed = way.pack(hidden)
    packed_s = time.thread_time()
    out = way.unpack(packed, hidden)
    ended_s = time.thread_time()
    if out.shape != hidden.shape or out.dtype is not hidden.dtype:
        raise RuntimeError("a codec gave back a tensor of another kind")
    return Speed(packed_s - began_s, ended_s - packed_s)


def _decode() -> Case:
    def once(way: Way, rows: int) -> float:
        speed = _speed(way, decode_rows(rows))
        return 1e6 * (speed.in_s + speed.out_s)

    return Case(
        "codec of a decode step",
        f"The same of {' and '.join(map(str, DECODE_ROWS))} rows before layer {CUTS[1]}, packed and unpacked.",
        "µs in and out",
        [
            Contender(f"{name}, {rows} rows", _ready(make, partial(once, rows=rows)))
            for rows in DECODE_ROWS
            for name, make in WAYS.items()
        ],
    )


# -- size --------------------------------------------------------------------------------------------


def _sizes() -> Case:
    notes = Notes()
    return Case(
        "codec size",
        "The bytes that the same tensors take, scales and kept channels included.",
        "of bfloat16's bytes",
        [Contender(name, _ready(make, partial(_size, name, notes))) for name, make in WAYS.items()],
        goals=[
            Limit("int8", 0.54, at_most=True),
            Limit("int8+zstd", 0.45, at_most=True),
            Limit("lossless", 0.71, at_most=True),
        ],
        rounds=1,
        warmups=0,
        notes=notes,
    )


def _size(name: str, notes: Notes, way: Way) -> float:
    tensors = hidden_states()
    raw_bytes = sum(hidden.nbytes for hidden in tensors)
    packed_bytes = sum(way.size_bytes(way.pack(hidden)) for hidden in tensors)
    spent_s = _total_s(way) - _total_s(_ours("raw"))
    if packed_bytes < raw_bytes and spent_s > 0:
        gigabits_s = 8 * (raw_bytes - packed_bytes) / spent_s / 1e9
        notes.put(name, f"on links below {gigabits_s:.1f} Gb/s it saves more time than it takes")
    return packed_bytes / raw_bytes


def _total_s(way: Way) -> float:
    return sum(speed.in_s + speed.out_s for speed in _chunk_speeds(way))


# -- answers -----------------------------------------------------------------------------------------


def _answers() -> Case:
    notes = Notes()
    bfloat16 = "the whole model in bfloat16"
    return Case(
        "codec answers",
        f"{CHUNKS} × {CHUNK_TOKENS} positions of this repository's documentation through SmolLM2 in float32, cut "
        f"before the layers {', '.join(map(str, CUTS))}; against the same model uncut.",
        "% of the likeliest tokens the same",
        [
            *(Contender(name, _ready(make, partial(_answer, name, notes))) for name, make in WAYS.items()),
            Contender(bfloat16, _ready(lambda: _ours("raw"), lambda _: _told(bfloat16, notes))),
        ],
        goals=[Limit("int8", 99.2)],
        rounds=1,
        warmups=0,
        notes=notes,
    )


def _answer(name: str, notes: Notes, way: Way) -> float:
    def through(hidden: Tensor) -> Tensor:
        sent = hidden.bfloat16()
        return way.unpack(way.pack(sent), sent).to(hidden.dtype)

    return _told(name, notes, through)


def _told(name: str, notes: Notes, change: Callable[[Tensor], Tensor] | None = None) -> float:
    found = answers(change, "float32" if change else "bfloat16")
    notes.put(name, f"mean KL divergence {found.divergence:.1e}")
    return 100 * found.agreement
