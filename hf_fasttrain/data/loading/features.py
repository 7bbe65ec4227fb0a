"""Features of images instead of their pixels, for steps and evaluations that need no more of an image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.loading.loader import FEATURE_SHAPE, MicroBatches, Step, TrainLoader
from hf_fasttrain.data.loading.prefetch import Batch
from hf_fasttrain.data.loading.sampler import StepPlan
from hf_fasttrain.data.source.multi_label import dense_labels


class Features(NamedTuple):
    """What a frozen model computes of each image of a split."""

    values: Tensor  # (N, C) float32, on the host
    used: np.ndarray  # (N,) index of the image that was read: another one for a bad image, whose label counts


class FeatureLoader(TrainLoader):
    """A loader of training images that yields features (B, C) in the steps before step `until`.

    `compute` is called before the first of them. The steps from `until` on are those of `images`.
    """

    def __init__(self, images: TrainLoader, until: int, compute: Callable[[], Features]) -> None:
        super().__init__(
            images.prefetcher, images.sampling_plan, images.normalize, images.mixing, images.size_at, images.views
        )
        self.until, self.compute = until, compute
        self._features: Features | None = None

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps from `start` to before `stop`."""
        middle = min(stop, max(start, self.until))
        for index in range(start, middle):
            if self._features is None:
                self._features = self.compute()
            yield self._feature_step(index, self._features)
        if middle < stop:
            self._features = None
            yield from super().steps(middle, stop)

    def _feature_step(self, index: int, features: Features) -> Step:
        plan = self.sampling_plan.plan(index)
        sizes = [len(key.indices) for key in plan.micro_batches]
        number = sum(sizes) if self.micro_batch_size == 1 else len(sizes)
        make = functools.partial(self._feature_batches, plan, features)
        return Step(index, plan.num_images, number, MicroBatches(make(), make), FEATURE_SHAPE)

    def _feature_batches(self, plan: StepPlan, features: Features) -> Iterator[Batch]:
        split, device = self.prefetcher.images.images.split, self.prefetcher.device
        for key in plan.micro_batches:
            with self.timer("copy"):
                vectors = features.values[torch.from_numpy(key.indices)].to(device)
                labels = torch.from_numpy(dense_labels(split.labels, features.used[key.indices])).to(device)
            if self.micro_batch_size > 1:
                yield vectors, labels
            else:
                yield from ((vectors[i : i + 1], labels[i : i + 1]) for i in range(len(labels)))


class EvalFeatures:
    """Features of evaluation images, captured in the first evaluation and used in those that follow.

    They come from the very batches of that evaluation. `captured` opens the block in which a model's features are
    captured, whose function returns those of the last images; `is_frozen` says whether they are still the model's.
    """

    def __init__(
        self, captured: Callable[[], AbstractContextManager[Callable[[int], Tensor]]], is_frozen: Callable[[], bool]
    ) -> None:
        self.captured, self.is_frozen = captured, is_frozen
        self._batches: list[Batch] | None = None

    def batches(self, images: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
        """Yield the features and labels of an evaluation's batches; at first, and in the end, `images` and labels."""
        if not self.is_frozen():
            self._batches = None
            yield from images()
        elif self._batches is not None:
            yield from self._batches
        else:
            batches: list[Batch] = []
            with self.captured() as features_of:
                for pixels, labels in images():
                    yield pixels, labels
                    batches.append((features_of(len(labels)), labels))
            self._batches = batches
