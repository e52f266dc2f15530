"""The device before it is used: whether it is there, and what is free on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mqinfer import device
from mqinfer.errors import SettingsError

MEMINFO = "MemTotal:       32000 kB\nMemFree:          100 kB\nMemAvailable:    20000 kB\n"


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_processor_is_always_there() -> None:
    device.check("cpu")
    assert (device.free_bytes("cpu") or 1) > 0


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu cuda"])
def test_what_is_no_device_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(SettingsError, match=f"'{name}' is no device: write cpu, cuda or"):
        device.check(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
def test_a_gpu_that_is_not_there_is_refused_in_one_line() -> None:
    with pytest.raises(SettingsError, match=r"^the device 'cuda' can't be used here: .+$"):
        device.check("cuda")


def test_a_device_without_data_is_refused() -> None:
    with pytest.raises(SettingsError, match="'meta' can't be used here"):
        device.check("meta")


def test_more_than_is_free_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda name: 5 * 2**30)
    device.check_room("cpu", 4 * 2**30, 2**30)
    with pytest.raises(SettingsError) as caught:
        device.check_room("cpu", 4 * 2**30, 2**30 + 1)
    assert str(caught.value) == (
        "not enough memory on cpu: 4.0 GiB of weights and 1.0 GiB for keys and values (--kv-bytes) "
        "are more than the 5.0 GiB that are free"
    )


def test_where_nobody_says_what_is_free_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.host_free_bytes(tmp_path) is None
    monkeypatch.setattr(device, "free_bytes", lambda name: None)
    device.check_room("cpu", 2**60, 2**60)


def test_of_the_machine_what_is_available_counts(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", MEMINFO)
    assert device.host_free_bytes(tmp_path) == 20000 * 1024


def test_the_tightest_control_group_above_the_process_counts(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", MEMINFO)
    put(tmp_path, "proc/self/cgroup", "0::/system.slice/worker.service\n")
    put(tmp_path, "sys/fs/cgroup/system.slice/worker.service/memory.max", "max\n")
    put(tmp_path, "sys/fs/cgroup/system.slice/worker.service/memory.current", "5\n")
    put(tmp_path, "sys/fs/cgroup/system.slice/memory.max", "9000\n")
    put(tmp_path, "sys/fs/cgroup/system.slice/memory.current", "5000\n")
    put(tmp_path, "sys/fs/cgroup/system.slice/memory.stat", "anon 4000\ninactive_file 700\n")
    assert device.host_free_bytes(tmp_path) == 9000 - 5000 + 700


def test_in_a_container_of_version_1_the_mount_itself_counts(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", MEMINFO)
    put(tmp_path, "proc/self/cgroup", "5:devices:/docker/1f\n4:memory:/docker/1f\n0::/\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9000\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "5000\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.stat", "total_inactive_file 100\n")
    assert device.host_free_bytes(tmp_path) == 4100


def test_a_group_over_its_limit_has_nothing_free(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/\n")
    put(tmp_path, "sys/fs/cgroup/memory.max", "10\n")
    put(tmp_path, "sys/fs/cgroup/memory.current", "11\n")
    assert device.host_free_bytes(tmp_path) == 0


def test_a_cpu_is_called_by_its_model_and_an_unknown_one_by_nothing(tmp_path: Path) -> None:
    assert device.device_name(torch.device("cpu"), tmp_path) == ""
    put(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC 9R14\nprocessor\t: 1\nmodel name\t: other\n")
    assert device.device_name(torch.device("cpu"), tmp_path) == "AMD EPYC 9R14"
    assert device.device_name(torch.device("meta"), tmp_path) == ""
