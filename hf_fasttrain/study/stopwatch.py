"""Profiles a training: seconds by phase of a step, and worker-seconds by stage of the loader.

Ordinary training has no timers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_fasttrain.data.loading.prefetch import ImageBatches, PixelBatch, Prefetcher
from hf_fasttrain.data.loading.sampler import MicroBatchKey
from hf_fasttrain.data.loading.shared_memory import SharedMemory
from hf_fasttrain.data.loading.workers import worker_index
from hf_fasttrain.data.pixels.decode import Pixels
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.utils.files import read_regular

PHASES = ("wait", "copy", "forward", "backward", "optimizer", "other")  # of a step; they add up to it
STAGES = ("read", "decode", "augment", "collate")  # of a loader's worker
MAX_WORKERS = 256
_BUSY, _IMAGES = len(STAGES), len(STAGES) + 1  # columns beside the stages


class Stopwatch:
    """Sums up the seconds of phases in this process (by CUDA events on a GPU) and of stages in loader processes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        # A row for each worker, so that they need no lock.
        self.counters = SharedMemory(MAX_WORKERS, 8 * (len(STAGES) + 2))
        self.table = _table_in(self.counters)
        self._before = self.table.clone()

    def reset(self) -> None:
        """Start from zero, while workers continue to count."""
        self._seconds, self._events = dict.fromkeys(PHASES, 0.0), []
        self._before = self.table.clone()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent in this context to a phase."""
        if self.device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._events.append((name, before, after))
            return
        start_time = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start_time

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase except wait and other; a GPU must be synchronised first."""
        for phase, before, after in self._events:
            self._seconds[phase] += before.elapsed_time(after) / 1000
        self._events = []
        return {phase: seconds for phase, seconds in self._seconds.items() if phase not in ("wait", "other")}

    def _totals(self) -> np.ndarray:
        return (self.table - self._before).sum(0).numpy()

    def stages(self) -> dict[str, float]:
        """Return the worker-seconds of each stage; collate is the rest of a batch's time."""
        totals = self._totals()
        seconds = dict(zip(STAGES, totals.tolist(), strict=False))
        return {**seconds, "collate": max(0.0, float(totals[_BUSY] - totals[: len(STAGES) - 1].sum()))}

    def stage_images(self) -> int:
        """Return how many images were loaded."""
        return int(self._totals()[_IMAGES])


def watch_compute(trainer: Trainer, watch: Stopwatch) -> None:
    """Time the phases of a trainer's steps."""
    trainer.step.time_by(watch.phase)
    trainer.train_loader.timer = watch.phase


def watch_loader(prefetcher: Prefetcher, watch: Stopwatch) -> None:
    """Time the stages of a prefetcher's workers."""
    prefetcher.wrap_images(lambda images: _TimedBatches(images, watch.counters))


def _table_in(memory: SharedMemory) -> torch.Tensor:
    return memory.rows.view(torch.float64)


class _Row:
    """This worker's row of the table."""

    def __init__(self, counters: SharedMemory) -> None:
        self.counters = counters
        self._row: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"counters": self.counters, "_row": None}

    def add(self, column: int, amount: float) -> None:
        if self._row is None:
            self._row = _table_in(self.counters)[(worker_index() or 0) % MAX_WORKERS].numpy()
        self._row[column] += amount


class _TimedBatches(ImageBatches):
    """Wraps `ImageBatches` and times its stages."""

    def __init__(self, batches: ImageBatches, counters: SharedMemory) -> None:
        row = _Row(counters)
        source = batches.images
        images = Images(source.split, _TimedPreparation(source.preparation, row), source.cache)  # type: ignore[arg-type]
        if source.cache is not None:
            images.cache = _TimedCache(source.cache, row)  # type: ignore[assignment]
        transform = _TimedTransform(batches.transform, row) if batches.transform is not None else None
        super().__init__(images, transform)  # type: ignore[arg-type]
        self.row = row

    def make(self, key: MicroBatchKey, buffer: torch.Tensor | None = None) -> PixelBatch:
        """Return the batch of a key; see `ImageBatches.make`."""
        start_time = time.perf_counter()
        batch = super().make(key, buffer)
        self.row.add(_BUSY, time.perf_counter() - start_time)
        self.row.add(_IMAGES, len(key.indices))
        return batch


@dataclass
class _Wrapper:
    """Delegates to an object and times some of its methods."""

    wrapped: Any
    row: _Row

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("wrapped", "row"):
            raise AttributeError(name)
        return getattr(self.wrapped, name)


class _TimedPreparation(_Wrapper):
    """Times reading and decoding; reads files here instead of in `read_pixels`.

    Bytes in an Arrow file's memory map have no separate read: the kernel reads them during decoding.
    """

    def encoded(self, record: Any) -> tuple[Pixels, bytes | None]:
        start_time = time.perf_counter()
        if isinstance(record, dict) and record.get("path") is not None:
            data = record.get("bytes")
            record = _read(record) if data is None else record
        read = time.perf_counter()
        try:
            encoded: tuple[Pixels, bytes | None] = self.wrapped.encoded(record)
        finally:
            self.row.add(STAGES.index("read"), read - start_time)
            self.row.add(STAGES.index("decode"), time.perf_counter() - read)
        return encoded


def _read(record: dict[str, Any]) -> dict[str, Any]:
    try:
        return {**record, "bytes": read_regular(record["path"])}
    except (OSError, ValueError):
        return record  # `read_pixels` will raise the error


class _TimedCache(_Wrapper):
    """Times reading from the cache."""

    def read(self, rows: np.ndarray, stamp_of: Any) -> Iterator[Pixels | None]:
        cached = self.wrapped.read(rows, stamp_of)
        while True:
            start_time = time.perf_counter()
            try:
                pixels = next(cached)
            except StopIteration:
                return
            finally:
                self.row.add(STAGES.index("read"), time.perf_counter() - start_time)
            yield pixels


class _TimedTransform(_Wrapper):
    """Times crops, operations, flips and erasing: `write` without the time that it waits for images."""

    def write(self, images: Iterator[tuple[int, Pixels]], key: MicroBatchKey, out: np.ndarray) -> None:
        waiting = 0.0

        def timed() -> Iterator[tuple[int, Pixels]]:
            nonlocal waiting
            source = iter(images)
            while True:
                start_time = time.perf_counter()
                item = next(source, None)
                waiting += time.perf_counter() - start_time
                if item is None:
                    return
                yield item

        start_time = time.perf_counter()
        self.wrapped.write(timed(), key, out)
        self.row.add(STAGES.index("augment"), time.perf_counter() - start_time - waiting)
