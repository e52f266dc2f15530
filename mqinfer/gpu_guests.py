"""Whether anybody else computes on an NVIDIA GPU, as its driver says (NVML). No torch; pynvml is at home here.

Of processes that draw, such as a desktop's, nothing is seen: they are always there. A process in another PID namespace
than ours can't be told from ourselves: in a container share the host's (`--pid=host`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mqinfer.errors import SettingsError


def guests_on(
    device: str, environment: Mapping[str, str] = os.environ, proc: Path = Path("/proc")
) -> Callable[[], bool]:
    """A question that can be asked again and again: does a process that is no worker of ours compute on `device`?

    `device` as torch names it, `CUDA_VISIBLE_DEVICES` taken into account. Raises: SettingsError.
    """
    try:
        import pynvml
    except ImportError as error:
        raise SettingsError("--yield-gpu needs mqinfer[nvidia] (nvidia-ml-py)") from error
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise SettingsError(f"--yield-gpu is for NVIDIA GPUs, and the device is {device}")
    try:
        pynvml.nvmlInit()
        gpu = _handle(pynvml, int(index or "0"), environment)
    except pynvml.NVMLError as error:
        raise SettingsError(f"--yield-gpu: NVIDIA's driver does not tell who uses {device}: {error}") from error

    def guests() -> bool:
        try:
            computing = [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)]
        except pynvml.NVMLError:  # a driver that is being reset says so in other places too
            return False
        return any(pid != os.getpid() and not _is_worker(proc / str(pid)) for pid in computing)

    return guests


def _handle(nvml: Any, index: int, environment: Mapping[str, str]) -> object:
    """NVML counts all GPUs in the order of the bus; torch those that it may see, in that order if it is told to."""
    name = str(index)
    if visible := environment.get("CUDA_VISIBLE_DEVICES", ""):
        names = [name.strip() for name in visible.split(",")]
        if index >= len(names):
            raise SettingsError(f"CUDA_VISIBLE_DEVICES has no GPU {index}")
        name = names[index]
    if not name.isdecimal():
        return nvml.nvmlDeviceGetHandleByUUID(name)
    order = environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if order != "PCI_BUS_ID" and nvml.nvmlDeviceGetCount() > 1:
        raise SettingsError(f"--yield-gpu can't tell which GPU is {name} where CUDA_DEVICE_ORDER is {order}")
    return nvml.nvmlDeviceGetHandleByIndex(int(name))


def _is_worker(process: Path) -> bool:
    """Workers share a GPU without sending each other away."""
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"worker" in words and any(word == b"mqinfer" or word.endswith(b"/mqinfer") for word in words)
