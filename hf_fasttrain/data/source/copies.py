"""Copies of an image, byte for byte, that have different labels: at least one of them is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.data.source.multi_label import LabelArray, MultiLabels, join_labels
from hf_fasttrain.data.source.scan import SplitScan, image_names

Copy = tuple[str, str]  # name of an image: its path, else split and row; its label


def contradicting_copies(
    splits: Sequence[Split], scans: Sequence[SplitScan], class_names: Sequence[str], most: int = 10
) -> tuple[int, list[list[Copy]]]:
    """Return how many images have copies with different labels, within a split or in several.

    The first `most` of them come as lists of one copy for each label. Bad images are ignored.
    """
    rows = [scan.good for scan in scans]
    hashes = np.concatenate([scan.hashes[good] for scan, good in zip(scans, rows, strict=True)])
    labels = join_labels([split.labels[good] for split, good in zip(splits, rows, strict=True)])
    images = _numbered(hashes)
    codes = labels.numbered() if isinstance(labels, MultiLabels) else labels
    pairs, first = np.unique(np.stack([images, codes], axis=1), axis=0, return_index=True)
    wrong = np.flatnonzero(np.bincount(pairs[:, 0]) > 1)
    starts = np.cumsum([0, *map(len, rows)])

    def copy(index: int) -> Copy:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        row = rows[part][index - starts[part]]
        return image_names(splits[part], np.array([row]))[0], _label(labels, index, class_names)

    return len(wrong), [[copy(int(index)) for index in np.sort(first[pairs[:, 0] == image])] for image in wrong[:most]]


def _numbered(values: np.ndarray) -> np.ndarray:
    """Return numbers (N,) that are equal for equal rows of `values` (N, K)."""
    return np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)


def _label(labels: LabelArray, index: int, class_names: Sequence[str]) -> str:
    if isinstance(labels, MultiLabels):
        return " + ".join(class_names[number] for number in labels.of(index)) or "no class"
    return class_names[int(labels[index])]
