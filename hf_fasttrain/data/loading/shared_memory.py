"""Memory that this process shares with its loader processes, however they are started."""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch
from torch import Tensor


class SharedMemory:
    """`number` rows of `row_bytes` zeros, as `rows`, a uint8 tensor of that shape.

    None of it lies in /dev/shm, which has 64 MB in containers and may be read-only. Forked processes inherit it; others
    open it by the path of a memfd of this process, which must be alive. On systems without memfd torch shares it.
    """

    def __init__(self, number: int, row_bytes: int) -> None:
        self._file: int | None = None
        if torch.multiprocessing.get_start_method() == "fork":
            memory = mmap.mmap(-1, number * row_bytes)
        elif hasattr(os, "memfd_create"):
            self._file = os.memfd_create("hf_fasttrain-shared")
            os.ftruncate(self._file, number * row_bytes)
            memory = mmap.mmap(self._file, number * row_bytes)
        else:
            self.rows = torch.zeros((number, row_bytes), dtype=torch.uint8).share_memory_()
            return
        self.rows = _as_rows(memory, number, row_bytes)

    def __reduce__(self) -> Any:
        if self._file is None:
            return _of_rows, (self.rows,)
        return _opened, (f"/proc/{os.getpid()}/fd/{self._file}", *self.rows.shape)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


def _as_rows(memory: mmap.mmap, number: int, row_bytes: int) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8).view(number, row_bytes)


def _of_rows(rows: Tensor) -> SharedMemory:
    shared = SharedMemory.__new__(SharedMemory)
    shared.rows, shared._file = rows, None
    return shared


def _opened(path: str, number: int, row_bytes: int) -> SharedMemory:
    with open(path, "r+b", buffering=0) as file:
        return _of_rows(_as_rows(mmap.mmap(file.fileno(), number * row_bytes), number, row_bytes))
