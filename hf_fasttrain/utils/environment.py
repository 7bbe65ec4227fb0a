"""The machine and the software that a run uses: processor, device, versions, memory."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from hf_fasttrain.utils.control_groups import control_groups

PACKAGES = ("hf_fasttrain", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "evaluate")


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Return processor, cores, accelerator and number of processes, as they are written into result.json."""
    cuda = device.type == "cuda"
    return {
        "processor": _processor_name(),
        "cores": num_cores(),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "num_processes": num_processes,
        "system": platform.platform(),
    }


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a run's results."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: allocated on a GPU, resident in this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def free_memory_bytes() -> int:
    """Return the available memory of the machine, or of the container if that has less.

    Cached files that the kernel can drop count as free.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_free_in_cgroups()]))


def _free_in_cgroups() -> list[int]:
    """Return the bytes left under each limit of this process's control groups and their parents (cgroup v1 and v2)."""
    return [free for group in control_groups("memory") for free in _free_in_cgroup(*group)]


def _free_in_cgroup(folder: Path, version: int) -> list[int]:
    """Return the bytes left under a control group's limits; an empty list if it has none."""
    limits = ("memory.limit_in_bytes",) if version == 1 else ("memory.max", "memory.high")
    used = "memory.usage_in_bytes" if version == 1 else "memory.current"
    free = []
    for name in limits:
        with suppress(OSError, ValueError):  # "max" means no limit
            limit = int((folder / name).read_text())
            free.append(limit - int((folder / used).read_text()) + _cached_in_cgroup(folder, version))
    return free


def _cached_in_cgroup(folder: Path, version: int) -> int:
    """Return the bytes of cached files that the kernel can drop: the inactive ones and half of the active ones."""
    prefix = "total_" if version == 1 else ""  # including child groups, as the usage does
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdigit()}
    return stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0) // 2


def set_current_device(accelerator: Any) -> torch.device:
    """Make the accelerator's device the current one, and return it with its index.

    accelerate says "cuda" for a single process: other threads would use GPU 0, and a seed would be set on the GPU that
    is current.
    """
    device: torch.device = accelerator.device
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if torch.cuda.is_available():
            torch.cuda.set_device(device)
        accelerator.state.device = device
    return device


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread on the CPU: many small copies take ten times as long with threads that synchronise."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)
