"""Hidden states <-> Packed: the codecs of the wire. docs/wire.md is the normative text of their bytes.

`raw` and `lossless` are exact to the bit in the model's own dtype, float16 included: it travels as its own 16 bits, and
nothing is ever converted to it. `int8` is not exact; `scripts/bench codec` measures what it changes. zstandard is at
home here and nowhere else. No message but Packed and no queue may be known here. All functions are thread-safe.

Numbers are little-endian, as on every machine that PyTorch is built for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from mqinfer.errors import ComputeError, WireError
from mqinfer.messages import Packed

CODECS = ("raw", "lossless", "int8", "int8+zstd")

#: Channels of a message that int8 keeps in bfloat16: the residual stream has a few massive ones, and a token's scale
#: taken over them leaves the others no bits (top-1 agreement 90% without, 99% with 16).
OUTLIERS = 16

#: `int8` takes a scale for each group of at least so many channels of a token: against one scale for all 576 of SmolLM2
#: that is 1.3% more bytes, a KL divergence of 2.2e-4 where it was 3.0e-4. `int8+zstd`, which is for the fewest bytes,
#: keeps one scale: finer codes compress less (0.47 of bfloat16's bytes instead of 0.44).
GROUP_LEAST = 192

#: Smaller planes stay as they are: setting zstd up costs more than it saves.
ZSTD_LEAST_BYTES = 4096

Array = NDArray[Any]
Buffer = bytes | memoryview
#: Of one blob: the type of its numbers and how many.
Plane = tuple[type[np.generic], int]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

#: No scale is zero or subnormal (it would have few bits), none makes infinity of 127.
_SCALE_LEAST = float(np.finfo(np.float32).tiny)
_SCALE_MOST = float(np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0)))

# Exponent planes want a fast matcher with tiny tables: 2-3 times the speed of level 1 at a better ratio.
_ZSTD = zstandard.ZstdCompressionParameters(
    strategy=1, window_log=18, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0, write_content_size=1
)


class _Zstd(threading.local):
    """zstd's contexts: each serves one thread at a time."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_ZSTD)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def pack(tensor: Tensor, codec: str) -> Packed:
    """The tensor ([tokens, hidden_size], any device and layout) as bytes, which may be views of its memory.

    Raises: ComputeError where it is not finite and the codec can't carry that.
    """
    values = tensor.detach().to("cpu")
    if codec == "raw":
        blobs: Sequence[Buffer] = [_view(_bits(values))]
    elif codec == "lossless":
        exponents, *mantissas = _split(_bits(values))
        blobs = [_squeezed(exponents), *map(_view, mantissas)]
    elif codec in ("int8", "int8+zstd"):
        *kept, codes = _quantized(values, _groups(values.shape[1]) if codec == "int8" else 1)
        blobs = [*map(_view, kept), _squeezed(codes) if codec == "int8+zstd" else _view(codes)]
    else:
        raise ValueError(f"no such codec: {codec!r}")
    return Packed(codec=codec, dtype=_NAMES[values.dtype], shape=tuple(values.shape), blobs=tuple(blobs))


def unpack(
    packed: Packed, *, dtype: torch.dtype, hidden_size: int, max_tokens: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The tensor, [tokens, hidden_size] of `dtype` on `device`, in memory of its own.

    Raises: WireError unless dtype, shape and all sizes are as expected; what no check has bounded takes no memory.
    """
    tokens = _checked_tokens(packed, dtype, hidden_size, max_tokens)
    count, bits = tokens * hidden_size, _BITS[dtype.itemsize]
    if packed.codec == "raw":
        (plane,) = _planes(packed, [(bits, count)])
        return _tensor(plane.copy(), dtype, tokens, hidden_size).to(device)
    if packed.codec == "lossless":
        planes = _planes(packed, [(kind, count) for kind in _SPLIT[bits]], squeezed=0)
        return _tensor(_joined(planes, bits), dtype, tokens, hidden_size).to(device)
    groups = _given_groups(packed, tokens, hidden_size)
    layout = _int8_planes(tokens, hidden_size, groups)
    planes = _planes(packed, layout, squeezed=3 if packed.codec == "int8+zstd" else None)
    return _dequantized(planes, dtype, (tokens, groups, hidden_size // groups)).to(device)


def _checked_tokens(packed: Packed, dtype: torch.dtype, hidden_size: int, max_tokens: int) -> int:
    if packed.codec not in CODECS:
        raise WireError("Packed.codec: unknown")
    if _DTYPES.get(packed.dtype) is not dtype:
        raise WireError(f"Packed.dtype: not {dtype}")
    if len(packed.shape) != 2 or packed.shape[1] != hidden_size:
        raise WireError(f"Packed.shape: not [tokens, {hidden_size}]")
    if not 0 <= packed.shape[0] <= max_tokens:
        raise WireError(f"Packed.shape: {packed.shape[0]} tokens where at most {max_tokens} are expected")
    return packed.shape[0]


# -- planes and blobs ----------------------------------------------------------------------------


def _view(plane: Array) -> memoryview:
    return plane.reshape(-1).view(np.uint8).data


def _squeezed(plane: Array) -> Buffer:
    """The plane compressed, or as it is where that is no longer: the length tells which."""
    if plane.nbytes >= ZSTD_LEAST_BYTES:
        frame = _zstd.compressor.compress(_view(plane))
        if len(frame) < plane.nbytes:
            return frame
    return _view(plane)


def _planes(packed: Packed, layout: Sequence[Plane], squeezed: int | None = None) -> list[Array]:
    """The blobs as arrays of one dimension, some of them views; `squeezed` is the place of the one in zstd."""
    if len(packed.blobs) != len(layout):
        raise WireError(f"Packed.blobs: {len(packed.blobs)} where {packed.codec} has {len(layout)}")
    planes = []
    for place, (blob, (kind, count)) in enumerate(zip(packed.blobs, layout, strict=True)):
        size, length = count * np.dtype(kind).itemsize, memoryview(blob).nbytes
        if length < size and place == squeezed:
            blob = _expanded(blob, size)
        elif length != size:
            raise WireError(f"Packed.blobs[{place}]: {length} bytes where {size} are expected")
        planes.append(np.frombuffer(blob, dtype=kind))
    return planes


def _expanded(frame: Buffer, size: int) -> bytes:
    """What the zstd frame holds, which is to declare that it is `size` bytes: only so many are set aside."""
    try:
        declared = zstandard.frame_content_size(frame)
        if declared != size:
            raise WireError(f"a zstd frame of {declared} bytes where {size} are expected")
        return _zstd.decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError("a broken zstd frame") from error


# -- raw and lossless ----------------------------------------------------------------------------

_BITS: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}

_INTS = {2: torch.int16, 4: torch.int32}

#: The number rotated left by one bit, so that the sign comes last: its highest byte, then the rest of it.
_SPLIT: dict[type[np.unsignedinteger[Any]], tuple[type[np.generic], ...]] = {
    np.uint16: (np.uint8, np.uint8),
    np.uint32: (np.uint8, np.uint8, np.uint16),
}


def _bits(values: Tensor) -> Array:
    """The numbers' own bits, in one dimension: a view where they are contiguous."""
    return _rows(values.reshape(-1))


def _rows(values: Tensor) -> Array:
    """The numbers' own bits, in the tensor's shape: a view."""
    return values.view(_INTS[values.element_size()]).numpy().view(_BITS[values.element_size()])


def _tensor(bits: Array, dtype: torch.dtype, tokens: int, hidden_size: int) -> Tensor:
    return torch.from_numpy(bits.view(np.uint8)).view(dtype).view(tokens, hidden_size)


def _split(bits: Array) -> list[Array]:
    """Planes as in _SPLIT. The first is the exponent (of float16 also the mantissa's top), the only one to compress."""
    if bits.itemsize == 2:
        return [(bits >> 7).astype(np.uint8), (bits << 1 | bits >> 15).astype(np.uint8)]
    return [
        (bits >> 23).astype(np.uint8),
        (bits >> 15).astype(np.uint8),
        (bits << 1 | bits >> 31).astype(np.uint16),
    ]


def _joined(planes: Sequence[Array], bits: type[np.unsignedinteger[Any]]) -> Array:
    """The reverse of _split."""
    high, *middle, low = planes
    size = np.dtype(bits).itemsize * 8
    joined = high.astype(bits) << (size - 9)
    for plane in middle:
        joined |= plane.astype(bits) << 15
    joined |= low.astype(bits) << (size - 1)
    joined |= low >> 1
    return joined


# -- int8 ----------------------------------------------------------------------------------------


#: By dtype, without its sign; what is not less is no number that int8 can carry.
_INFINITY = {dtype: _bits(torch.tensor([math.inf], dtype=dtype))[0] << 1 for dtype in _NAMES}


def _groups(hidden_size: int) -> int:
    """How many groups of equal size we make: the most of at least GROUP_LEAST channels."""
    most = max(1, hidden_size // GROUP_LEAST)
    return next(groups for groups in range(most, 0, -1) if hidden_size % groups == 0)


def _given_groups(packed: Packed, tokens: int, hidden_size: int) -> int:
    """How many there are, by how many scales came; _planes checks the exact length."""
    scales_bytes = memoryview(packed.blobs[2]).nbytes if len(packed.blobs) > 2 else 0
    groups = max(1, scales_bytes // max(1, 4 * tokens))
    if hidden_size % groups:
        raise WireError(f"Packed.blobs[2]: {hidden_size} channels are not {groups} groups")
    return groups


def _int8_planes(tokens: int, hidden_size: int, groups: int) -> list[Plane]:
    """Kept channels' numbers, their values in bfloat16 [tokens, kept], scales [tokens, groups], codes of all."""
    kept = min(OUTLIERS, hidden_size)
    return [
        (np.uint32, kept),
        (np.uint16, tokens * kept),
        (np.float32, tokens * groups),
        (np.int8, tokens * hidden_size),
    ]


def _quantized(values: Tensor, groups: int) -> list[Array]:
    """Planes as in _int8_planes. Raises: ComputeError."""
    tokens, hidden_size = values.shape
    # Without their signs the bits of numbers are in the order of their sizes. NumPy needs half of PyTorch's time here.
    sizes = _rows(values) << 1
    channels = _outliers(sizes, _INFINITY[values.dtype])
    sizes[:, channels] = 0
    # Raveled, for of a transposed tensor the peaks would lie in its order.
    peaks = sizes.reshape(tokens, groups, hidden_size // groups).max(2, initial=0).ravel() >> 1
    scales = _tensor(peaks, values.dtype, tokens, groups).float().div_(127).clamp_(_SCALE_LEAST, _SCALE_MOST)
    numbers = values.float().reshape(tokens, groups, hidden_size // groups)
    codes = numbers.div(scales.unsqueeze(2)).round_().to(torch.int8).view(tokens, hidden_size).numpy()
    codes[:, channels] = 0
    kept = values.index_select(1, torch.from_numpy(channels)).bfloat16()
    return [channels.astype(np.uint32), _bits(kept), scales.numpy(), codes]


def _outliers(sizes: Array, infinity: np.unsignedinteger[Any]) -> Array:
    """The channels with the largest numbers (of equal ones the first), in order. Raises: ComputeError if not finite."""
    peaks = sizes.max(0, initial=0)
    if peaks.max(initial=0) >= infinity:
        raise ComputeError("the hidden states are not finite, and int8 can't carry that")
    return np.sort(np.argsort(~peaks, kind="stable")[:OUTLIERS])


def _dequantized(planes: Sequence[Array], dtype: torch.dtype, grouped: tuple[int, int, int]) -> Tensor:
    """[tokens, hidden_size] of `dtype`; `grouped`: tokens, groups of each, channels of a group."""
    channels, kept, scales, codes = planes
    tokens, groups, group_size = grouped
    hidden_size = groups * group_size
    if channels.max(initial=0) >= max(hidden_size, 1):
        raise WireError("Packed.blobs[0]: a channel that does not exist")
    if not (scales.min(initial=_SCALE_LEAST) >= _SCALE_LEAST and scales.max(initial=_SCALE_LEAST) <= _SCALE_MOST):
        raise WireError("Packed.blobs[2]: a scale out of bounds")
    steps = torch.from_numpy(scales.copy()).view(tokens, groups, 1)
    numbers = torch.from_numpy(codes.astype(np.float32)).view(grouped).mul_(steps).view(tokens, hidden_size).to(dtype)
    most = torch.finfo(dtype).max  # rounding to bfloat16 may have gone beyond it
    outliers = _tensor(kept.copy(), torch.bfloat16, tokens, len(channels)).to(dtype).clamp_(-most, most)
    # 5 us for 256 x 576, where index_copy_ takes 24.
    _rows(numbers)[:, channels] = _rows(outliers)
    return numbers
