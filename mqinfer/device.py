"""The device that a stage is to be computed on: whether it is there, and how much memory is free on it.

Asked before anything is loaded, because a clear refusal is better than the kernel's OOM killer. What is
loaded is not known here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from mqinfer.errors import SettingsError
from mqinfer.observe import size

#: Controllers as /proc/self/cgroup names them (version 2 names none) -> where they are mounted, and the names of the
#: limit, of what is used, and of the part of it that the kernel takes back at once (file pages).
_CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def check(name: str) -> None:
    """Raises: SettingsError where PyTorch has no such device on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"{name!r} is no device: write cpu, cuda or, for the second GPU, cuda:1") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch asserts that it was built with CUDA
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"the device {name!r} can't be used here: {reason}") from error


def device_name(device: torch.device, root: Path = Path("/")) -> str:
    """What people call it: the model of the GPU or of the CPU; "" where that can't be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    named = (line.partition(":")[2].strip() for line in _lines(root / "proc/cpuinfo") if line.startswith("model name"))
    return next(named, "") if device.type == "cpu" else ""


def check_room(name: str, weight_bytes: int, kv_bytes: int) -> None:
    """Raises: SettingsError where the device has less memory free than both together."""
    free = free_bytes(name)
    if free is not None and weight_bytes + kv_bytes > free:
        raise SettingsError(
            f"not enough memory on {name}: {size(weight_bytes)} of weights and {size(kv_bytes)} for keys and values "
            f"(--kv-bytes) are more than the {size(free)} that are free"
        )


def free_bytes(name: str) -> int | None:
    """Free memory of the device; None where that can't be known."""
    device = torch.device(name)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_free_bytes() if device.type == "cpu" else None


def host_free_bytes(root: Path = Path("/")) -> int | None:
    """What this process may still take: of the machine, and within the limits of its control groups (containers)."""
    return min((*_machine(root), *_groups(root)), default=None)


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers in _CGROUPS:
            mounted, *names = _CGROUPS[controllers]
            base = root / mounted
            folder = base / path.lstrip("/")
            # In a container the path is the host's and only the mount itself is there.
            for group in (folder, *folder.parents):
                if group.is_relative_to(base):
                    yield from _group(group, *names)


def _group(folder: Path, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limit_bytes, used_bytes = (int((folder / name).read_text()) for name in (limit, used))
        file_bytes = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.split()[0] == reclaimable]
        yield max(limit_bytes - used_bytes + sum(file_bytes), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
