"""Linear layers with their weights laid out once: the fast path of x86 processors.

For a few rows of input the library behind `nn.Linear` lays the whole weight out anew in every call, which costs as much
as the product itself: SmolLM2's head, [49152, 576] in float32, takes 41 ms for 16 rows on one thread, laid out once 25.

Two libraries of torch do it. oneDNN keeps the weight in its type. FBGEMM keeps it in float16 and computes in float32,
which takes three quarters of oneDNN's time for that head. It is for weights that, as loaded, float16 holds exactly:
those of a bfloat16 or float16 checkpoint whatever they are computed in, others where they are computed in two bytes.
Only for inference: there is no backward. Which layers a stage has is not known here.
"""

from __future__ import annotations

import ctypes
import math
import platform
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

#: Smaller weights gain nothing from oneDNN where there is no AVX-512, and lose a third at a single row.
LEAST_ELEMENTS = 2**22
#: With AVX-512, on one thread: [1536, 576] in float32 takes 0.54 ms for 8 rows, packed 0.37 (and 0.25 for one, packed
#: 0.27); [576, 576] in bfloat16 0.11 for 8 and packed 0.08; what is smaller gains nothing.
LEAST_ELEMENTS_AVX512 = {torch.float32: 2**19, torch.bfloat16: 2**18}
#: A call of FBGEMM's costs 17 us more. [192, 576] is the smallest that was measured: with it a step of SmolLM2 in
#: float32 takes 0.88 of the time for 16 rows, 0.94 for 8.
LEAST_ELEMENTS_HALF = 2**16
#: What it computes for; all others stay.
HALVED = (torch.float32, torch.bfloat16, torch.float16)

#: Float16 holds a weight where no element changes by more than this share of the largest: a sum in float32 loses more.
HALF_TOLERANCE = 2.0**-32
#: So many elements of a weight are looked at at once.
PART_ELEMENTS = 2**20
#: FBGEMM lays weights out in blocks of so many inputs and outputs (FbgemmPackMatrixB.h, with AVX2), counted in 32 bits.
BLOCK_IN, BLOCK_OUT, MOST_ELEMENTS_HALF = 512, 16, 2**31

#: glibc keeps what was freed, in pieces that a weight laid out anew rarely fits into: so often it must give them back.
TRIM_BYTES = 64 * 2**20


class PackedLinear(nn.Module):
    """In place of an `nn.Linear`; `weight_bytes` is what its weight takes, which no state dict shows."""

    def __init__(self, linear: nn.Linear, weight_bytes: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_bytes, self._dtype = weight_bytes, linear.weight.dtype
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features] without numbers: some families ask for its dtype."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")


class OneDnnLinear(PackedLinear):
    """Laid out by oneDNN, in the weight's own type."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, linear.weight.nbytes)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear names it
        """[..., in_features] -> [..., out_features]."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], ""))


class HalfLinear(PackedLinear):
    """Laid out by FBGEMM: a weight in float16, times `scale`, a power of two; activations and sums in float32."""

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__(linear, half_bytes(*linear.weight.shape))
        self._unscale = 1 / scale
        weight = linear.weight.detach().to(torch.float32, copy=scale != 1)
        if scale != 1:
            weight.mul_(scale)
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear names it
        """[..., in_features] -> [..., out_features] in the layer's type."""
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(input.float(), self._packed)
        if self._unscale != 1:
            out.mul_(self._unscale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(self._dtype)


def pack_linears(model: nn.Module) -> None:
    """Replace linear layers that gain by it, in place; one by one, so that little more than one weight is here again.

    A weight that other modules share stays for them. Does nothing for other processors.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]  # subclasses do other things
    freed_bytes = 0
    for name in names:
        linear = cast(nn.Linear, model.get_submodule(name))
        if packed := _packed(linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, packed)
            freed_bytes += linear.weight.nbytes + 4 * linear.weight.numel()  # and a copy in float32, mostly
        del linear
        if freed_bytes >= TRIM_BYTES or (freed_bytes and name == names[-1]):
            freed_bytes = 0
            _trim()


def room_bytes(weight_bytes: int, *, itemsize: int, hidden_size: int, head: int) -> int:
    """What a stage's weights, of so many bytes as they are read, take here at most while its head is laid out.

    `head`: its elements; 0 where the stage has none.
    """
    if not can_halve():
        return weight_bytes + head * itemsize
    padding = half_bytes(BLOCK_OUT, hidden_size) / (2 * BLOCK_OUT * hidden_size)
    resident = weight_bytes * padding if itemsize == 2 else weight_bytes
    return round(resident + head * (4 + 2 * padding))  # a copy in float32, and what is made of it


def packed_bytes(model: nn.Module) -> int:
    """What the packed weights take."""
    return sum(module.weight_bytes for module in model.modules() if isinstance(module, PackedLinear))


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays out weights of that type on this processor."""
    if not _is_x86() or not torch._C._has_mkldnn:
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), None)
    except (RuntimeError, AttributeError):  # not for this type; not in this build
        return False
    return True


def can_halve() -> bool:
    """Whether FBGEMM lays out weights on this processor. With AVX-512 it was never measured against oneDNN."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and _has_fbgemm()


def half_bytes(out_features: int, in_features: int) -> int:
    """What a weight takes in FBGEMM's blocks."""
    return 2 * (-(-in_features // BLOCK_IN) * BLOCK_IN) * (-(-out_features // BLOCK_OUT) * BLOCK_OUT)


def half_scale(weight: Tensor) -> float | None:
    """The power of two by which float16 holds the weight, [out_features, in_features]; None where it does not.

    Where 1 is enough it is 1: multiplying the output by another takes time.
    """
    largest = max(abs(float(end)) for end in torch.aminmax(weight)) if weight.numel() else 0.0
    if not math.isfinite(largest):
        return None
    for scale in (1.0, 2.0 ** (15 - math.frexp(largest)[1])):
        if _fits(weight, scale, largest * HALF_TOLERANCE):
            return scale
    return None


def _fits(weight: Tensor, scale: float, tolerance: float) -> bool:
    """Whether no element changes by more than that, times `scale` in float16."""
    step = max(1, PART_ELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        exact = weight[first : first + step].float()
        if not bool((((exact * scale).half().float() / scale - exact).abs() <= tolerance).all()):
            return False
    return True


def _packed(linear: nn.Linear) -> PackedLinear | None:
    """What takes its place; None where nothing would be gained."""
    dtype, elements = linear.weight.dtype, linear.weight.numel()
    is_in_reach = elements >= LEAST_ELEMENTS_HALF and half_bytes(*linear.weight.shape) < 2 * MOST_ELEMENTS_HALF
    if is_in_reach and dtype in HALVED and can_halve():
        scale = half_scale(linear.weight.detach())
        if scale is not None:
            return HalfLinear(linear, scale)
    if elements >= _least_elements(dtype) and can_pack(dtype):
        return OneDnnLinear(linear)
    return None


@lru_cache
def _has_fbgemm() -> bool:
    if not _is_x86():
        return False
    try:
        torch.ops.quantized.linear_prepack_fp16(torch.zeros(16, 16), None)
    except (RuntimeError, AttributeError):  # not by this engine; not in this build
        return False
    return True


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _trim() -> None:
    """Give back to the system what was freed, where the C library is one that keeps it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _least_elements(dtype: torch.dtype) -> int:
    """From how many on oneDNN's layout is faster, on this processor."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return LEAST_ELEMENTS_AVX512.get(dtype, LEAST_ELEMENTS)
    return LEAST_ELEMENTS
