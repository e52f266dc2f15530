"""Known GPUs by name, and what a model takes on one by the roofline: an estimate where nothing was measured. Pure.

The numbers are the vendors' (datasheets and architecture whitepapers): peak dense FLOPs of matrix units with 16-bit
inputs accumulated in 32 bits, peak float32 FLOPs of the ordinary units (PyTorch's default for float32), bandwidth of
the memory. The shares that are reached are rules of thumb, not measured on any of them: a profile is always better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mqinfer.fleet_costs import Curve, Speed

#: What large matrix products and reading weights reach of the peaks.
FLOPS_SHARE, BANDWIDTH_SHARE = 0.5, 0.7
#: Of the memory that is to be used: the driver, the allocator's fragments and kernels take the rest.
MEMORY_SHARE = 0.9
#: What a layer's forward takes at least: its twenty kernels are started one by one from Python.
LAYER_S = 0.0004
#: Beside its layers, of any forward: bytes to tensors and back, some kernels.
FORWARD_S = 0.001
#: New positions of a step that prefills, as a rule.
PREFILL_TOKENS = 256
#: How PyTorch calls the first one of a machine; AMD's too.
DEVICE = "cuda"
#: Where the curves have points.
ROWS = (1, 8, 32, 128, 512)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What its vendor says of it."""

    #: Peak, of 16-bit numbers (bfloat16 where it has it) and of float32.
    flops_16: float
    flops_32: float
    bytes_per_s: float
    memory_bytes: int
    #: Whether it computes in bfloat16; where it is only emulated, the peaks say nothing.
    bfloat16: bool


def _gpu(tflops_16: float, tflops_32: float, gb_per_s: float, gib: int, *, bfloat16: bool = True) -> Gpu:
    return Gpu(tflops_16 * 1e12, tflops_32 * 1e12, gb_per_s * 1e9, gib * 2**30, bfloat16)


#: Names as `gpu` in a fleet's file.
GPUS: Mapping[str, Gpu] = {
    "H200": _gpu(989, 67, 4800, 141),
    "H100-SXM": _gpu(989, 67, 3350, 80),
    "H100-PCIe": _gpu(756, 51, 2000, 80),
    "A100-80GB": _gpu(312, 19.5, 2039, 80),  # SXM; the PCIe card has 1935 GB/s
    "A100-40GB": _gpu(312, 19.5, 1555, 40),
    "A40": _gpu(149.7, 37.4, 696, 48),
    "A30": _gpu(165, 10.3, 933, 24),
    "A10": _gpu(125, 31.2, 600, 24),
    "L40S": _gpu(362, 91.6, 864, 48),
    "L4": _gpu(121, 30.3, 300, 24),
    "V100-32GB": _gpu(125, 15.7, 900, 32, bfloat16=False),
    "V100-16GB": _gpu(125, 15.7, 900, 16, bfloat16=False),
    "T4": _gpu(65, 8.1, 320, 16, bfloat16=False),
    "P100": _gpu(18.7, 9.3, 732, 16, bfloat16=False),
    "RTX-6000-Ada": _gpu(364, 91.1, 960, 48),
    "RTX-A6000": _gpu(154.8, 38.7, 768, 48),
    "RTX-5090": _gpu(209.5, 104.8, 1792, 32),
    "RTX-4090": _gpu(165.2, 82.6, 1008, 24),
    "RTX-3090": _gpu(71, 35.6, 936, 24),
    "MI300X": _gpu(1307, 163.4, 5300, 192),
    "MI210": _gpu(181, 22.6, 1638, 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a model asks of a machine. Of a mean layer: all parameters, and those that a token is multiplied with."""

    layer_parameters: float
    layer_active: float
    head_parameters: int
    itemsize: int
    #: Keys and values that a row's new token looks at, in one layer.
    layer_kv_bytes: int


def speed(gpu: Gpu, work: Work) -> Speed:
    """By the roofline: the longer of reading from memory and multiplying."""
    flops = FLOPS_SHARE * (gpu.flops_32 if work.itemsize == 4 else gpu.flops_16)
    bytes_per_s = BANDWIDTH_SHARE * gpu.bytes_per_s

    def layer_s(tokens: int, rows: int) -> float:
        # of a mixture's experts those are read that some token visits
        read = min(work.layer_parameters, work.layer_active * tokens) * work.itemsize + work.layer_kv_bytes * rows
        return max(LAYER_S, read / bytes_per_s, 2 * work.layer_active * tokens / flops)

    def head_s(rows: int) -> float:
        return max(work.head_parameters * work.itemsize / bytes_per_s, 2 * work.head_parameters * rows / flops)

    return Speed(
        forward=Curve(((1, FORWARD_S),)),
        layer=Curve(tuple((rows, layer_s(rows, rows)) for rows in ROWS)),
        head=Curve(tuple((rows, head_s(rows)) for rows in ROWS)),
        embedding=Curve(((1, 0.0),)),
        layer_prefill_token_s=layer_s(PREFILL_TOKENS, 0) / PREFILL_TOKENS,
    )
