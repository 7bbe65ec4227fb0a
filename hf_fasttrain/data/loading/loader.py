"""Loaders of our own data sets: training images step by step, evaluation images each once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_fasttrain.data.loading.batch import Mixing, Normalize
from hf_fasttrain.data.loading.prefetch import Batch, Feed
from hf_fasttrain.data.loading.sampler import MicroBatchKey, Order, process_share

Timer = Callable[[str], AbstractContextManager[Any]]  # name of a phase -> what stands around its work
_NOTHING = nullcontext()


def no_timer(phase: str) -> AbstractContextManager[Any]:
    """Time nothing."""
    return _NOTHING


@dataclass
class Step:
    """One optimizer step as the trainer sees it: this process's micro-batches, on the device."""

    index: int  # counted from 0 over the whole training
    num_images: int  # of all processes together
    num_micro_batches: int  # of this process; 0 if the step has too few images for it
    micro_batches: MicroBatches  # images (B, 3, H, W), targets
    image_shape: tuple[int, ...]  # of one image


class MicroBatches:
    """The micro-batches of a step, which can be gone through again: each `iter` begins anew.

    The first pass takes what was made ahead. Nothing is kept for a second one, since accumulation is there to save
    memory: `make` makes the same micro-batches once more.
    """

    def __init__(self, ahead: Iterator[Batch], make: Callable[[], Iterator[Batch]]) -> None:
        self._pass, self._make, self._has_begun = ahead, make, False

    def __iter__(self) -> Iterator[Batch]:
        if self._has_begun:
            self._pass = self._make()
        self._has_begun = True
        return self._pass

    def __next__(self) -> Batch:
        self._has_begun = True
        return next(self._pass)

    def peek(self) -> Batch | None:
        """Return the first micro-batch, which stays the one that comes next; None if there is none."""
        first = next(self._pass, None)
        if first is not None:
            self._pass = _put_in_front([first], self._pass)
        return first

    def close(self) -> None:
        """Let go of what was made ahead."""
        if isinstance(self._pass, Generator):
            self._pass.close()


def _put_in_front(first: list[Batch], rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first.pop()  # and don't hold it
    yield from rest


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
        self.micro_batch_size = order.micro_batch_size  # 1: pairs are made together, and used one by one
        self.wish = f"micro_batch_size {order.micro_batch_size}"
        self.timer: Timer = no_timer  # of the phases wait and copy

    def cut_to(self, micro_batch_size: int) -> None:
        """Make micro-batches of this size (even, or 1) from the next `steps` or `again` on."""
        self.micro_batch_size = micro_batch_size
        self.order = replace(self.order, micro_batch_size=max(2, micro_batch_size))

    def again(self, index: int, stop: int) -> Iterator[Step]:
        """Yield a step anew, and those after it: the same images, in micro-batches of the present size."""
        return self.steps(index, stop)

    def image_indices(self, step: int) -> np.ndarray:
        """Return which images of the split a step has on all processes, in their order."""
        (whole,) = (
            replace(self.order, num_processes=1, process_index=0, micro_batch_size=2 * self.order.batch_size)
            .plan(step)
            .micro_batches
        )
        return whole.indices

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for batches so far."""
        return self.feed.wait_seconds

    def state_dict(self) -> None:
        """Return nothing: the position is the step, and no random state matters."""

    def load_state_dict(self, state: Any) -> None:
        """Do nothing: `steps` starts anywhere."""

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps from `start` to before `stop`; nothing of what comes before `start` is read."""
        largest = min(self.order.micro_batch_size + 1, self.order.batch_size)  # a single last image may join
        batches = iter(self.feed.open(_Keys(self.order, start, stop), largest))
        for index in range(start, stop):
            plan = self.order.plan(index)
            sizes, size = [len(key.indices) for key in plan.micro_batches], self.size_at(plan.epoch)
            number = sum(sizes) if self.micro_batch_size == 1 else len(sizes)
            make = functools.partial(self._make_again, self.order, sizes, index)
            micro_batches = MicroBatches(self._micro_batches(batches, sizes, index), make)
            yield Step(index, plan.num_images, number, micro_batches, (3, size, size))

    def _make_again(self, order: Order, sizes: list[int], step: int) -> Iterator[Batch]:
        """Yield a step's micro-batches, made in this process: the workers are ahead."""
        feed = copy.copy(self.feed)
        feed.workers, feed.report = 0, None
        return self._micro_batches(iter(feed.open(_Keys(order, step, step + 1), max(sizes, default=0))), sizes, step)

    def _micro_batches(self, batches: Iterator[Batch], sizes: list[int], step: int) -> Iterator[Batch]:
        for size in sizes:
            with self.timer("wait"):
                batch = next(batches)
            with self.timer("copy"):
                images, targets = self._prepare(batch, step)
            del batch  # its memory may be used for the next one
            if self.micro_batch_size > 1:
                yield images, targets
            else:
                yield from ((images[i : i + 1], targets[i : i + 1]) for i in range(size))

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
        self.rows = share  # which images of the split this process has, in their order
        self.num_images, self.normalize, self.feed = num_images, normalize, feed
        self.release_memory = getattr(feed, "release_memory", lambda: 0)  # bytes of a GPU that its images are kept in
        self._batches = feed.open(keys, batch_size, persistent=True)

    def __iter__(self) -> Iterator[Batch]:
        for pixels, labels in self._batches:
            yield self.normalize(pixels), labels

    def close(self) -> None:
        """End the loader's workers until it is gone through again."""
        if hasattr(self._batches, "close"):
            self._batches.close()
