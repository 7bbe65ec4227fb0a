"""Bootstrap intervals of a split's metrics, and of the differences between two models, from kept predictions.

Images are drawn with replacement, as many as there are; with groups (data.group_column) whole groups, since images of
one group are alike. An interval holds the middle 95 % of a metric over the resamples: Efron and Tibshirani, An
Introduction to the Bootstrap (1993), 13.3, the percentile interval. The same draws serve every metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.run_folder.bits import count_bits, unpack_bits
from hf_fasttrain.run_folder.intervals import CONFIDENCE, RESAMPLES, SEED, Difference, Intervals
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.run_folder.result import PER_CLASS, SCORE_METRICS, TUNED_METRICS, is_built_in
from hf_fasttrain.train.metrics import NUM_BINS, calibration_bins, metrics_of_counts
from hf_fasttrain.utils.format import is_finite

RESAMPLES_AT_ONCE, UNITS_AT_ONCE = 250, 512  # their counts, 1 MB, stay in the processor's cache
MIN_RESAMPLES, MAX_DRAWS = 500, 200_000_000  # a second for 10,000 images, some seconds for 500,000
MAX_SUMS = 1 << 22  # at a time, 32 MB: columns x resamples
MAX_ENTRIES = 10_000_000  # true and predicted classes of all images, which take about ten seconds
ROWS_AT_ONCE = 1024  # whose bits are unpacked
MEANS = {"loss": "losses", "top5_accuracy": "top5", "brier": "brier"}  # metric -> what it is the mean of
NEEDS_SCORES = "needs the scores of all classes, which are not kept"


class Resampler:
    """Draws as many units with replacement as there are; a unit is an image, or a group of images."""

    def __init__(self, number: int, groups: Tensor | None = None, seed: int = SEED) -> None:
        self.seed, self.over = seed, "images" if groups is None else "groups"
        self.num_units, self._order, self._starts = number, np.arange(number), np.arange(number + 1)
        if groups is not None:
            names, units, sizes = np.unique(groups.numpy(), return_inverse=True, return_counts=True)
            self.num_units, self._order = len(names), np.argsort(units, kind="stable")
            self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def sums(self, parts: Sequence[ResampledMetrics], resamples: int) -> Iterator[list[np.ndarray]]:
        """Yield the sums of each part's columns (M, R) over the drawn images, of R resamples at a time."""
        rng = np.random.default_rng(self.seed)
        columns = [part.columns.in_order(self._order) for part in parts]
        most = max(1, min(RESAMPLES_AT_ONCE, MAX_SUMS // max(each.number for each in columns)))
        for first in range(0, resamples, most):
            width = min(most, resamples - first)
            totals = [np.zeros((each.number, width)) for each in columns]
            for start, end, weights in self._weights(rng, width):
                for total, each in zip(totals, columns, strict=True):
                    each.add(total, start, end, weights)
            yield totals

    def _weights(self, rng: np.random.Generator, width: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield how often images were drawn, those from start to end in the units' order, (M, width) float64.

        How many draws fall on some units follows a multinomial distribution, and each of those is one of them.
        """
        first = np.arange(0, self.num_units, UNITS_AT_ONCE)
        sizes = np.minimum(UNITS_AT_ONCE, self.num_units - first)
        draws = rng.multinomial(self.num_units, sizes / self.num_units, size=width)
        for number, (start, size) in enumerate(zip(first.tolist(), sizes.tolist(), strict=True)):
            resample = np.repeat(np.arange(width), draws[:, number])
            places = rng.integers(0, size, len(resample)) * width + resample
            weights = np.bincount(places, minlength=size * width).reshape(size, width).astype(np.float64)
            images = self._starts[start : start + size + 1]
            yield int(images[0]), int(images[-1]), np.repeat(weights, np.diff(images), axis=0)


@dataclass(frozen=True)
class Columns:
    """What is summed over images: dense columns (N, D), and classes as a sparse matrix (N, 3 K) or None."""

    dense: np.ndarray
    classes: Any

    @property
    def number(self) -> int:
        """How many columns there are."""
        return self.dense.shape[1] + (0 if self.classes is None else int(self.classes.shape[1]))

    def in_order(self, order: np.ndarray) -> Columns:
        """Return the images in another order."""
        return Columns(self.dense[order], None if self.classes is None else self.classes[order])

    def add(self, sums: np.ndarray, start: int, end: int, weights: np.ndarray) -> None:
        """Add the images from start to end to the sums (M, R), with their weights (end - start, R)."""
        width = self.dense.shape[1]
        sums[:width] += self.dense[start:end].T @ weights
        if self.classes is not None:
            sums[width:] += self.classes[start:end].T @ weights

    def total(self) -> np.ndarray:
        """Return the sums over all images, (M, 1)."""
        sums = np.zeros((self.number, 1))
        self.add(sums, 0, len(self.dense), np.ones((len(self.dense), 1)))
        return sums


class ResampledMetrics:
    """Metrics of predictions as functions of sums over images, which may be drawn more than once.

    `class_names` are needed for metrics of single classes, such as recall/cat. `missing` says why a metric of `names`
    can't be computed.
    """

    def __init__(self, predictions: Predictions, names: Iterable[str], class_names: Sequence[str] = ()) -> None:
        self.predictions, self.class_names = predictions, list(class_names)
        self.missing: dict[str, str] = {}
        self.names = [name for name in names if self._is_possible(name)]
        self._means = [name for name in self.names if name in MEANS]
        parts = [np.ones(len(predictions.labels)), _column(~predictions.is_wrong)]
        parts += [_column(getattr(predictions, MEANS[name])) for name in self._means]
        dense = np.stack(parts, axis=1)
        if "ece" in self.names:
            dense = np.concatenate([dense, _calibration_gaps(predictions)], axis=1)
        needs_classes = any(_is_of_classes(name) for name in self.names)
        self.columns = Columns(dense, _class_matrix(predictions, len(self.class_names)) if needs_classes else None)

    def _is_possible(self, name: str) -> bool:
        predictions = self.predictions
        is_of_scores = name in (*SCORE_METRICS, *TUNED_METRICS) or (name == "ece" and predictions.is_multi_label)
        if not is_built_in(name):
            self.missing[name] = "is not computed by this package"
        elif is_of_scores or (name in MEANS and getattr(predictions, MEANS[name]) is None):
            self.missing[name] = NEEDS_SCORES
        elif _is_of_classes(name) and _num_entries(predictions) > MAX_ENTRIES:
            self.missing[name] = f"has more than {MAX_ENTRIES:,} labels and predictions, which would take too long"
        elif name.startswith(PER_CLASS) and name.partition("/")[2] not in self.class_names:
            self.missing[name] = "is of a class that has no name here"
        else:
            return True
        return False

    def __call__(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each metric (R,) from the sums (M, R) of the columns."""
        number, right, *means = sums[: 2 + len(self._means)]
        values = {name: mean / number for name, mean in zip(self._means, means, strict=True)}
        values["accuracy"] = right / number
        rest = sums[2 + len(self._means) :]
        if "ece" in self.names:
            values["ece"], rest = np.abs(rest[:NUM_BINS]).sum(0) / number, rest[NUM_BINS:]
        if self.columns.classes is not None:
            values |= self._of_counts(rest)
        return {name: values[name] for name in self.names}

    def _of_counts(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        true, predicted, both = torch.from_numpy(counts.T.copy()).unflatten(1, (3, -1)).unbind(1)
        macro, of_classes = metrics_of_counts(both, predicted, true, multi_label=self.predictions.is_multi_label)
        values = {name: value.numpy() for name, value in macro.items()}
        for name in self.names:
            if name.startswith(PER_CLASS):
                kind, _, class_name = name.partition("/")
                values[name] = of_classes[kind][:, self.class_names.index(class_name)].numpy()
        return values


def _is_of_classes(name: str) -> bool:
    return name not in MEANS and name not in ("accuracy", "ece")


def _column(values: Tensor) -> np.ndarray:
    return values.numpy().astype(np.float64)


def _calibration_gaps(predictions: Predictions) -> np.ndarray:
    """Return confidence minus right or wrong in the column of the confidence's bin, (N, NUM_BINS)."""
    gaps = np.zeros((len(predictions.labels), NUM_BINS))
    bins = calibration_bins(predictions.confidence).numpy()
    gaps[np.arange(len(gaps)), bins] = _column(predictions.confidence) - _column(~predictions.is_wrong)
    return gaps


def _num_entries(predictions: Predictions) -> int:
    if not predictions.is_multi_label:
        return 3 * len(predictions.labels)
    return sum(int(count_bits(bits, predictions.num_classes).sum()) for bits in _bits(predictions))


def _bits(predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    return predictions.labels, predictions.predicted, predictions.labels & predictions.predicted


def _class_matrix(predictions: Predictions, num_named: int) -> Any:
    """Return a sparse matrix (N, 3 K): which classes an image has, which are predicted, and which are both."""
    from scipy.sparse import csr_matrix

    if predictions.is_multi_label:
        number = predictions.num_classes
        pairs = [_pairs(bits, number) for bits in _bits(predictions)]
    else:
        labels, predicted = predictions.labels.numpy(), predictions.predicted.numpy()
        number, images = max(int(max(labels.max(), predicted.max())) + 1, num_named), np.arange(len(labels))
        right = np.flatnonzero(labels == predicted)
        pairs = [(images, labels), (images, predicted), (right, labels[right])]
    rows = np.concatenate([images for images, _ in pairs])
    columns = np.concatenate([classes + block * number for block, (_, classes) in enumerate(pairs)])
    return csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(predictions.labels), 3 * number))


def _pairs(bits: Tensor, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return image and class of each bit that is set."""
    found = []
    for start in range(0, len(bits), ROWS_AT_ONCE):
        pairs = unpack_bits(bits[start : start + ROWS_AT_ONCE], num_classes).nonzero().numpy()
        pairs[:, 0] += start
        found.append(pairs)
    joined = np.concatenate(found)
    return joined[:, 0], joined[:, 1]


def resamples_of(num_images: int) -> int:
    """Return the number of resamples: RESAMPLES, and for very many images fewer, whose intervals are narrow anyway."""
    return max(MIN_RESAMPLES, min(RESAMPLES, MAX_DRAWS // max(1, num_images)))


def intervals_of(
    predictions: Predictions,
    metrics: Mapping[str, float],
    class_names: Sequence[str] = (),
    *,
    resamples: int | None = None,
    seed: int = SEED,
) -> Intervals:
    """Return the intervals of an evaluation's metrics, those that follow from the predictions.

    A metric that the predictions don't give (its value is another one) has none, nor one without any spread: all
    images are right, say.
    """
    names = [name for name, value in metrics.items() if is_finite(value)]
    resamples = resamples or resamples_of(len(predictions.labels))
    resampler = Resampler(len(predictions.labels), predictions.groups, seed)
    found = Intervals(resampler.over, resampler.num_units, resamples, CONFIDENCE, seed)
    if resampler.num_units < 2:
        found.without = dict.fromkeys(names, f"needs at least two {found.over}")
        return found
    resampled = ResampledMetrics(predictions, names, class_names)
    for name, value in resampled(resampled.columns.total()).items():
        if not np.isclose(value[0], metrics[name], rtol=1e-3, atol=1e-5):
            resampled.missing[name] = "is another figure than that of the kept predictions"
    blocks = [resampled(sums) for (sums,) in resampler.sums([resampled], resamples)]
    for name in resampled.names:
        if name not in resampled.missing:
            found.add(name, *_percentiles([block[name] for block in blocks]))
    found.without |= resampled.missing
    return found


def differences(
    first: Predictions,
    second: Predictions,
    names: Sequence[str],
    class_names: Sequence[str] = (),
    *,
    resamples: int | None = None,
    seed: int = SEED,
) -> list[Difference]:
    """Return how much each metric of a second model is above the first one's, both measured on the same draws.

    The predictions are of the same images, in the same order. Metrics that either can't give are left out; fewer than
    two images or groups have no differences.
    """
    resampler = Resampler(len(first.labels), second.groups if first.groups is None else first.groups, seed)
    if resampler.num_units < 2:
        return []
    before = ResampledMetrics(first, names, class_names)
    after = ResampledMetrics(second, before.names, class_names)
    old, new = before(before.columns.total()), after(after.columns.total())
    resamples = resamples or resamples_of(len(first.labels))
    blocks = [(before(sums[0]), after(sums[1])) for sums in resampler.sums([before, after], resamples)]
    return [
        Difference(
            name,
            float(old[name][0]),
            float(new[name][0]),
            *_percentiles([b[name] - a[name] for a, b in blocks]),
            resampler.over,
            resampler.num_units,
        )
        for name in after.names
    ]


def _percentiles(blocks: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the ends of the middle part of a metric's values in all resamples."""
    low, high = np.percentile(np.concatenate(blocks), [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)
