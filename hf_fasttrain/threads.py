"""How many threads a process has on a CPU, whatever launchers export."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil
import torch
from accelerate.utils.environment import get_int_from_env

from hf_fasttrain.environment import LAUNCHER_MARKS, num_cores, was_launched

VARIABLE = "OMP_NUM_THREADS"
# What torchrun and accelerate export, then what mpirun does, as far as accelerate knows it.
LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def set_cpu_threads(wish: int | None = None) -> tuple[int, str]:
    """Set torch's threads to the wish, else to the user's OMP_NUM_THREADS, else to this process's share of the cores.

    Return their number, and why it is that one.
    """
    threads, why = (wish, "") if wish else _without_wish()
    torch.set_num_threads(threads)
    return threads, why


def _without_wish() -> tuple[int, str]:
    asked, local = user_threads(), local_processes()
    if asked:
        return asked, f"{VARIABLE} of the user"
    return max(1, num_cores() // local), f"{num_cores()} cores / {local} processes"


def local_processes() -> int:
    """Return how many training processes this machine has."""
    return max(1, get_int_from_env(LOCAL_PROCESSES, 1))


def num_processes() -> int:
    """Return how many training processes there are, on all machines."""
    return max(1, get_int_from_env(PROCESSES, 1))


def user_threads() -> int | None:
    """Return what the user's OMP_NUM_THREADS asks for, None if nothing does.

    One that a launcher exports is not the user's: torchrun exports 1, `accelerate launch` 1 or the host's physical
    cores. It is if the launcher was started with the variable, or was told with how many threads to start processes.
    """
    value = _number(os.environ.get(VARIABLE))
    if value is None or not was_launched():
        return value
    launcher = _launcher()
    with suppress(psutil.Error, OSError):
        if launcher is not None:
            told = any(word.startswith("--num_cpu_threads_per_process") for word in launcher.cmdline())
            return value if told or _number(launcher.environ().get(VARIABLE)) else None
    return None if value in _launchers_own() else value


def _number(text: str | None) -> int | None:
    """Return the threads that a value of OMP_NUM_THREADS asks for, at its outermost level; None if it is none."""
    first = (text or "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _launcher() -> psutil.Process | None:
    """Return the nearest process above this one that no launcher started, None if it can't be looked at."""
    with suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            if not any(mark in process.environ() for mark in LAUNCHER_MARKS):
                return process
    return None


def _launchers_own() -> set[int]:
    """Return the numbers of threads that launchers choose by themselves."""
    physical = psutil.cpu_count(logical=False) or 1
    return {1, physical // local_processes()}
