"""Linear layers laid out once, by oneDNN and by FBGEMM."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mqinfer import packed_linear
from mqinfer.packed_linear import (
    HalfLinear,
    OneDnnLinear,
    can_halve,
    can_pack,
    half_bytes,
    half_scale,
    pack_linears,
    packed_bytes,
    room_bytes,
)

needs_onednn = pytest.mark.skipif(not can_pack(torch.float32), reason="oneDNN packs nothing on this processor")
#: Not only where it is used: with AVX-512 too.
needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is not for this processor"
)


class Tied(nn.Module):
    """An embedding whose weight the head shares, and a small layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.small = nn.Linear(32, 8)
        self.head = nn.Linear(32, 64, bias=True)
        self.head.weight = self.embedding.weight


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Tied:
    monkeypatch.setattr(packed_linear, "_least_elements", lambda dtype: 64 * 32)
    torch.manual_seed(1)
    return Tied().requires_grad_(False)


@needs_onednn
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 100])
def test_a_packed_layer_computes_what_the_layer_did(model: Tied, rows: int) -> None:
    hidden = torch.randn(1, rows, 32)
    expected = model.head(hidden)
    pack_linears(model)
    assert type(model.head) is OneDnnLinear
    torch.testing.assert_close(model.head(hidden), expected)


@needs_onednn
def test_only_large_layers_are_packed_and_what_shares_the_weight_keeps_it(model: Tied) -> None:
    before = model.embedding.weight.clone()
    pack_linears(model)
    assert type(model.small) is nn.Linear
    assert torch.equal(model.embedding.weight, before)
    assert packed_bytes(model) == 64 * 32 * 4


@needs_onednn
def test_hooks_of_a_packed_layer_work_as_those_of_any(model: Tied) -> None:
    pack_linears(model)
    model.head.register_forward_pre_hook(lambda _, args: (args[0][:, :1],))
    assert model.head(torch.randn(1, 5, 32)).shape == (1, 1, 64)


def test_where_nothing_can_be_laid_out_the_model_stays_as_it_is(model: Tied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "can_pack", lambda dtype: False)
    monkeypatch.setattr(packed_linear, "can_halve", lambda: False)
    pack_linears(model)
    assert type(model.head) is nn.Linear
    assert packed_bytes(model) == 0


@needs_onednn
@pytest.mark.parametrize(("processor", "smaller_too"), [("AVX2", False), ("AVX512", True)])
def test_which_layers_are_large_depends_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, processor: str, smaller_too: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    model = nn.Sequential(nn.Linear(576, 1536), nn.Linear(1536, 192), nn.Linear(192, 2**15)).requires_grad_(False)
    pack_linears(model)
    assert [isinstance(layer, OneDnnLinear) for layer in model] == [smaller_too, False, True]


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where FBGEMM's layout is used, for small layers too."""
    monkeypatch.setattr(packed_linear, "can_halve", lambda: True)
    monkeypatch.setattr(packed_linear, "LEAST_ELEMENTS_HALF", 0)


def bfloat16_layer(largest: float, *, bias: bool = True) -> nn.Linear:
    """Of float32, whose numbers are bfloat16's."""
    torch.manual_seed(2)
    layer = nn.Linear(96, 48, bias=bias).requires_grad_(False)
    layer.weight.copy_((torch.randn(48, 96) * largest / 4).bfloat16())
    return layer


@needs_fbgemm
@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 100])
@pytest.mark.parametrize("largest", [1e-5, 1.0, 1e6])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_bfloat16_numbers_is_kept_in_float16_and_computes_as_exactly(
    rows: int, largest: float, bias: bool
) -> None:
    model = nn.Sequential(bfloat16_layer(largest, bias=bias))
    hidden = torch.randn(1, rows, 96)
    exact = model.double()(hidden.double())
    expected = model.float()(hidden)
    pack_linears(model)
    assert type(model[0]) is HalfLinear
    assert packed_bytes(model) == 2 * 48 * 512
    out = model(hidden)
    assert out.dtype == torch.float32
    assert out.shape == expected.shape
    if rows:
        assert (out - exact).abs().max() <= 4 * (expected - exact).abs().max() + 1e-6 * exact.abs().max()


@needs_fbgemm
@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_two_bytes_answers_in_its_own_type(dtype: torch.dtype) -> None:
    layer = bfloat16_layer(1.0).to(dtype)
    hidden = torch.randn(5, 96).to(dtype)
    exact = hidden.double() @ layer.weight.double().T + layer.bias.double()
    model = nn.Sequential(layer)
    pack_linears(model)
    assert type(model[0]) is HalfLinear
    assert model[0].weight.dtype == dtype
    torch.testing.assert_close(model(hidden), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.usefixtures("halves")
def test_a_layer_that_float16_does_not_hold_is_not_kept_in_it() -> None:
    model = nn.Sequential(nn.Linear(96, 48)).requires_grad_(False)
    pack_linears(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.tensor([[1.0, 2.0**-17]]), 1.0),
        (torch.tensor([[1.0, 3 * 2.0**-25]]), 2.0**14),
        (torch.tensor([[2.0**100, 2.0**80]]), 2.0**-86),
        (torch.tensor([[1.0, 2.0**-33]]), 1.0),
        (torch.tensor([[1.0, 1.0 + 2.0**-12]]), None),
        (torch.tensor([[1.0, 2.0**-25 * (1 + 2.0**-6)]]), 2.0**14),
        (torch.tensor([[2.0**-140, 0.0]]), None),
        (torch.tensor([[1.0, float("inf")]]), None),
        (torch.tensor([[1.0, float("nan")]]), None),
        (torch.zeros(1, 2), 1.0),
    ],
)
def test_by_which_power_of_two_float16_holds_a_weight(weight: torch.Tensor, scale: float | None) -> None:
    assert half_scale(weight) == scale


@needs_fbgemm
@pytest.mark.parametrize(("capability", "used"), [("DEFAULT", False), ("AVX2", True), ("AVX512", False)])
def test_float16_is_only_used_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, capability: str, used: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert can_halve() is used


@pytest.mark.parametrize(
    ("halves", "itemsize", "head", "expected"),
    [
        (False, 4, 0, 1000),
        (False, 4, 100, 1400),
        (False, 2, 100, 1200),
        (True, 4, 0, 1000),
        (True, 4, 100, 1000 + 400 + 400),
        (True, 2, 100, 2000 + 400 + 400),
    ],
)
def test_what_a_stage_takes_while_its_head_is_laid_out(
    monkeypatch: pytest.MonkeyPatch, halves: bool, itemsize: int, head: int, expected: int
) -> None:
    monkeypatch.setattr(packed_linear, "can_halve", lambda: halves)
    assert room_bytes(1000, itemsize=itemsize, hidden_size=256, head=head) == expected


def test_a_weight_in_blocks_takes_whole_ones() -> None:
    assert half_bytes(512, 1024) == 2 * 512 * 1024
    assert half_bytes(49153, 576) == 2 * 49168 * 1024


@pytest.mark.usefixtures("halves")
def test_a_weight_that_is_too_large_for_32_bits_is_not_laid_out_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "MOST_ELEMENTS_HALF", 48 * 512)
    model = nn.Sequential(bfloat16_layer(1.0))
    pack_linears(model)
    assert type(model[0]) is nn.Linear


@needs_fbgemm
@pytest.mark.usefixtures("halves")
def test_a_head_kept_in_float16_leaves_its_embedding_as_it_was() -> None:
    model = Tied().requires_grad_(False)
    model.embedding.weight.copy_(model.embedding.weight.bfloat16())
    before = model.embedding.weight.clone()
    pack_linears(model)
    assert type(model.head) is HalfLinear
    assert torch.equal(model.embedding.weight, before)


PEAK = """
import sys, threading, torch
from torch import nn
from mqinfer.packed_linear import pack_linears, packed_bytes

def peak_mib():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

def load_and_pack():  # as a worker does: not in its main thread
    dtype = getattr(torch, sys.argv[1])
    model = nn.ModuleList()
    for _ in range(30):
        for out_features, in_features in ((1536, 512), (512, 512), (512, 1536), (1536, 1536)):
            layer = nn.Linear(in_features, out_features, bias=False).bfloat16().to(dtype)
            model.append(layer.requires_grad_(False))
    before = peak_mib()
    pack_linears(model)
    print(packed_bytes(model) >> 20, peak_mib() - before)

thread = threading.Thread(target=load_and_pack)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packing_takes_little_more_memory_than_the_weights(dtype: str) -> None:
    if not (can_halve() or packed_linear._least_elements(getattr(torch, dtype)) <= 1536 * 512):
        pytest.skip("nothing is packed here")
    # With a worker's allocator. With AVX2, for 240 MiB of weights, 27 MiB more, in bfloat16 46.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "MALLOC_ARENA_MAX": "2",
    }
    command = [sys.executable, "-c", PEAK, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    packed_mib, more_mib = map(int, done.stdout.split())
    assert packed_mib > 100
    assert more_mib <= 96
