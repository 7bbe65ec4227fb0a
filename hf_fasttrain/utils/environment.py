"""What the run runs on: machine, versions, memory."""

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

# Linux control groups, and those of this process.
CGROUP_ROOT, PROCESS_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
PACKAGES = ("hf_fasttrain", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "evaluate")


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Return processor, cores, accelerator and processes, as result.json holds them."""
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
    """Return the versions of Python and of the packages that decide a run's outcome."""
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
    """Return the memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def free_memory_bytes() -> int:
    """Return the memory that is to be had: of the machine, or of the container where that allows less.

    Cached files that the kernel gives up for it count as free.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_free_in_groups()]))


def _free_in_groups() -> list[int]:
    """Return what the control groups of this process allow yet, its own and those above it (versions 1 and 2)."""
    try:
        lines = PROCESS_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controllers
        group = root / own.lstrip("/")
        for folder in (group, *group.parents):
            free += _free_in_group(folder, version=1 if controllers else 2)
            if folder == root:
                break
    return free


def _free_in_group(folder: Path, version: int) -> list[int]:
    """Return what a control group allows beside what it uses, nothing if it has no limit."""
    limits = ("memory.limit_in_bytes",) if version == 1 else ("memory.max", "memory.high")
    used = "memory.usage_in_bytes" if version == 1 else "memory.current"
    free = []
    for name in limits:
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            limit = int((folder / name).read_text())
            free.append(limit - int((folder / used).read_text()) + _cached_in_group(folder, version))
    return free


def _cached_in_group(folder: Path, version: int) -> int:
    """Return how many bytes of cached files a group's kernel memory gives up: unused ones, and half of the used."""
    prefix = "total_" if version == 1 else ""  # with the groups below it, as its usage is counted
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdigit()}
    return found.get(f"{prefix}inactive_file", 0) + found.get(f"{prefix}active_file", 0) // 2


def set_current_device(accelerator: Any) -> torch.device:
    """Return the accelerator's device with its index, and make it the present one.

    accelerate says "cuda" for a single process: other threads would take GPU 0 for it, and a seed would go to the GPU
    that is present.
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
    """Let torch use one thread on the host: for many small copies, threads that wait for each other cost ten times."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)
