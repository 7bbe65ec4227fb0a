"""Labels of images that may have several classes, stored as class numbers: images x classes would fill memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class MultiLabels:
    """The classes of N images out of K, as compressed sparse rows; `dense` gives them as multi-hot vectors.

    It can be indexed by rows like an array (N, K), and numpy functions that take such an array get a dense one.
    """

    offsets: np.ndarray  # (N + 1,) int64: the classes of image i are classes[offsets[i] : offsets[i + 1]]
    classes: np.ndarray  # int32, ascending within an image
    num_classes: int

    ndim = 2

    @classmethod
    def of_pairs(cls, rows: np.ndarray, classes: np.ndarray, num_images: int, num_classes: int) -> MultiLabels:
        """Return labels from pairs of an image and its class, (M,) each; rows are ascending."""
        order = np.lexsort((classes, rows))
        counts = np.bincount(rows, minlength=num_images)
        return cls(_offsets(counts), classes[order].astype(np.int32), num_classes)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self), self.num_classes

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.offsets.nbytes + self.classes.nbytes

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: Any) -> MultiLabels:
        chosen = np.arange(len(self))[rows]
        counts = np.diff(self.offsets)[chosen]
        offsets = _offsets(counts)
        entries = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][chosen] - offsets[:-1], counts)
        return MultiLabels(offsets, self.classes[entries], self.num_classes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.dense().astype(dtype or np.float32, copy=False)

    def tolist(self) -> list[list[float]]:
        """Return the multi-hot vectors as lists."""
        dense: list[list[float]] = self.dense().tolist()
        return dense

    def dense(self) -> np.ndarray:
        """Return multi-hot vectors (N, K) float32."""
        hot = np.zeros(self.shape, dtype=np.float32)
        hot[np.repeat(np.arange(len(self)), np.diff(self.offsets)), self.classes] = 1.0
        return hot

    def counts(self) -> np.ndarray:
        """Return how many images each class has, (K,) int64."""
        return np.bincount(self.classes, minlength=self.num_classes)

    def of(self, row: int) -> list[int]:
        """Return the classes of an image."""
        classes: list[int] = self.classes[self.offsets[row] : self.offsets[row + 1]].tolist()
        return classes

    def numbered(self) -> np.ndarray:
        """Return numbers (N,) that are equal for images with the same classes."""
        numbers: dict[bytes, int] = {}
        parts = (self.classes[start:end].tobytes() for start, end in pairwise(self.offsets.tolist()))
        return np.array([numbers.setdefault(part, len(numbers)) for part in parts], dtype=np.int64)

    def renumber(self, numbers: Mapping[int, int], num_classes: int) -> MultiLabels:
        """Return the labels with other class numbers; `numbers` maps each class that stays to its new number."""
        lookup = np.full(self.num_classes, -1)
        lookup[list(numbers)] = list(numbers.values())
        rows, classes = np.repeat(np.arange(len(self)), np.diff(self.offsets)), lookup[self.classes]
        stays = classes >= 0
        return MultiLabels.of_pairs(rows[stays], classes[stays], len(self), num_classes)


LabelArray = np.ndarray | MultiLabels  # (N,) int64, or of several classes each


def class_counts(labels: LabelArray, num_classes: int) -> np.ndarray:
    """Return how many images each class has, (K,) int64."""
    if isinstance(labels, MultiLabels):
        return labels.counts()
    if labels.ndim == 2:
        return labels.sum(axis=0, dtype=np.float64).round().astype(np.int64)
    return np.bincount(labels, minlength=num_classes)


def dense_labels(labels: LabelArray, rows: Any) -> np.ndarray:
    """Return the labels of rows, (B,) int64 or multi-hot (B, K) float32."""
    chosen = labels[rows]
    return chosen.dense() if isinstance(chosen, MultiLabels) else chosen


def join_labels(parts: Sequence[LabelArray]) -> LabelArray:
    """Return the labels of several splits, one after the other."""
    first = parts[0]
    if not isinstance(first, MultiLabels):
        return np.concatenate([np.asarray(part) for part in parts])
    several = [part for part in parts if isinstance(part, MultiLabels)]
    counts = np.concatenate([np.diff(part.offsets) for part in several])
    return MultiLabels(_offsets(counts), np.concatenate([part.classes for part in several]), first.num_classes)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
