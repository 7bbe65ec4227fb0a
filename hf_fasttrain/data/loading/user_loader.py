"""Adapters for loaders that the user passes in: training with gradient accumulation, and evaluation."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.loading import trees
from hf_fasttrain.data.loading.loader import EvalLoader, MicroBatches, Step, TrainLoader
from hf_fasttrain.data.loading.prefetch import Batch
from hf_fasttrain.data.loading.sampler import cut_micro_batches
from hf_fasttrain.data.loading.trees import Tree, first_leaf, num_images
from hf_fasttrain.data.loading.user_batch import images_and_targets
from hf_fasttrain.data.loading.worker_deaths import iterate_user_loader
from hf_fasttrain.utils.errors import DataError, RunError
from hf_fasttrain.utils.private_apis import shut_down_workers, would_start_persistent_workers

NO_POSITION = (
    "train_loader does not store its position (state_dict and load_state_dict; torchdata's StatefulDataLoader has them)"
)


class UserLoader:
    """Steps from a loader that the user passes in: each of its batches is this process's share of one step.

    A batch is (images, targets), or a mapping with one entry of images and one of labels (see `images_and_targets`);
    images and targets are tensors, or tuples, lists and mappings of them. The loaders of all processes must yield the
    same number of batches, which may differ in size or be empty. Any loader can be resumed at the end of an epoch:
    ``set_epoch`` is called on it and on its sampler. To resume within an epoch, it needs ``state_dict`` and
    ``load_state_dict``, like torchdata's StatefulDataLoader.
    """

    def __init__(
        self,
        loader: Any,
        device: torch.device,
        *,
        accumulation_steps: int = 1,
        join_single: bool = False,
        total: Callable[[int], int] | None = None,
        begin_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        self.loader, self.device, self.accumulation_steps = loader, device, accumulation_steps
        self.begin_epoch = begin_epoch
        self.join_single, self.total = join_single, total
        self.wait_seconds = 0.0
        self.micro_batch_size = 0  # the largest so far
        self.size_setting = f"accumulation_steps {accumulation_steps}"
        self._size_limit: int | None = None
        self._is_checked = False
        self._batches: Iterator[Any] = iter(())
        self._current: Batch | None = None
        self._next_step = 0  # the step of the next batch
        self._num_batches = 0  # consumed in the current pass over the loader
        self._must_reopen = False  # whether the pass must be opened again and advanced to `_num_batches`
        self._loader_state: Any = None  # the loader's state at that point, if it has one
        self._is_restored = False  # whether a state was loaded since the last step
        self._start_states: dict[str, Any] = {}  # states of random generators at the start of the pass
        try:
            self.steps_per_epoch = len(loader)
        except TypeError:
            raise DataError("train_loader has no length; define __len__: the number of steps per epoch") from None
        if not self.steps_per_epoch:
            raise DataError("train_loader is empty; it needs at least one batch")

    @classmethod
    def wrap(
        cls,
        loader: Any,
        device: torch.device,
        accumulation_steps: int,
        *,
        join_single: bool,
        total: Callable[[int], int] | None,
        begin_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> Any:
        """Return the loader itself if it already yields steps, else a UserLoader around it.

        `total` sums a number over all processes without waiting for the device; None with one process. `begin_epoch`
        is called with the epoch's number before each pass over the loader.
        """
        if isinstance(loader, TrainLoader | UserLoader):
            return loader
        options: dict[str, Any] = {"join_single": join_single, "total": total, "begin_epoch": begin_epoch}
        return cls(loader, device, accumulation_steps=accumulation_steps, **options)

    @property
    def keeps_position(self) -> bool:
        """Whether the loader can be restored within an epoch: by its own state_dict and load_state_dict."""
        return hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict")

    @property
    def can_resume_here(self) -> bool:
        """Whether training could continue from a checkpoint of the current step."""
        return self.keeps_position or self.is_between_epochs

    @property
    def is_between_epochs(self) -> bool:
        """Whether the current step is the last one of its epoch."""
        return self._num_batches % self.steps_per_epoch == 0

    def can_resume(self, state: Any, *, same_processes: bool = True) -> bool:
        """Return whether training can continue from a saved state: one with a position, or at the end of an epoch.

        Positions are per process; with another number of processes, training can only continue at an epoch's end.
        """
        if not isinstance(state, dict):
            return False  # from an older version, for a loader without a position
        return _is_end_of_epoch(state) or (same_processes and self.keeps_position and state["loader"] is not None)

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state, its position in the epoch, and the states of random generators.

        These are Python's, numpy's and the loader's generators. torch's is not included: every step and every epoch
        seeds it.
        """
        loader_state = self._loader_state
        if loader_state is None and self.keeps_position:
            loader_state = self.loader.state_dict()
        elif loader_state is None and self._num_batches == self.steps_per_epoch:
            batch = next(self._batches, None)  # a sampler draws from its generator when it ends
            self._batches = self._batches if batch is None else itertools.chain([batch], self._batches)
        position = {"passed": self._num_batches, "steps_per_epoch": self.steps_per_epoch}
        return {"loader": loader_state, **position, **_random_state(self.loader)}

    def load_state_dict(self, state: Any, *, same_processes: bool = True) -> None:
        """Restore a state of `state_dict`. Raises RunError if training can't continue from it."""
        if not self.can_resume(state, same_processes=same_processes):
            reason = "its position was saved by another number of processes" if not same_processes else NO_POSITION
            raise RunError(f"can't resume within an epoch: {reason}")
        self._batches, self._current, self._is_restored = iter(()), None, True
        self._must_reopen, self._loader_state, self._num_batches = False, None, 0
        if not same_processes:
            return
        _set_random_state(self.loader, state)
        if self.keeps_position and state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])
            self._must_reopen, self._loader_state, self._num_batches = True, state["loader"], state.get("passed", 0)

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps from `start` to before `stop`, iterating over the loader once per epoch."""
        if start == self._next_step - 1 and self._current is not None:
            return self.retry(start, stop)  # an exception ended the loop before this batch was trained on
        if start != self._next_step and not self._is_restored:
            self._batches, self._must_reopen, self._loader_state, self._num_batches = iter(()), False, None, 0
        self._is_restored = False
        return self._steps(start, stop)

    def retry(self, index: int, stop: int) -> Iterator[Step]:
        """Yield the current step once more and those after it: the same batch, in micro-batches of the current size."""
        assert self._current is not None
        yield self._step(index, *self._current)
        yield from self._steps(index + 1, stop)

    def cut_to(self, micro_batch_size: int) -> None:
        """Limit the size of micro-batches from now on."""
        self.micro_batch_size = self._size_limit = micro_batch_size

    def image_indices(self, step: int) -> None:
        """Return None: only the loader knows which images a step has."""

    def close(self) -> None:
        """End the loader's processes. Later steps continue from the same position in the epoch.

        A loader that does not store its position is iterated again up to there, in the same order.
        """
        if not getattr(self.loader, "num_workers", 0):
            return
        if self._num_batches % self.steps_per_epoch and not self._must_reopen:
            self._loader_state = self.loader.state_dict() if self.keeps_position else None
        self._must_reopen = True
        if isinstance(self._batches, Generator):
            self._batches.close()
        shut_down_workers(self.loader)

    def _steps(self, start: int, stop: int) -> Iterator[Step]:
        for index in range(start, stop):
            start_time = time.perf_counter()
            batch = self._next_batch(index // self.steps_per_epoch)
            if batch is None:
                raise DataError(f"train_loader yielded no batch for step {index}")
            self._current, self._next_step = to_device(batch, self.device, "train_loader"), index + 1
            self._require_rows(*self._current)
            self.wait_seconds += time.perf_counter() - start_time
            yield self._step(index, *self._current)

    def _require_rows(self, images: Tree, targets: Tree) -> None:
        """Raise DataError if the first batch can't be split into micro-batches."""
        if not self._is_checked:
            trees.require_equal_lengths(num_images(images), images=images, targets=targets)
            self._is_checked = True

    def _next_batch(self, epoch: int) -> Any:
        try:
            if self._must_reopen:
                self._reopen(epoch)
            batch = next(self._batches, None)
            for _ in range(2 if batch is None else 0):  # a loader restored at the end of an epoch yields nothing
                self._open(epoch)
                batch = next(self._batches, None)
                if batch is not None:
                    break
        except BaseException:
            self._must_reopen = True  # the exception has ended its iterator
            raise
        self._num_batches += 1
        return batch

    def _open(self, epoch: int) -> None:
        """Start a pass over the loader."""
        part: Any
        for part in (self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if epoch and not self.keeps_position and would_start_persistent_workers(self.loader):
            states = _random_state(self.loader)
            iter(self.loader)  # they draw a seed once, which would change the epoch's order
            _set_random_state(self.loader, states)
        self.begin_epoch(epoch)
        self._start_states = {"torch": torch.get_rng_state(), **_random_state(self.loader)}
        self._batches, self._num_batches = iterate_user_loader(self.loader, "train_loader"), 0

    def _reopen(self, epoch: int) -> None:
        """Start an interrupted pass again, and advance to its position."""
        state, num_batches, self._must_reopen, self._loader_state = self._loader_state, self._num_batches, False, None
        self._batches = iter(())
        if num_batches % self.steps_per_epoch == 0:
            return  # the next epoch starts
        if state is None and self.keeps_position:
            state = self.loader.state_dict()  # an exception ended the pass
        if state is not None:
            self.loader.load_state_dict(state)
            self._open(epoch)
        else:
            states = _random_state(self.loader)
            torch.set_rng_state(self._start_states["torch"])
            _set_random_state(self.loader, self._start_states)
            self._open(epoch)
            for _ in range(num_batches):
                next(self._batches, None)
            _set_random_state(self.loader, {**states, "generators": []})
        self._num_batches = num_batches

    def _step(self, index: int, images: Tree, targets: Tree) -> Step:
        number = num_images(images)
        total = self.total(number) if self.total else number
        shape = tuple((images if isinstance(images, Tensor) else first_leaf(images)).shape[1:])
        pairs = (number + 1) // 2
        size = self._size_limit or 2 * max(1, -(-pairs // self.accumulation_steps))
        self.micro_batch_size = max(self.micro_batch_size, size) if self._size_limit is None else size
        if number and self.accumulation_steps == 1 and self._size_limit is None:
            batches = ((images, targets),)
            return Step(index, total, 1, MicroBatches(iter(batches), batches.__iter__), shape)
        sizes = _sizes(number, size, self.join_single)

        def make() -> Iterator[Batch]:
            return zip(trees.cut(images, sizes), trees.cut(targets, sizes), strict=True)

        like = None if isinstance(images, Tensor) else images
        return Step(index, total, len(sizes), MicroBatches(make(), make), shape, like)


def _is_end_of_epoch(state: Mapping[str, Any]) -> bool:
    return "passed" in state and state["passed"] % state["steps_per_epoch"] == 0


def _generators(loader: Any) -> list[torch.Generator]:
    """Return a loader's own random generators, each once."""
    generators = (getattr(part, "generator", None) for part in (loader, getattr(loader, "sampler", None)))
    return list(
        {id(generator): generator for generator in generators if isinstance(generator, torch.Generator)}.values()
    )


def _random_state(loader: Any) -> dict[str, Any]:
    generators = [generator.get_state() for generator in _generators(loader)]
    return {"python": random.getstate(), "numpy": np.random.get_state(), "generators": generators}


def _set_random_state(loader: Any, state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    for generator, saved in zip(_generators(loader), state.get("generators", ()), strict=False):
        generator.set_state(saved)


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
        for batch in iterate_user_loader(self.loader, self.name):
            yield to_device(batch, self.device, "eval_loader")

    def close(self) -> None:
        """End the loader's processes; they start again at the next iteration."""
        shut_down_workers(self.loader)

    @property
    def is_consumed_once(self) -> bool:
        """Whether the loader is an iterator, which yields its images once."""
        return isinstance(self.loader, Iterator)

    def sample(self, number: int) -> Batch | None:
        """Return up to `number` images of the first batch and their labels, on the device; None if there are none."""
        for images, labels in self:
            return (trees.rows(images, slice(number)), labels[:number]) if num_images(images) else None
        return None


def to_device(batch: Any, device: torch.device, name: str) -> Batch:
    """Move a batch of the loader `name` to the device, and return its images and targets."""
    images, targets = images_and_targets(batch, name)
    return trees.to_device(images, device), trees.to_device(targets, device)
