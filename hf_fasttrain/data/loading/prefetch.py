"""Batches of uint8 pixels on the device: loaded by worker processes, pinned, and copied before they are needed."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.loading.background import BackgroundIterator
from hf_fasttrain.data.loading.sampler import MicroBatchKey
from hf_fasttrain.data.loading.shared_memory import SharedMemory
from hf_fasttrain.data.loading.waiting import WAITING, WaitCutShort
from hf_fasttrain.data.loading.worker_deaths import WorkerDeaths
from hf_fasttrain.data.loading.workers import Workers
from hf_fasttrain.data.pixels.augment import TrainTransform
from hf_fasttrain.data.pixels.bad_images import Event
from hf_fasttrain.data.pixels.custom_transform import CustomTransform
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.data.source.multi_label import dense_labels
from hf_fasttrain.utils.errors import NotEnoughMemory, RunError, UserError, first_line, how_to_resume
from hf_fasttrain.utils.library_errors import is_out_of_memory

Batch = tuple[Tensor, Tensor]
BATCHES_AHEAD = 4  # batches that each worker may prefetch
MAX_IMAGES_AHEAD = 4096  # images that all workers together may prefetch: 0.6 GB at 224 px


class PixelBatch(NamedTuple):
    """The batch of a key, on the host or the device."""

    pixels: Tensor  # (B, S, S, 3) uint8
    labels: Tensor
    events: tuple[Event, ...]  # bad images and notes


class ImageBatches:
    """Builds the uint8 pixels (B, S, S, 3) and labels of a key; used by the loader's workers.

    Without a transform the batch holds the prepared pixels, which must all have the same size.
    """

    def __init__(self, images: Images, transform: TrainTransform | CustomTransform | None = None) -> None:
        self.images, self.transform = images, transform

    @property
    def num_images(self) -> int:
        """Number of images in the split."""
        return len(self.images.split)

    def make(self, key: MicroBatchKey, buffer: Tensor | None = None) -> PixelBatch:
        """Return the batch of a key; its pixels are written to `buffer` (bytes) if they fit."""
        events: list[Event] = []
        used = np.empty_like(key.indices)
        images = self.images.pixels(key.indices, used, events)
        if self.transform is not None:
            size = self.transform.size_at(key.epoch)
            batch = pixel_buffer(buffer, len(key.indices), size, size)
            self.transform.write(images, key, batch.numpy())
        else:
            position, first = next(images)
            batch = pixel_buffer(buffer, len(key.indices), *first.shape[:2])
            for row, pixels in chain([(position, first)], images):
                batch.numpy()[row] = pixels
        return PixelBatch(batch, torch.from_numpy(dense_labels(self.images.split.labels, used)), tuple(events))

    def max_bytes(self, num_images: int) -> int:
        """Return the largest number of bytes that the pixels of `num_images` images can need; 0 if unknown."""
        if self.transform is not None:
            return num_images * self.transform.image_size**2 * 3
        center = self.images.preparation.center
        return num_images * center.image_size**2 * 3 if center else 0


def pixel_buffer(buffer: Tensor | None, number: int, height: int, width: int) -> Tensor:
    """Return memory for so many images, (N, H, W, 3) uint8: that of `buffer` (bytes) if they fit, else new."""
    shape = (number, height, width, 3)
    if buffer is None or len(buffer) < math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    return buffer[: math.prod(shape)].view(shape)


class _Slots:
    """A ring of shared memory that the workers write batches into.

    Fresh memory for each batch costs more than moving the pixels: its pages are new in both processes.
    """

    def __init__(self, number: int, slot_bytes: int) -> None:
        self.memory = SharedMemory(number, slot_bytes)
        self.free: deque[int] = deque(range(number))


class _BatchRequest(NamedTuple):
    """A key that is sent to a worker, and the slot for its pixels."""

    key: MicroBatchKey
    slot: int | None


class _SentBatch(NamedTuple):
    """A batch that a worker sends back; `pixels` is None if they are in the slot, which may be missing or too small."""

    slot: int | None
    shape: tuple[int, ...]
    labels: np.ndarray
    events: tuple[Event, ...]
    pixels: np.ndarray | None


class _SlotSampler:
    """Assigns a free slot to each key."""

    def __init__(self, keys: Iterable[MicroBatchKey], slots: _Slots | None) -> None:
        self.keys, self.slots = keys, slots

    def __iter__(self) -> Iterator[_BatchRequest]:
        if self.slots is None:
            yield from (_BatchRequest(key, None) for key in self.keys)
            return
        self.slots.free = deque(range(len(self.slots.memory.rows)))
        for key in self.keys:
            yield _BatchRequest(key, self.slots.free.popleft())


class _BatchDataset:
    """Builds the batch of each request: in a worker, into its slot, or in this process if there are no workers."""

    def __init__(self, images: ImageBatches, memory: SharedMemory | None) -> None:
        self.images, self.memory = images, memory

    def load(self, request: _BatchRequest) -> PixelBatch | UserError:
        """Return the batch, or the error in its images, which the consumer raises.

        Retried once when memory runs out: other processes may have released theirs in the meantime.
        """
        result = self._attempt(request)
        if isinstance(result, str):
            gc.collect()  # outside of the handler, whose traceback keeps the failed batch alive
            result = self._attempt(request)
        if isinstance(result, str):
            result = NotEnoughMemory(
                f"out of memory twice while loading a batch: {result}; lower data.workers or data.cache_gb, or remove "
                f"the image if it is too large; {how_to_resume()} continues from the newest checkpoint"
            )
        return result

    def _attempt(self, request: _BatchRequest) -> PixelBatch | UserError | str:
        """Return the batch, the error in its images, or the text of an out-of-memory error."""
        try:
            return self.images.make(request.key, self._buffer(request))
        except UserError as error:
            error.on_every_process = False
            return error
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            return first_line(error)

    def __call__(self, request: _BatchRequest) -> _SentBatch | UserError:
        batch, buffer = self.load(request), self._buffer(request)
        if isinstance(batch, UserError):
            return batch
        in_slot = buffer is not None and batch.pixels.data_ptr() == buffer.data_ptr()
        shape, labels = tuple(batch.pixels.shape), batch.labels.numpy()
        return _SentBatch(request.slot, shape, labels, batch.events, None if in_slot else batch.pixels.numpy())

    def _buffer(self, request: _BatchRequest) -> Tensor | None:
        return None if request.slot is None or self.memory is None else self.memory.rows[request.slot]


class Prefetcher:
    """Loads the batches of keys ahead, copies them to the device, and counts the seconds spent waiting for them.

    `report` is called with each bad image or note and the number of images in the split; `deaths` counts the workers
    that die.
    """

    def __init__(
        self,
        images: ImageBatches,
        device: torch.device,
        *,
        workers: int,
        pin_memory: bool,
        report: Callable[[Event, int], None] | None = None,
    ) -> None:
        self.images, self.device, self.workers, self.pin_memory = images, device, workers, pin_memory
        self.report = report
        self.deaths = WorkerDeaths(self._note)
        self._wait_seconds = 0.0
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def _note(self, text: str) -> None:
        if self.report is not None:
            self.report(text, self.images.num_images)

    @property
    def wait_seconds(self) -> float:
        """Seconds lost waiting for data: on a GPU, the seconds in which it was idle.

        On a GPU this is the time between two events on its stream, read once they have completed: no sync.
        """
        self._count_stalls()
        return self._wait_seconds

    def _count_stalls(self) -> None:
        while self._stalls and self._stalls[0][1].query():
            before, after = self._stalls.popleft()
            self._wait_seconds += before.elapsed_time(after) / 1000

    def wrap_images(self, wrap: Callable[[ImageBatches], ImageBatches]) -> None:
        """Build the batches by `wrap(images)` from the next `open` on: the seam for a profiler of the workers."""
        self.images = wrap(self.images)

    def open(self, keys: Iterable[MicroBatchKey], largest: int, *, persistent: bool = False) -> Iterable[Batch]:
        """Return an iterable over the batches of keys, (pixels, labels) on the device; use one at a time.

        `largest` is the number of images in the largest batch. With `persistent` the workers stay alive for the next
        iteration. torch's global random generator is not used.
        """
        return _PrefetchedBatches(self, keys, largest, persistent)

    def read(self, sent: Iterator[PixelBatch | _SentBatch | UserError], slots: _Slots | None) -> Iterator[Batch]:
        """Yield the batches that the workers send, on the device."""
        if self.device.type != "cuda":
            yield from self._on_host(sent, slots)
        elif not self.workers:  # in this thread: augmentation draws from torch's generator, which training uses too
            yield from self._on_device(self._copy_to_device(batch, slots) for batch in sent)
        else:
            ahead = BackgroundIterator(sent, lambda batch: self._copy_to_device(batch, slots))
            try:
                yield from self._on_device(ahead)
            finally:
                ahead.stop(seconds=0.1 if isinstance(sys.exception(), WaitCutShort) else 10.0)

    def _on_host(self, sent: Iterator[PixelBatch | _SentBatch | UserError], slots: _Slots | None) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            with WAITING:
                batch = next(sent, None)
            self._wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield self._unwrap(_receive(batch, slots))
            _release(batch, slots)

    def _copy_to_device(
        self, batch: PixelBatch | _SentBatch | UserError, slots: _Slots | None
    ) -> tuple[PixelBatch | UserError, torch.cuda.Event | None]:
        """Start copying on a separate stream; called by the background thread."""
        host = _receive(batch, slots)
        if isinstance(host, UserError):
            return host, None
        tensors = (host.pixels, host.labels)
        with torch.cuda.device(self.device):  # the current device is per thread, initially GPU 0
            if self.pin_memory:
                tensors = _pin(host.pixels), _pin(host.labels)
            stream = self._copy_stream
            with torch.cuda.stream(stream):
                pixels, labels = (tensor.to(self.device, non_blocking=self.pin_memory) for tensor in tensors)
            done = stream.record_event()
        _release(batch, slots)  # its pixels are in pinned memory or already copied
        return PixelBatch(pixels, labels, host.events), done

    @cached_property
    def _copy_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def _on_device(self, ahead: Iterable[tuple[PixelBatch | UserError, torch.cuda.Event | None]]) -> Iterator[Batch]:
        batches = iter(ahead)
        while True:
            stream = torch.cuda.current_stream(self.device)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record(stream)
            with WAITING:
                copied = next(batches, None)
            if copied is None:
                return
            batch, done = copied
            pixels, labels = self._unwrap(batch)
            assert done is not None
            stream.wait_event(done)
            after.record(stream)
            self._stalls.append((before, after))
            self._count_stalls()
            for tensor in (pixels, labels):
                tensor.record_stream(stream)  # its memory is not reused before this stream has finished with it
            yield pixels, labels

    def _unwrap(self, batch: PixelBatch | UserError) -> Batch:
        if isinstance(batch, UserError):
            raise batch
        for event in batch.events:
            if self.report is not None:
                self.report(event, self.images.num_images)
        return batch.pixels, batch.labels


def _pin(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory; RunError if that fails, since smaller batches on the GPU would not help."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        raise RunError(
            f"data.pin_memory: {tensor.nbytes:,} bytes of the host's memory can't be pinned ({first_line(error)}); "
            "set data.pin_memory=false, or raise the container's limit of locked memory"
        ) from None


def _receive(batch: PixelBatch | _SentBatch | UserError, slots: _Slots | None) -> PixelBatch | UserError:
    if not isinstance(batch, _SentBatch):
        return batch
    if batch.pixels is not None:
        return PixelBatch(torch.from_numpy(batch.pixels), torch.from_numpy(batch.labels), batch.events)
    assert slots is not None
    assert batch.slot is not None
    pixels = slots.memory.rows[batch.slot][: math.prod(batch.shape)].view(batch.shape)
    return PixelBatch(pixels, torch.from_numpy(batch.labels), batch.events)


def _release(batch: PixelBatch | _SentBatch | UserError, slots: _Slots | None) -> None:
    """Mark the slot of a batch as free."""
    if slots is not None and isinstance(batch, _SentBatch) and batch.slot is not None:
        slots.free.append(batch.slot)


class _PrefetchedBatches:
    """An iterable over the batches of keys; workers and slots are created at the first iteration."""

    def __init__(self, prefetcher: Prefetcher, keys: Iterable[MicroBatchKey], largest: int, persistent: bool) -> None:
        self.prefetcher, self.keys, self.largest, self.persistent = prefetcher, keys, largest, persistent
        self._persistent: tuple[Workers, _Slots | None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if not self.prefetcher.workers:
            return self.prefetcher.read(
                map(_BatchDataset(self.prefetcher.images, None).load, _SlotSampler(self.keys, None)), None
            )
        workers, slots = self._persistent or self._build()
        if self.persistent:
            self._persistent = workers, slots
        workers.deaths = self.prefetcher.deaths
        return self.prefetcher.read(workers.answers(_SlotSampler(self.keys, slots), keep=self.persistent), slots)

    def close(self) -> None:
        """Stop the persistent workers."""
        if self._persistent is not None:
            self._persistent[0].close()
        self._persistent = None

    def _build(self) -> tuple[Workers, _Slots | None]:
        number, images, slots = self.prefetcher.workers, self.prefetcher.images, None
        if images.max_bytes(self.largest):
            slots = _Slots(num_slots(number, self.largest), images.max_bytes(self.largest))
        dataset = _BatchDataset(images, slots.memory if slots else None)
        return Workers(dataset, number, batches_ahead(number, self.largest), self.prefetcher.deaths), slots


def batches_ahead(workers: int, images: int) -> int:
    """Return how many batches of `images` images each worker may prefetch."""
    return max(1, min(BATCHES_AHEAD, MAX_IMAGES_AHEAD // max(1, workers * images)))


def num_slots(workers: int, images: int) -> int:
    """Return how many batches of `images` images fit into the shared memory; 1 without workers."""
    return workers * batches_ahead(workers, images) + 2 if workers else 1


class Restartable:
    """An iterable that calls `start` for each iteration."""

    def __init__(self, start: Callable[[], Iterator[Batch]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        return self.start()
