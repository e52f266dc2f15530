"""Large linear layers with their weights laid out once for oneDNN: the fast path of x86 processors.

For a few rows of input the library behind `nn.Linear` lays the whole weight out anew in every call, which costs as much
as the product itself: SmolLM2's head, [49152, 576] in float32, takes 41 ms for 16 rows on one thread, laid out once 25.
Only for inference: there is no backward. Which layers a stage has is not known here.
"""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

#: Smaller weights gain nothing where there is no AVX-512, and lose a third at a single row.
LEAST_ELEMENTS = 2**22
#: With AVX-512, on one thread: [1536, 576] in float32 takes 0.54 ms for 8 rows, packed 0.37 (and 0.25 for one, packed
#: 0.27); [576, 576] in bfloat16 0.11 for 8 and packed 0.08; what is smaller gains nothing.
LEAST_ELEMENTS_AVX512 = {torch.float32: 2**19, torch.bfloat16: 2**18}


#: glibc keeps what was freed, in pieces that a weight laid out anew rarely fits into: so often it must give them back.
TRIM_BYTES = 64 * 2**20


class PackedLinear(nn.Module):
    """In place of an `nn.Linear`; `weight_bytes` is what its weight takes, which no state dict shows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_bytes, self._dtype = weight.nbytes, weight.dtype
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features] without numbers: some families ask for its dtype."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear names it
        """[..., in_features] -> [..., out_features]."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], ""))


def pack_linears(model: nn.Module) -> None:
    """Replace the large linear layers one by one, so that little more than one weight is here twice; in place.

    A weight that other modules share stays for them. Does nothing where oneDNN can't do it: for other processors, or in
    bfloat16 without AVX-512.
    """
    names = [name for name, module in model.named_modules() if _is_large(module)]
    freed_bytes = 0
    for name in names:
        linear = cast(nn.Linear, model.get_submodule(name))
        if can_pack(linear.weight.dtype):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, PackedLinear(linear))
            freed_bytes += linear.weight.nbytes
        del linear
        if freed_bytes >= TRIM_BYTES or (freed_bytes and name == names[-1]):
            freed_bytes = 0
            _trim()


def packed_bytes(model: nn.Module) -> int:
    """What the packed weights take."""
    return sum(module.weight_bytes for module in model.modules() if isinstance(module, PackedLinear))


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays out weights of that type on this processor."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch._C._has_mkldnn:
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), None)
    except (RuntimeError, AttributeError):  # not for this type; not in this build
        return False
    return True


def _trim() -> None:
    """Give back to the system what was freed, where the C library is one that keeps it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _is_large(module: nn.Module) -> bool:
    """Exactly `nn.Linear`: subclasses do something else."""
    return type(module) is nn.Linear and module.weight.numel() >= _least_elements(module.weight.dtype)


def _least_elements(dtype: torch.dtype) -> int:
    """From how many on it is faster, on this processor."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return LEAST_ELEMENTS_AVX512.get(dtype, LEAST_ELEMENTS)
    return LEAST_ELEMENTS
