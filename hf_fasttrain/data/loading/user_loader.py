"""Adapters for loaders that the user passes in: training with gradient accumulation, and evaluation."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.loading import trees
from hf_fasttrain.data.loading.loader import EvalLoader, MicroBatches, Step
from hf_fasttrain.data.loading.prefetch import Batch
from hf_fasttrain.data.loading.sampler import cut_micro_batches
from hf_fasttrain.data.loading.trees import Tree, first_leaf, num_images
from hf_fasttrain.data.loading.worker_deaths import batches_of_user
from hf_fasttrain.utils.errors import DataError, RunError


class UserLoader:
    """Steps from a loader that the user passes in: each of its batches is this process's share of one step.

    A batch is (images, targets) or a mapping with ``pixel_values`` and ``labels``; images and targets are tensors, or
    tuples, lists and mappings of them. The loaders of all processes must yield the same number of batches, which may
    differ in size or be empty. Resuming within an epoch needs a loader
    with ``load_state_dict``, such as torchdata's StatefulDataLoader.
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
        self.micro_batch_size = 0  # the largest so far
        self.size_setting = f"accumulation_steps {accumulation_steps}"
        self._cut: int | None = None
        self._knows_form = False
        self._batches: Iterator[Any] = iter(())
        self._current: Batch | None = None
        self._next_step = 0  # the step of the next batch
        try:
            self.steps_per_epoch = len(loader)
        except TypeError:
            raise DataError("train_loader has no length; give it a __len__: the number of steps in an epoch") from None
        if not self.steps_per_epoch:
            raise DataError("train_loader is empty; give it at least one batch")

    @classmethod
    def wrap(
        cls,
        loader: Any,
        device: torch.device,
        accumulation_steps: int,
        *,
        join_single: bool,
        total: Callable[[int], int] | None,
    ) -> Any:
        """Return the loader itself if it has `steps`, else a UserLoader around it.

        `total` sums a number over all processes without waiting for the device; None with one process.
        """
        if hasattr(loader, "steps"):
            return loader
        return cls(loader, device, accumulation_steps=accumulation_steps, join_single=join_single, total=total)

    def state_dict(self) -> Any:
        """Return the loader's state and the Python and numpy random states, None if the loader has no state_dict.

        torch's generator is not included: every step seeds it.
        """
        if not hasattr(self.loader, "state_dict"):
            return None
        return {"loader": self.loader.state_dict(), "python": random.getstate(), "numpy": np.random.get_state()}

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned; RunError if the loader has no load_state_dict."""
        if state is None or not hasattr(self.loader, "load_state_dict"):
            raise RunError(
                "can't resume: train_loader has no state_dict and load_state_dict, so its position is not known; "
                "use torchdata's StatefulDataLoader, or Trainer.from_recipe"
            )
        self.loader.load_state_dict(state["loader"])
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps from `start` to before `stop`, iterating over the loader once per epoch."""
        if start == self._next_step - 1 and self._current is not None:
            return self.retry(start, stop)  # an exception has ended the loop before this batch was trained on
        if start != self._next_step:
            self._batches = iter(())
        return self._steps(start, stop)

    def retry(self, index: int, stop: int) -> Iterator[Step]:
        """Yield the current step once more and those after it: the same batch, in micro-batches of the current size."""
        assert self._current is not None
        yield self._step(index, *self._current)
        yield from self._steps(index + 1, stop)

    def cut_to(self, micro_batch_size: int) -> None:
        """Limit the size of micro-batches from now on."""
        self.micro_batch_size = self._cut = micro_batch_size

    def image_indices(self, step: int) -> None:
        """Return None: which images a step has is known to the loader only."""

    def _steps(self, start: int, stop: int) -> Iterator[Step]:
        for index in range(start, stop):
            start_time = time.perf_counter()
            batch = next(self._batches, None)
            if batch is None:
                batch = self._start_epoch(index // self.steps_per_epoch)
            if batch is None:  # a loader restored at the end of an epoch yields nothing
                batch = self._start_epoch(index // self.steps_per_epoch)
            if batch is None:
                raise DataError(f"train_loader gave no batch for step {index}")
            self._current, self._next_step = to_device(batch, self.device), index + 1
            self._require_rows(*self._current)
            self.wait_seconds += time.perf_counter() - start_time
            yield self._step(index, *self._current)

    def _require_rows(self, images: Tree, targets: Tree) -> None:
        """Raise DataError, at the first batch, for what can't be cut into micro-batches."""
        if not self._knows_form:
            trees.require_equal_lengths(num_images(images), images=images, targets=targets)
            self._knows_form = True

    def _start_epoch(self, epoch: int) -> Any:
        sampler = getattr(self.loader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        self._batches = batches_of_user(self.loader, "train_loader")
        return next(self._batches, None)

    def _step(self, index: int, images: Tree, targets: Tree) -> Step:
        number = num_images(images)
        total = self.total(number) if self.total else number
        shape = tuple(first_leaf(images).shape[1:])
        pairs = (number + 1) // 2
        size = self._cut or 2 * max(1, -(-pairs // self.accumulation_steps))
        self.micro_batch_size = max(self.micro_batch_size, size) if self._cut is None else size
        if number and self.accumulation_steps == 1 and self._cut is None:
            whole = ((images, targets),)
            return Step(index, total, 1, MicroBatches(iter(whole), whole.__iter__), shape)
        sizes = _sizes(number, size, self.join_single)

        def make() -> Iterator[Batch]:
            return zip(trees.cut(images, sizes), trees.cut(targets, sizes), strict=True)

        like = None if isinstance(images, Tensor) else images
        return Step(index, total, len(sizes), MicroBatches(make(), make), shape, like)


@functools.lru_cache(maxsize=100)  # computing them takes 4 us of a step
def _sizes(number: int, size: int, join_single: bool) -> tuple[int, ...]:
    return tuple(len(part) for part in cut_micro_batches(range(number), size, join_single=join_single))


class UserEvalLoader:
    """An evaluation loader that the user passes in, with its batches moved to the device."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.name = getattr(loader, "name", "evaluation split")

    @classmethod
    def wrap(cls, loader: Any, device: torch.device) -> Any:
        """Return a loader that yields batches on the device; None for None."""
        return loader if loader is None or isinstance(loader, EvalLoader | UserEvalLoader) else cls(loader, device)

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches_of_user(self.loader, self.name):
            yield to_device(batch, self.device)


def to_device(batch: Any, device: torch.device) -> Batch:
    """Move a pair (images, targets), or a mapping with pixel_values and labels, to the device; return the pair."""
    images, targets = (batch["pixel_values"], batch["labels"]) if isinstance(batch, dict) else batch
    return trees.to_device(images, device), trees.to_device(targets, device)
