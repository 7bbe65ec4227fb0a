"""Groups of images that belong together (of a patient, a camera, a video): held out as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_fasttrain.data.source.file_split import FileSplit, Groups
from hf_fasttrain.data.source.label_table_files import encoded
from hf_fasttrain.data.source.multi_label import LabelArray
from hf_fasttrain.utils.errors import DataError, nearest, shortened
from hf_fasttrain.utils.format import format_count


def read_groups(dataset: Any, column: str, where: str) -> Groups:
    """Return the group of each row of a split. Raises DataError if there is no such column, or not of single values."""
    if isinstance(dataset, FileSplit) and dataset.groups is not None:
        return dataset.groups
    import pyarrow as pa

    names = list(dataset.columns if isinstance(dataset, FileSplit) else dataset.column_names)
    if column not in names:
        raise DataError(
            f"data.group_column: '{column}' is not a column of {where}; it has {shortened(names)}."
            f"{nearest(column, names)}"
        )
    if isinstance(dataset, FileSplit):
        array: Any = dataset.columns[column]
    else:
        array = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    try:
        return groups_of(array)
    except pa.ArrowException:
        raise DataError(
            f"{where}: column '{column}' ({array.type}) can't be read as groups; give one text or number a row"
        ) from None


def groups_of(array: Any) -> Groups:
    """Return the groups that an Arrow array names. Raises ArrowException for values that are no texts or numbers."""
    import pyarrow as pa

    if isinstance(array, np.ndarray):
        array = pa.array(array)
    names, codes = encoded(array)
    blank = np.array([not name.strip() for name in names], bool)
    return Groups(np.where(blank[codes], -1, codes), names)


def held_out_groups(labels: LabelArray, groups: Groups, fraction: float, seed: int) -> np.ndarray:
    """Return the rows (ascending) of whole groups that are about a `fraction` of the images, of each class if possible.

    Groups are gone through in random order; each is held out if the shares of its classes come nearer to the fraction,
    and none of them loses all its images. A row without a group is one by itself. Raises DataError for a single group.
    """
    number, codes = len(labels), units_of(groups)
    sizes = np.bincount(codes)
    if len(sizes) < 2:
        raise DataError(
            "data.group_column: all training images belong to one group, of which no part can be held out; give a "
            "validation split, or leave data.group_column out"
        )
    classes = labels if isinstance(labels, np.ndarray) and labels.ndim == 1 else np.zeros(number, np.int64)
    chosen = _chosen_groups(codes, classes, fraction, np.random.default_rng([seed, number]).permutation(len(sizes)))
    if not chosen:
        chosen = [int(np.argmin(sizes))]  # though it is more than the fraction
    held = np.zeros(len(sizes), bool)
    held[chosen] = True
    return np.flatnonzero(held[codes])


def units_of(groups: Groups) -> np.ndarray:
    """Return the number (N,) of each row's group, without gaps; a row without a group is one by itself."""
    alone = groups.codes < 0
    codes = np.where(alone, len(groups.names) + np.cumsum(alone), groups.codes)
    return np.unique(codes, return_inverse=True)[1]


def _chosen_groups(codes: np.ndarray, classes: np.ndarray, fraction: float, order: np.ndarray) -> list[int]:
    """Return the groups that bring the held-out images of each class nearer to a fraction of all, in this order."""
    width = int(classes.max()) + 1
    pairs, counts = np.unique(codes * width + classes, return_counts=True)
    starts = np.searchsorted(pairs // width, np.arange(len(order) + 1)).tolist()
    # Lists: indexing arrays would take ten times as long, 15 s for a million groups.
    class_of, count_of, total = (pairs % width).tolist(), counts.tolist(), np.bincount(classes).tolist()
    missing = [fraction * number for number in total]
    chosen = []
    for group in order.tolist():
        members = [(class_of[pair], count_of[pair]) for pair in range(starts[group], starts[group + 1])]
        keeps_classes = all(fraction * total[of] - missing[of] + count < total[of] for of, count in members)
        if keeps_classes and sum((count - 2 * missing[of]) * count / total[of] for of, count in members) < 0:
            chosen.append(group)
            for of, count in members:
                missing[of] -= count
    return chosen


def notes_on_groups(groups: dict[str, Groups], column: str, train: str) -> list[str]:
    """Return a note for each split that shares groups with the training split, and for rows without a group."""
    notes = []
    known = _names_in(groups[train])
    for split, found in groups.items():
        blank = int((found.codes < 0).sum())
        if blank:
            rows = format_count(blank, "row")
            notes.append(f"column '{column}': {rows} of split '{split}' without a group; each is one by itself")
        shared = sorted(known & _names_in(found)) if split != train else []
        if shared:
            is_known = np.array([name in known for name in found.names] + [False])[found.codes]
            notes.append(
                f"split '{split}' shares {format_count(len(shared), 'group')} of column '{column}' with split "
                f"'{train}' ({shortened(shared, 3)}), {int(is_known.sum()):,} of its {len(found.codes):,} images: its "
                "accuracy may be overstated"
            )
    return notes


def _names_in(groups: Groups) -> set[str]:
    used: Sequence[int] = np.unique(groups.codes[groups.codes >= 0]).tolist()
    return {groups.names[code] for code in used}
