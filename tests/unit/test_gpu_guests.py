"""Who else is on a GPU: the driver is played, for there is none here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mqinfer.errors import SettingsError
from mqinfer.gpu_guests import guests_on

ME, STRANGER, PEER = os.getpid(), 4_000_001, 4_000_002


class NVMLError(Exception):
    """As pynvml's."""


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> dict[object, list[int]]:
    """Pids by GPU: a number, or a UUID."""
    pids: dict[object, list[int]] = {0: [], 1: [], "GPU-abc": []}

    def handle(name: object) -> object:
        if name not in pids:
            raise NVMLError("Not Found")
        return name

    driver = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [SimpleNamespace(pid=pid) for pid in pids[gpu]],
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return pids


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Our peer is another worker."""
    for pid, words in (
        (STRANGER, ["python", "train.py", "worker"]),
        (PEER, ["/opt/bin/python", "-m", "mqinfer", "worker"]),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    return tmp_path


def test_strangers_count_and_workers_do_not(computing: dict[object, list[int]], proc: Path) -> None:
    guests = guests_on("cuda:0", {}, proc)
    assert not guests()
    computing[0] = [ME, PEER]
    assert not guests()
    computing[0] = [ME, STRANGER]
    assert guests()
    computing[0] = [ME]
    assert not guests()


@pytest.mark.usefixtures("computing")
def test_in_another_order_than_the_bus_s_a_number_names_no_gpu() -> None:
    with pytest.raises(SettingsError, match="FASTEST_FIRST"):
        guests_on("cuda:1", {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    guests_on("cuda:0", {"CUDA_DEVICE_ORDER": "FASTEST_FIRST", "CUDA_VISIBLE_DEVICES": "GPU-abc"})


@pytest.mark.parametrize(
    ("device", "visible", "gpu"),
    [("cuda", "", 0), ("cuda:1", "", 1), ("cuda:0", "1,0", 1), ("cuda:1", "0,GPU-abc", "GPU-abc")],
)
def test_the_gpu_is_the_one_that_torch_means(
    computing: dict[object, list[int]], proc: Path, device: str, visible: str, gpu: object
) -> None:
    guests = guests_on(device, {"CUDA_VISIBLE_DEVICES": visible}, proc)
    computing[gpu] = [STRANGER]
    assert guests()


@pytest.mark.usefixtures("computing")
@pytest.mark.parametrize(
    ("device", "visible", "words"),
    [
        ("cpu", "", "for NVIDIA GPUs, and the device is cpu"),
        ("cuda:7", "", "does not tell who uses cuda:7: Not Found"),
        ("cuda:1", "0", "CUDA_VISIBLE_DEVICES has no GPU 1"),
    ],
)
def test_what_can_not_be_watched_is_said(device: str, visible: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        guests_on(device, {"CUDA_VISIBLE_DEVICES": visible})


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SettingsError, match="mqinfer\\[nvidia\\]"):
        guests_on("cuda:0", {})
