"""Folds: the training images divided into parts, each of which is the evaluation split once."""

from __future__ import annotations

import numpy as np

from hf_fasttrain.data.source.file_split import Groups
from hf_fasttrain.data.source.groups import units_of
from hf_fasttrain.data.source.multi_label import LabelArray, MultiLabels
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.format import format_count


def fold_numbers(labels: LabelArray, folds: int, seed: int, groups: Groups | None = None) -> np.ndarray:
    """Return the fold of each image, (N,) int64 from 0 to `folds` - 1; it depends on labels, groups and seed only.

    Sizes of folds, and each class's images in them, differ by at most one; images with several classes are dealt by
    their sets of classes. With `groups`, whole ones are dealt, the largest first, each to the fold that has least of
    its classes. Raises DataError if there are fewer images, or groups, than folds.
    """
    kinds = _kinds(labels)
    rng = np.random.default_rng([seed, len(kinds), folds])
    if groups is not None:
        return _folds_of_groups(kinds, units_of(groups), folds, rng)
    if len(kinds) < folds:
        raise DataError(f"data.folds={folds}: there are only {format_count(len(kinds), 'image')}; set it to less")
    shuffled = rng.permutation(len(kinds))
    by_kind = shuffled[np.argsort(kinds[shuffled], kind="stable")]
    numbers = np.empty(len(kinds), np.int64)
    numbers[by_kind] = rng.permutation(folds)[np.arange(len(kinds)) % folds]
    return numbers


def _kinds(labels: LabelArray) -> np.ndarray:
    """Return numbers (N,) of the classes, or of the sets of classes."""
    if isinstance(labels, MultiLabels):
        return labels.numbered()
    if labels.ndim == 2:
        return np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    return labels


def _folds_of_groups(kinds: np.ndarray, units: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Return the fold of each image, dealing whole units: a greedy form of stratified groups, as scikit-learn's."""
    sizes = np.bincount(units)
    if len(sizes) < folds:
        raise DataError(
            f"data.folds={folds}: the training images have only {format_count(len(sizes), 'group')} "
            "(data.group_column), and each fold needs one; set data.folds to less"
        )
    width = int(kinds.max()) + 1
    pairs, counts = np.unique(units * width + kinds, return_counts=True)
    starts = np.searchsorted(pairs // width, np.arange(len(sizes) + 1)).tolist()
    kind_of, count_of = pairs % width, counts.astype(np.float64)
    shares = count_of / np.bincount(kinds)[kind_of]  # of the kind's images
    shuffled = rng.permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    in_folds, images, numbers = np.zeros((width, folds)), np.zeros(folds), np.empty(len(sizes), np.int64)
    for dealt, unit in enumerate(order.tolist()):
        part = slice(starts[unit], starts[unit + 1])
        cost = shares[part] @ in_folds[kind_of[part]] + images * 1e-9
        if len(sizes) - dealt <= np.count_nonzero(images == 0):  # the others are needed to fill the empty folds
            cost = np.where(images == 0, cost, np.inf)
        chosen = numbers[unit] = int(np.argmin(cost))
        in_folds[kind_of[part], chosen] += count_of[part]
        images[chosen] += sizes[unit]
    return numbers[units]
