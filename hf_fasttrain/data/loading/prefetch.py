"""Keys to batches of uint8 pixels on the device: made by worker processes, pinned, copied ahead of their use."""

from __future__ import annotations

import gc
import math
import mmap
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
from hf_fasttrain.data.loading.worker_deaths import Deaths
from hf_fasttrain.data.loading.workers import Workers
from hf_fasttrain.data.pixels.augment import TrainTransform
from hf_fasttrain.data.pixels.images import Event, Images
from hf_fasttrain.utils.errors import NotEnoughMemory, RunError, UserError, first_line, how_to_resume
from hf_fasttrain.utils.library_errors import is_out_of_memory

Batch = tuple[Tensor, Tensor]
BATCHES_AHEAD = 4  # batches that each worker may be ahead
MOST_IMAGES_AHEAD = 4096  # images that all workers together may be ahead: 0.6 GB at 224 px


class Made(NamedTuple):
    """What was made of a key."""

    pixels: Tensor  # (B, S, S, 3) uint8
    labels: Tensor
    events: tuple[Event, ...]  # bad images and notes


class ImageBatches:
    """Makes the uint8 pixels (B, S, S, 3) and labels of a key; used by the loader's workers.

    Without a transform the prepared pixels are the batch; all are of one size then.
    """

    def __init__(self, images: Images, transform: TrainTransform | None = None) -> None:
        self.images, self.transform = images, transform

    @property
    def num_images(self) -> int:
        """Images of the split."""
        return len(self.images.split)

    def make(self, key: MicroBatchKey, room: Tensor | None = None) -> Made:
        """Return the batch of a key, its pixels in `room` (bytes) if they fit."""
        events: list[Event] = []
        used = np.empty_like(key.indices)
        images = self.images.pixels(key.indices, used, events)
        if self.transform is not None:
            size = self.transform.size_at(key.epoch)
            batch = _pixels(room, len(key.indices), size, size)
            self.transform.write(images, key, batch.numpy())
        else:
            place, first = next(images)
            batch = _pixels(room, len(key.indices), *first.shape[:2])
            for row, pixels in chain([(place, first)], images):
                batch.numpy()[row] = pixels
        return Made(batch, torch.from_numpy(self.images.split.labels[used]), tuple(events))

    def most_bytes(self, num_images: int) -> int:
        """Return how many bytes the pixels of so many images need at most; 0 if that is not known."""
        if self.transform is not None:
            return num_images * self.transform.image_size**2 * 3
        center = self.images.preparation.center
        return num_images * center.image_size**2 * 3 if center else 0


def _pixels(room: Tensor | None, number: int, height: int, width: int) -> Tensor:
    shape = (number, height, width, 3)
    if room is None or len(room) < math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    return room[: math.prod(shape)].view(shape)


class _Slots:
    """Memory that the workers write batches into and that is used again and again.

    Memory that is new for each batch costs more than moving the pixels: its pages are fresh in both processes. Workers
    that are forked inherit these slots, so that they need no room in /dev/shm, of which containers have little.
    """

    def __init__(self, number: int, slot_bytes: int) -> None:
        if torch.multiprocessing.get_start_method() == "fork":
            shared = mmap.mmap(-1, number * slot_bytes)
            self.memory = torch.frombuffer(shared, dtype=torch.uint8).view(number, slot_bytes)
        else:
            self.memory = torch.empty((number, slot_bytes), dtype=torch.uint8).share_memory_()
        self.free: deque[int] = deque(range(number))


class _BatchRequest(NamedTuple):
    """A key on its way to a worker, and the slot that its pixels go to."""

    key: MicroBatchKey
    slot: int | None


class _SentBatch(NamedTuple):
    """A batch on its way back from a worker; its pixels are in the slot, unless there is none or it is too small."""

    slot: int | None
    shape: tuple[int, ...]
    labels: np.ndarray
    events: tuple[Event, ...]
    pixels: np.ndarray | None


class _SlotSampler:
    """Gives each key a free slot."""

    def __init__(self, keys: Iterable[MicroBatchKey], slots: _Slots | None) -> None:
        self.keys, self.slots = keys, slots

    def __iter__(self) -> Iterator[_BatchRequest]:
        if self.slots is None:
            yield from (_BatchRequest(key, None) for key in self.keys)
            return
        self.slots.free = deque(range(len(self.slots.memory)))
        for key in self.keys:
            yield _BatchRequest(key, self.slots.free.popleft())


class _BatchDataset:
    """Makes the batch of each key that is asked for; in a worker with its slots, without workers in this process."""

    def __init__(self, images: ImageBatches, memory: Tensor | None) -> None:
        self.images, self.memory = images, memory

    def here(self, asked: _BatchRequest) -> Made | UserError:
        """Return a batch to the same process; what is wrong with its images is raised by the reader.

        Where memory runs out it is made a second time: what others had then, they may have given back.
        """
        made = self._try(asked)
        if isinstance(made, str):
            gc.collect()  # outside of the handler, which held what it failed on
            made = self._try(asked)
        if isinstance(made, str):
            made = NotEnoughMemory(
                f"out of memory twice while loading a batch: {made}; lower data.workers or data.cache_gb, or remove "
                f"the image if it is too large; {how_to_resume()} continues from the newest checkpoint"
            )
        return made

    def _try(self, asked: _BatchRequest) -> Made | UserError | str:
        """Return a batch, what is wrong with its images, or what there was no memory for."""
        try:
            return self.images.make(asked.key, self._room(asked))
        except UserError as error:
            error.on_every_process = False
            return error
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            return first_line(error)

    def __call__(self, asked: _BatchRequest) -> _SentBatch | UserError:
        made, room = self.here(asked), self._room(asked)
        if isinstance(made, UserError):
            return made
        inside = room is not None and made.pixels.data_ptr() == room.data_ptr()
        shape, labels = tuple(made.pixels.shape), made.labels.numpy()
        return _SentBatch(asked.slot, shape, labels, made.events, None if inside else made.pixels.numpy())

    def _room(self, asked: _BatchRequest) -> Tensor | None:
        return None if asked.slot is None or self.memory is None else self.memory[asked.slot]


class Feed:
    """Turns keys into batches on the device, and counts the seconds that are lost by waiting for them.

    `report` is told of bad images and notes, with the number of images in the split; `deaths` of workers that die.
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
        self.deaths = Deaths(self._note)
        self._waited = 0.0
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def _note(self, text: str) -> None:
        if self.report is not None:
            self.report(text, self.images.num_images)

    @property
    def wait_seconds(self) -> float:
        """Seconds lost by waiting for data so far: on a GPU, those in which it had nothing else to do.

        On a GPU the time between two events on its own stream is counted, when they have passed: no sync.
        """
        self._count_stalls()
        return self._waited

    def _count_stalls(self) -> None:
        while self._stalls and self._stalls[0][1].query():
            before, after = self._stalls.popleft()
            self._waited += before.elapsed_time(after) / 1000

    def open(self, keys: Iterable[MicroBatchKey], largest: int, *, persistent: bool = False) -> Iterable[Batch]:
        """Return the batches of keys, (pixels, labels) on the device, to be used one at a time.

        `largest` is the number of images in the largest one. With `persistent` the workers are kept for the next
        time that the batches are gone through. Nothing is drawn from torch's global generator.
        """
        return _PrefetchedBatches(self, keys, largest, persistent)

    def read(self, sent: Iterator[Made | _SentBatch | UserError], slots: _Slots | None) -> Iterator[Batch]:
        """Yield what the workers send, on the device."""
        if self.device.type != "cuda":
            yield from self._on_host(sent, slots)
        elif not self.workers:  # in this thread: operations draw from torch's generator, which training uses too
            yield from self._on_device(self._copy_to_device(batch, slots) for batch in sent)
        else:
            ahead = BackgroundIterator(sent, lambda batch: self._copy_to_device(batch, slots))
            try:
                yield from self._on_device(ahead)
            finally:
                ahead.stop()

    def _on_host(self, sent: Iterator[Made | _SentBatch | UserError], slots: _Slots | None) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(sent, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield self._checked(_received(batch, slots))
            _release(batch, slots)

    def _copy_to_device(
        self, batch: Made | _SentBatch | UserError, slots: _Slots | None
    ) -> tuple[Made | UserError, torch.cuda.Event | None]:
        """Start copying on a stream of its own; called by the thread that is ahead."""
        made = _received(batch, slots)
        if isinstance(made, UserError):
            return made, None
        tensors = (made.pixels, made.labels)
        with torch.cuda.device(self.device):  # each thread has a present device of its own, at first GPU 0
            if self.pin_memory:
                tensors = _pinned(made.pixels), _pinned(made.labels)
            stream = self._copies
            with torch.cuda.stream(stream):
                pixels, labels = (tensor.to(self.device, non_blocking=self.pin_memory) for tensor in tensors)
            done = stream.record_event()
        _release(batch, slots)  # its pixels are in pinned memory, or copied already
        return Made(pixels, labels, made.events), done

    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def _on_device(self, ahead: Iterable[tuple[Made | UserError, torch.cuda.Event | None]]) -> Iterator[Batch]:
        batches = iter(ahead)
        while True:
            present = torch.cuda.current_stream(self.device)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record(present)
            found = next(batches, None)
            if found is None:
                return
            made, done = found
            pixels, labels = self._checked(made)
            assert done is not None
            present.wait_event(done)
            after.record(present)
            self._stalls.append((before, after))
            self._count_stalls()
            for tensor in (pixels, labels):
                tensor.record_stream(present)  # its memory is not reused before the present stream is past it
            yield pixels, labels

    def _checked(self, made: Made | UserError) -> Batch:
        if isinstance(made, UserError):
            raise made
        for event in made.events:
            if self.report is not None:
                self.report(event, self.images.num_images)
        return made.pixels, made.labels


def _pinned(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory. RunError where the host has none: smaller batches on the GPU would not help."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        raise RunError(
            f"data.pin_memory: {tensor.nbytes:,} bytes of the host's memory can't be pinned ({first_line(error)}); "
            "set data.pin_memory=false, or raise the container's limit of locked memory"
        ) from None


def _received(batch: Made | _SentBatch | UserError, slots: _Slots | None) -> Made | UserError:
    if not isinstance(batch, _SentBatch):
        return batch
    if batch.pixels is not None:
        return Made(torch.from_numpy(batch.pixels), torch.from_numpy(batch.labels), batch.events)
    assert slots is not None
    assert batch.slot is not None
    pixels = slots.memory[batch.slot][: math.prod(batch.shape)].view(batch.shape)
    return Made(pixels, torch.from_numpy(batch.labels), batch.events)


def _release(batch: Made | _SentBatch | UserError, slots: _Slots | None) -> None:
    """Let the slot of a batch be used again."""
    if slots is not None and isinstance(batch, _SentBatch) and batch.slot is not None:
        slots.free.append(batch.slot)


class _PrefetchedBatches:
    """The batches of some keys; workers and slots are made when they are first gone through."""

    def __init__(self, feed: Feed, keys: Iterable[MicroBatchKey], largest: int, persistent: bool) -> None:
        self.feed, self.keys, self.largest, self.persistent = feed, keys, largest, persistent
        self._kept: tuple[Workers, _Slots | None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if not self.feed.workers:
            return self.feed.read(map(_BatchDataset(self.feed.images, None).here, _SlotSampler(self.keys, None)), None)
        workers, slots = self._kept or self._build()
        if self.persistent:
            self._kept = workers, slots
        workers.deaths = self.feed.deaths
        return self.feed.read(workers.answers(_SlotSampler(self.keys, slots), keep=self.persistent), slots)

    def close(self) -> None:
        """End the workers that are kept."""
        if self._kept is not None:
            self._kept[0].close()
        self._kept = None

    def _build(self) -> tuple[Workers, _Slots | None]:
        number, images, slots = self.feed.workers, self.feed.images, None
        if images.most_bytes(self.largest):
            slots = _Slots(num_slots(number, self.largest), images.most_bytes(self.largest))
        making = _BatchDataset(images, slots.memory if slots else None)
        return Workers(making, number, batches_ahead(number, self.largest), self.feed.deaths), slots


def batches_ahead(workers: int, images: int) -> int:
    """Return how many batches of so many images each worker may be ahead."""
    return max(1, min(BATCHES_AHEAD, MOST_IMAGES_AHEAD // max(1, workers * images)))


def num_slots(workers: int, images: int) -> int:
    """Return how many batches of so many images have a place in shared memory, 1 without workers."""
    return workers * batches_ahead(workers, images) + 2 if workers else 1


class Restartable:
    """An iterable that starts anew each time."""

    def __init__(self, start: Callable[[], Iterator[Batch]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        return self.start()
