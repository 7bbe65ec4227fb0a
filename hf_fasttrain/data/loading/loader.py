"""Loaders of the built-in data pipeline: training images step by step, each evaluation image once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_fasttrain.data.loading.batch import Mixing, Normalize
from hf_fasttrain.data.loading.prefetch import Batch, Prefetcher
from hf_fasttrain.data.loading.sampler import MicroBatchKey, SamplingPlan, StepPlan, process_share
from hf_fasttrain.data.source.dataset import Split

Timer = Callable[[str], AbstractContextManager[Any]]  # name of a phase -> context in which its work runs
_NULL_CONTEXT = nullcontext()
FEATURE_SHAPE = (0,)  # which no images have


def no_timer(phase: str) -> AbstractContextManager[Any]:
    """Time nothing."""
    return _NULL_CONTEXT


@dataclass
class Step:
    """The data of one optimizer step: this process's micro-batches, on the device."""

    index: int  # from 0, over the whole training
    num_images: int  # over all processes
    num_micro_batches: int  # of this process; 0 if the step has too few images for it
    micro_batches: MicroBatches  # images (B, 3, H, W), with several views (B, V, 3, H, W); targets
    image_shape: tuple[int, ...]  # of one image; FEATURE_SHAPE: features (B, C) instead of images
    like: Any = None  # images that are not one tensor: a tree of their form, for a process that has none


class MicroBatches:
    """The micro-batches of a step; each `iter` starts from the first one again.

    The first pass consumes the prefetched batches. They are not stored for a second pass, because gradient
    accumulation exists to save memory: `make` builds the same micro-batches once more.
    """

    def __init__(self, ahead: Iterator[Batch], make: Callable[[], Iterator[Batch]]) -> None:
        self._pass, self._make, self._is_started = ahead, make, False

    def retain(self) -> None:
        """Store the micro-batches, before the first pass, for the passes that follow: building them again takes longer.

        An optimizer that needs the gradients of a step more than once can afford that: its activations are larger.
        """
        batches = list(self)
        self._pass, self._make = iter(batches), batches.__iter__

    def __iter__(self) -> Iterator[Batch]:
        if self._is_started:
            self._pass = self._make()
        self._is_started = True
        return self._pass

    def __next__(self) -> Batch:
        self._is_started = True
        return next(self._pass)

    def peek(self) -> Batch | None:
        """Return the next micro-batch without consuming it; None if there is none."""
        first = next(self._pass, None)
        if first is not None:
            self._pass = _prepend([first], self._pass)
        return first

    def close(self) -> None:
        """Release the prefetched batches."""
        if isinstance(self._pass, Generator):
            self._pass.close()


def _prepend(first: list[Batch], rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first.pop()  # without holding a reference
    yield from rest


class TrainLoader:
    """The training images of any range of steps, step by step.

    With `views` above 1 the images are (B, V, 3, H, W): each is augmented V times, independently.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        sampling_plan: SamplingPlan,
        normalize: Normalize,
        mixing: Mixing | None,
        size_at: Callable[[int], int],
        views: int = 1,
    ) -> None:
        self.prefetcher, self.sampling_plan, self.normalize, self.mixing = prefetcher, sampling_plan, normalize, mixing
        self.size_at, self.views = size_at, views  # epoch -> image size
        self.steps_per_epoch = sampling_plan.steps_per_epoch
        self.micro_batch_size = sampling_plan.micro_batch_size  # 1: images are loaded in pairs and used one by one
        self.size_setting = f"micro_batch_size {sampling_plan.micro_batch_size}"
        self.timer: Timer = no_timer  # of the phases wait and copy

    def cut_to(self, micro_batch_size: int) -> None:
        """Set the micro-batch size (even, or 1); takes effect at the next `steps` or `retry`."""
        self.micro_batch_size = micro_batch_size
        self.sampling_plan = replace(self.sampling_plan, micro_batch_size=max(2, micro_batch_size))

    def retry(self, index: int, stop: int) -> Iterator[Step]:
        """Yield a step once more and those after it: the same images, in micro-batches of the current size."""
        return self.steps(index, stop)

    def image_indices(self, step: int) -> np.ndarray:
        """Return the indices of a step's images in the split, over all processes and in order."""
        (key,) = (
            replace(
                self.sampling_plan, num_processes=1, process_index=0, micro_batch_size=2 * self.sampling_plan.batch_size
            )
            .plan(step)
            .micro_batches
        )
        return key.indices

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for batches since the loader was built."""
        return self.prefetcher.wait_seconds

    def state_dict(self) -> None:
        """Return None: the step is the whole state; no random state is involved."""

    def load_state_dict(self, state: Any) -> None:
        """Do nothing: `steps` can start at any step."""

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps from `start` to before `stop`; images before `start` are not read."""
        largest = min(
            self.sampling_plan.micro_batch_size + 1, self.sampling_plan.batch_size
        )  # a single last image may join
        keys = _Keys(self.sampling_plan, start, stop, self.views)
        batches = iter(self.prefetcher.open(keys, largest * self.views))
        for index in range(start, stop):
            plan = self.sampling_plan.plan(index)
            sizes, size = [len(key.indices) for key in plan.micro_batches], self.size_at(plan.epoch)
            number = sum(sizes) if self.micro_batch_size == 1 else len(sizes)
            make = functools.partial(self._reload, self.sampling_plan, sizes, plan)
            micro_batches = MicroBatches(self._micro_batches(batches, sizes, plan), make)
            shape = (3, size, size) if self.views == 1 else (self.views, 3, size, size)
            yield Step(index, plan.num_images, number, micro_batches, shape)

    def _reload(self, sampling_plan: SamplingPlan, sizes: list[int], plan: StepPlan) -> Iterator[Batch]:
        """Yield a step's micro-batches, loaded in this process: the workers are busy with later steps."""
        prefetcher = copy.copy(self.prefetcher)
        prefetcher.workers, prefetcher.report = 0, None
        keys = _Keys(sampling_plan, plan.step, plan.step + 1, self.views)
        return self._micro_batches(iter(prefetcher.open(keys, max(sizes, default=0) * self.views)), sizes, plan)

    def _micro_batches(self, batches: Iterator[Batch], sizes: list[int], plan: StepPlan) -> Iterator[Batch]:
        processes, index = self.sampling_plan.num_processes, self.sampling_plan.process_index
        first = process_share(plan.num_images, processes, index).start  # position in the step
        for size in sizes:
            with self.timer("wait"):
                batch = next(batches)
            with self.timer("copy"):
                images, targets = self._prepare(batch, plan, first)
            del batch  # so that its memory can be reused for the next one
            first += size
            if self.micro_batch_size > 1:
                yield images, targets
            else:
                yield from ((images[i : i + 1], targets[i : i + 1]) for i in range(size))

    def _prepare(self, batch: Batch, plan: StepPlan, first: int) -> Batch:
        images, labels = self.normalize(batch[0]), batch[1]
        if self.views > 1:  # all views of an image are mixed alike, as its further channels
            images, labels = images.unflatten(0, (-1, self.views)).flatten(1, 2), labels[:: self.views]
        if self.mixing:
            images, labels = self.mixing(images, labels, plan.step, first, plan.num_images)
        return (images if self.views == 1 else images.unflatten(1, (self.views, -1))), labels


@dataclass(frozen=True)
class _Keys:
    """The keys of the micro-batches of a range of steps, in order; can be iterated more than once."""

    sampling_plan: SamplingPlan
    start: int
    stop: int
    views: int

    def __iter__(self) -> Iterator[MicroBatchKey]:
        for step in range(self.start, self.stop):
            yield from (key.in_views(self.views) for key in self.sampling_plan.plan(step).micro_batches)


class EvalLoader:
    """This process's share of a split, each image once: batches of `images` and `labels` on the device."""

    def __init__(
        self,
        prefetcher: Prefetcher,
        num_images: int,
        batch_size: int,
        normalize: Normalize,
        num_processes: int = 1,
        process_index: int = 0,
        name: str = "evaluation split",
    ) -> None:
        self.name = name
        share = process_share(num_images, num_processes, process_index)
        batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        keys = [MicroBatchKey(0, np.arange(batch.start, batch.stop)) for batch in batches]
        self.rows = share  # indices of this process's images in the split, in order
        self.num_images, self.normalize, self.prefetcher = num_images, normalize, prefetcher
        self.split: Split | None = None  # whose images these are
        self.release_memory = getattr(prefetcher, "release_memory", lambda: 0)  # returns the bytes freed on the GPU
        self._batches = prefetcher.open(keys, batch_size, persistent=True)
        self.replaced: Callable[[Callable[[], Iterator[Batch]]], Iterator[Batch]] = lambda images: images()

    def __iter__(self) -> Iterator[Batch]:
        return self.replaced(self._images)

    def _images(self) -> Iterator[Batch]:
        for pixels, labels in self._batches:
            yield self.normalize(pixels), labels

    def sample(self, number: int) -> Batch | None:
        """Return up to `number` of this process's images and their labels, read in this process; None if it has none.

        Batches that are being prefetched are not touched.
        """
        rows = np.arange(self.rows.start, min(self.rows.stop, self.rows.start + number))
        if not len(rows):
            return None
        batch, device = self.prefetcher.images.make(MicroBatchKey(0, rows), None), self.prefetcher.device
        return self.normalize(batch.pixels.to(device)), batch.labels.to(device)

    def close(self) -> None:
        """Stop the workers; they start again at the next iteration."""
        if hasattr(self._batches, "close"):
            self._batches.close()
