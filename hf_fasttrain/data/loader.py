"""Batches of uint8 pixels, made by worker processes, pinned, and copied to the device ahead of their use."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hf_fasttrain.data.augment import TrainTransform
from hf_fasttrain.data.batch import Mixing, Normalize, augment_on_device
from hf_fasttrain.data.images import Event, Images
from hf_fasttrain.data.order import MicroBatchKey, Order, cut_micro_batches, process_share
from hf_fasttrain.errors import DataError, RunError, UserError

Batch = tuple[Tensor, Tensor]


@dataclass
class Step:
    """One optimizer step as the trainer sees it: this process's micro-batches, on the device."""

    index: int  # counted from 0 over the whole training
    num_images: int  # of all processes together
    num_micro_batches: int  # of this process; 0 if the step has too few images for it
    micro_batches: Iterator[Batch]  # images (B, 3, H, W), targets
    image_shape: tuple[int, ...]  # of one image


class ImageBatches(Dataset):
    """Makes the uint8 pixels (B, S, S, 3) and labels of a `MicroBatchKey`; runs in the loader's workers.

    Without a transform the prepared pixels are the batch; all are of one size then.
    """

    def __init__(self, images: Images, transform: TrainTransform | None = None) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, key: MicroBatchKey) -> Made | UserError:
        try:
            return self._make(key)
        except UserError as error:
            error.every_process = False
            return error  # raised by the reader: a DataLoader would wrap it in the worker's traceback

    def _make(self, key: MicroBatchKey) -> Made:
        events: list[Event] = []
        used = np.empty_like(key.indices)
        images = self.images.pixels(key.indices, used, events)
        if self.transform is not None:
            size = self.transform.size_at(key.epoch)
            batch = _shared_pixels(len(key.indices), size, size)
            self.transform.write(images, key, batch.numpy())
        else:
            first = next(images)
            batch = _shared_pixels(len(key.indices), *first.shape[:2])
            for row, pixels in enumerate(chain([first], images)):
                batch.numpy()[row] = pixels
        return Made(batch, torch.from_numpy(self.images.split.labels[used]), tuple(events))


class Made(NamedTuple):
    """What a worker made of a key."""

    pixels: Tensor  # (B, S, S, 3) uint8
    labels: Tensor
    events: tuple[Event, ...]  # bad images and notes


def _shared_pixels(number: int, height: int, width: int) -> Tensor:
    """Return memory for a batch; in a worker it is shared already, so that sending the batch copies nothing."""
    shape = (number, height, width, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class Feed:
    """Turns keys into batches on the device, and counts the seconds that are lost by waiting for them.

    `report` is told of bad images and notes, with the number of images in the split.
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
        self._waited = 0.0
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def wait_seconds(self) -> float:
        """Seconds lost by waiting for data so far: on a GPU, those in which it had nothing else to do.

        On a GPU the time between two events on its own stream is counted, when they have passed: no sync.
        """
        while self._stalls and self._stalls[0][1].query():
            before, after = self._stalls.popleft()
            self._waited += before.elapsed_time(after) / 1000
        return self._waited

    def open(self, keys: Iterable[MicroBatchKey], *, persistent: bool = False) -> Iterable[Batch]:
        """Return the batches of keys, (pixels, labels) on the device; draws nothing from torch's global generator.

        With `persistent` the workers are kept for the next time that the batches are gone through.
        """
        loader = DataLoader(
            self.images,
            sampler=keys,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            persistent_workers=persistent and self.workers > 0,
            prefetch_factor=4 if self.workers else None,
            generator=torch.Generator(),
            collate_fn=_as_it_is,
        )
        return _Again(lambda: self._read(loader))

    def _read(self, loader: DataLoader) -> Iterator[Batch]:
        made = iter(loader)  # starts the workers, from this thread
        if self.device.type != "cuda":
            yield from self._on_host(made)
            return
        ahead = Ahead(made, self._copy_to_device)
        try:
            yield from self._on_device(ahead)
        finally:
            ahead.stop()

    def _on_host(self, made: Iterator[Made | UserError]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(made, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield self._checked(batch)

    def _copy_to_device(self, made: Made | UserError) -> tuple[Any, torch.cuda.Event | None]:
        """Start copying on a stream of its own; called by the thread that is ahead."""
        if isinstance(made, UserError):
            return made, None
        stream = self._copies
        with torch.cuda.stream(stream):
            pixels, labels = (tensor.to(self.device, non_blocking=True) for tensor in (made.pixels, made.labels))
        return Made(pixels, labels, made.events), stream.record_event()

    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def _on_device(self, ahead: Iterable[tuple[Any, torch.cuda.Event]]) -> Iterator[Batch]:
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
            present.wait_event(done)
            after.record(present)
            self._stalls.append((before, after))
            for tensor in (pixels, labels):
                tensor.record_stream(present)  # its memory is not reused before the present stream is past it
            yield pixels, labels

    def _checked(self, made: Made | UserError) -> Batch:
        if isinstance(made, UserError):
            raise made
        for event in made.events:
            if self.report is not None:
                self.report(event, len(self.images.images.split))
        return made.pixels, made.labels


class _Again:
    """An iterable that starts anew each time."""

    def __init__(self, start: Callable[[], Iterator[Batch]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        return self.start()


class Ahead:
    """Goes through `items` in a thread, `depth` ahead of its reader, and hands on what `work` makes of each.

    The copy to the device has begun before the reader asks for it, even where the reader waits for the device in
    every step, as fp16's scale makes it do. What fails in the thread is raised by the reader.
    """

    def __init__(self, items: Iterator[Any], work: Callable[[Any], Any], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[Any, BaseException | None] | None] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items, work), name="batches ahead", daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[Any], work: Callable[[Any], Any]) -> None:
        try:
            for item in items:
                if not self._put((work(item), None)):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            self._put((None, error))

    def _put(self, thing: tuple[Any, BaseException | None] | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(thing, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Any]:
        while (got := self._queue.get()) is not None:
            made, error = got
            if error is not None:
                raise error
            yield made

    def stop(self) -> None:
        """End the thread; what it has ahead is dropped."""
        self._stopped.set()
        self._thread.join(timeout=10)


class DeviceFeed(Feed):
    """A feed for small data sets: every image is brought to the device once and stays there as uint8 pixels.

    Each is fetched by the workers when it is first needed; crop, flip and erasing are done on the device for the
    whole batch, with the same numbers and the same pixels as on the host.
    """

    def __init__(self, images: ImageBatches, device: torch.device, size: int, **options: Any) -> None:
        transform, split = images.transform, images.images.split
        super().__init__(ImageBatches(images.images), device, **options)
        self.transform, self.size = transform, size
        self.pixels = torch.empty((len(split), size, size, 3), dtype=torch.uint8, device=device)
        self.labels = torch.from_numpy(split.labels).to(device, copy=True)
        self.there = np.zeros(len(split), bool)

    def open(self, keys: Iterable[MicroBatchKey], *, persistent: bool = False) -> Iterable[Batch]:
        """Return the batches of keys, which can be gone through more than once; see `Feed.open`."""
        return _Again(lambda: self._batches(keys))

    def _batches(self, keys: Iterable[MicroBatchKey]) -> Iterator[Batch]:
        asked: deque[tuple[int, np.ndarray]] = deque()  # number of the key, rows that it is the first to need
        fetched = iter(super().open(self._missing(keys, asked))) if not self.there.all() else iter(())
        arriving = next(fetched, None)
        for number, key in enumerate(keys):
            while arriving is not None and asked and asked[0][0] <= number:
                rows = asked.popleft()[1]
                self._place(rows, *arriving)
                arriving = next(fetched, None)
            yield self._batch(key)

    def _missing(self, keys: Iterable[MicroBatchKey], asked: deque[tuple[int, np.ndarray]]) -> Iterator[MicroBatchKey]:
        requested = self.there.copy()
        for number, key in enumerate(keys):
            rows = np.unique(key.indices[~requested[key.indices]])
            if len(rows):
                requested[rows] = True
                asked.append((number, rows))
                yield MicroBatchKey(key.epoch, rows)
            if requested.all():
                return

    def _place(self, rows: np.ndarray, pixels: Tensor, labels: Tensor) -> None:
        places = torch.from_numpy(rows).to(self.device, non_blocking=True)
        self.pixels[places], self.labels[places] = pixels, labels
        self.there[rows] = True

    def _batch(self, key: MicroBatchKey) -> Batch:
        rows = torch.from_numpy(key.indices).to(self.device, non_blocking=True)
        labels = self.labels[rows]
        if self.transform is None:
            return self.pixels[rows], labels
        if self.device.type == "cpu":
            batch = torch.empty((len(rows), self.size, self.size, 3), dtype=torch.uint8)
            own = self.pixels.numpy()
            self.transform.write((own[index] for index in key.indices.tolist()), key, batch.numpy())
            return batch, labels
        return augment_on_device(self.pixels, rows, self.transform, key), labels


def _as_it_is(batch: Any) -> Any:
    return batch


class TrainLoader:
    """The training images in their order, step by step, from any step on."""

    def __init__(
        self,
        feed: Feed,
        order: Order,
        normalize: Normalize,
        mixing: Mixing | None,
        size_at: Callable[[int], int],
    ) -> None:
        self.feed, self.order, self.normalize, self.mixing = feed, order, normalize, mixing
        self.size_at = size_at  # epoch -> image size
        self.steps_per_epoch = order.steps_per_epoch

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for batches so far."""
        return self.feed.wait_seconds

    def state_dict(self) -> None:
        """Return nothing: the position is the step."""

    def load_state_dict(self, state: Any) -> None:
        """Do nothing: `steps` starts anywhere."""

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps from `start` to before `stop`; nothing of what comes before `start` is read."""
        batches = iter(self.feed.open(_Keys(self.order, start, stop)))
        for index in range(start, stop):
            plan = self.order.plan(index)
            number, size = len(plan.micro_batches), self.size_at(plan.epoch)
            prepared = (self._prepare(batch, index) for batch in islice(batches, number))
            yield Step(index, plan.num_images, number, prepared, (3, size, size))

    def _prepare(self, batch: Batch, step: int) -> Batch:
        images, labels = self.normalize(batch[0]), batch[1]
        return self.mixing(images, labels, step) if self.mixing else (images, labels)


@dataclass(frozen=True)
class _Keys:
    """The keys of the micro-batches of some steps, in order; can be gone through more than once."""

    order: Order
    start: int
    stop: int

    def __iter__(self) -> Iterator[MicroBatchKey]:
        for step in range(self.start, self.stop):
            yield from self.order.plan(step).micro_batches


class EvalLoader:
    """This process's share of a split, each image once: batches of `images` and `labels` on the device."""

    def __init__(
        self,
        feed: Feed,
        num_images: int,
        batch_size: int,
        normalize: Normalize,
        num_processes: int = 1,
        process_index: int = 0,
        name: str = "evaluation split",
    ) -> None:
        self.name = name
        share = process_share(num_images, num_processes, process_index)
        pieces = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        keys = [MicroBatchKey(0, np.arange(piece.start, piece.stop)) for piece in pieces]
        self.num_images, self.normalize, self.feed = num_images, normalize, feed
        self._batches = feed.open(keys, persistent=True)

    def __iter__(self) -> Iterator[Batch]:
        for pixels, labels in self._batches:
            yield self.normalize(pixels), labels


class OwnLoader:
    """Steps from the user's own loader: each of its batches is this process's share of one step.

    A batch is (images, targets) or a mapping with ``pixel_values`` and ``labels``. Every process's loader must give
    equally many batches; they may differ in size, and be empty. Resuming in the middle asks the loader for
    ``load_state_dict`` (as torchdata's StatefulDataLoader has it).
    """

    def __init__(
        self,
        loader: Any,
        device: torch.device,
        *,
        accumulation_steps: int = 1,
        join_single: bool = False,
        total: Callable[[int], int] | None = None,
    ) -> None:
        self.loader, self.device, self.accumulation_steps = loader, device, accumulation_steps
        self.join_single, self.total = join_single, total
        self.wait_seconds = 0.0
        try:
            self.steps_per_epoch = len(loader)
        except TypeError:
            raise DataError("train_loader has no length; give it a __len__: the number of steps in an epoch") from None
        if not self.steps_per_epoch:
            raise DataError("train_loader is empty; give it at least one batch")

    @classmethod
    def wrap(cls, loader: Any, accelerator: Accelerator, accumulation_steps: int, *, join_single: bool) -> Any:
        """Return a loader with `steps`: the given one if it has them, else an OwnLoader around it."""
        if hasattr(loader, "steps"):
            return loader

        def total(own: int) -> int:
            count = torch.tensor(own, device=accelerator.device)
            return int(accelerator.reduce(count, reduction="sum"))

        several = accelerator.num_processes > 1
        return cls(
            loader,
            accelerator.device,
            accumulation_steps=accumulation_steps,
            join_single=join_single,
            total=total if several else None,
        )

    def state_dict(self) -> Any:
        """Return the loader's own position, None if it does not know it."""
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None

    def load_state_dict(self, state: Any) -> None:
        """Go to a position that `state_dict` gave; RunError if the loader can't."""
        if state is None or not hasattr(self.loader, "load_state_dict"):
            raise RunError(
                "can't resume: train_loader has no state_dict and load_state_dict, so its position is not known; "
                "use torchdata's StatefulDataLoader, or Trainer.from_recipe"
            )
        self.loader.load_state_dict(state)

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps from `start` to before `stop`, going through the loader once an epoch."""
        batches: Iterator[Any] = iter(())
        for index in range(start, stop):
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                batches = self._epoch(index // self.steps_per_epoch)
                batch = next(batches, None)
            if batch is None:  # a loader restored at the end of an epoch has nothing left of it
                batches = self._epoch(index // self.steps_per_epoch)
                batch = next(batches, None)
            if batch is None:
                raise DataError(f"train_loader gave no batch for step {index}")
            images, targets = to_device(batch, self.device)
            self.wait_seconds += time.perf_counter() - began
            yield self._step(index, images, targets)

    def _epoch(self, epoch: int) -> Iterator[Any]:
        sampler = getattr(self.loader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        return iter(self.loader)

    def _step(self, index: int, images: Tensor, targets: Tensor) -> Step:
        number = len(images)
        total = self.total(number) if self.total else number
        shape = tuple(images.shape[1:])
        if number and self.accumulation_steps == 1:
            return Step(index, total, 1, iter(((images, targets),)), shape)
        pairs = (number + 1) // 2
        size = 2 * max(1, -(-pairs // self.accumulation_steps))
        pieces = cut_micro_batches(range(number), size, join_single=self.join_single)
        batches = ((images[p.start : p.stop], targets[p.start : p.stop]) for p in pieces)
        return Step(index, total, len(pieces), batches, shape)


class OwnEvalLoader:
    """The user's own evaluation loader, with its batches moved to the device."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.name = getattr(loader, "name", "evaluation split")

    @classmethod
    def wrap(cls, loader: Any, device: torch.device) -> Any:
        """Return a loader whose batches are on the device; None stays None."""
        return loader if loader is None or isinstance(loader, EvalLoader | OwnEvalLoader) else cls(loader, device)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield to_device(batch, self.device)


def to_device(batch: Any, device: torch.device) -> Batch:
    """Return (images, targets) on the device, of such a pair or of a mapping with pixel_values and labels."""
    images, targets = (batch["pixel_values"], batch["labels"]) if isinstance(batch, dict) else batch
    if images.device == device:
        return images, targets
    return images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
