"""Linear layers laid out once for oneDNN."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mqinfer import packed_linear
from mqinfer.packed_linear import PackedLinear, can_pack, pack_linears, packed_bytes

needs_onednn = pytest.mark.skipif(not can_pack(torch.float32), reason="oneDNN packs nothing on this processor")


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
    assert isinstance(model.head, PackedLinear)
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


def test_where_onednn_can_not_the_model_stays_as_it_is(model: Tied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "can_pack", lambda dtype: False)
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
    assert [type(layer) is PackedLinear for layer in model] == [smaller_too, False, True]


PEAK = """
import ctypes, threading, torch
from torch import nn
from mqinfer.packed_linear import pack_linears

def peak_mib():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

def load_and_pack():  # as a worker does: not in its main thread
    model = nn.ModuleList()
    for _ in range(60):
        model += [nn.Linear(576, 1536, bias=False), nn.Linear(576, 192, bias=False), nn.Linear(1536, 576, bias=False)]
    before = peak_mib()
    pack_linears(model)
    print(peak_mib() - before)

thread = threading.Thread(target=load_and_pack)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not (can_pack(torch.float32) and sys.platform == "linux"), reason="nothing is packed here")
def test_packing_takes_little_more_memory_than_the_weights() -> None:
    # With a worker's allocator. 405 MiB of weights took 44 MiB more, and 151 where nothing was given back.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 96
