"""Converts label columns to class numbers: integers, strings, booleans, ClassLabels, lists and one-hot vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_fasttrain.data.source.classes import match_names, similar_names
from hf_fasttrain.data.source.label_column import LabelColumn, are_vectors, read_column, vector_classes
from hf_fasttrain.data.source.multi_label import LabelArray, MultiLabels, class_counts
from hf_fasttrain.utils.errors import DataError, shortened


@dataclass(frozen=True)
class Labels:
    """The labels of several splits in one numbering."""

    by_split: dict[str, LabelArray]  # split -> (N,) int64, or MultiLabels
    class_names: list[str]
    multi_label: bool
    notes: list[str] = field(default_factory=list)  # decisions that may surprise the user


def read_labels(
    splits: Mapping[str, Any],
    column: str,
    *,
    where: str,
    train: str,
    multi_label: bool | None = None,
    trains: bool = True,
) -> Labels:
    """Return the labels of all splits in one numbering, with class names from the split `train`.

    If every list or 0/1 vector of every split has exactly one class, the data is single-label, otherwise multi-label;
    `multi_label` overrides this. Labels of other splits are matched to the classes of `train` by meaning. Raises
    DataError for labels that are missing, out of range or not a class of `train`, and, if the data `trains` a model,
    for fewer than two classes.
    """
    where_of = {name: f"{where}, split '{name}', column '{column}'" for name in splits}
    columns = {name: read_column(dataset, column, where_of[name]) for name, dataset in splits.items()}
    notes: list[str] = []
    vectors = are_vectors(list(columns.values()))
    if vectors:
        columns = {name: vector_classes(read) if read.is_list else read for name, read in columns.items()}
    several = _resolve_multi_label(columns, train, multi_label, vectors=vectors, notes=notes)
    names = _class_names(columns[train])
    if trains:
        _require_classes(columns[train], names, where)
        notes += _notes_on_names(columns[train], names)
    labels: dict[str, LabelArray] = {}
    for name, read in columns.items():
        lookup = _lookup(read, columns[train], names, train, notes)
        labels[name] = _multi_labels(read, lookup, len(names)) if several else lookup[read.codes]
    if several and trains:
        _require_differences(labels[train], names, where_of[train])
    return Labels(labels, names, several, notes)


def _resolve_multi_label(
    columns: Mapping[str, LabelColumn], train: str, multi_label: bool | None, *, vectors: bool, notes: list[str]
) -> bool:
    """Return whether an image may have several classes; add a note if this was inferred from lists."""
    train_labels = columns[train]
    one_each = all(read.has_one_each for read in columns.values())
    several = train_labels.is_list and not one_each if multi_label is None else multi_label
    if not several:
        for read in columns.values():
            read.require_one_each()
    kind = "0/1 vectors" if vectors else "lists"
    if multi_label is None and train_labels.is_list and one_each:
        notes.append(
            f"{train_labels.where}: {kind} with exactly one class in every row: each image has one class; "
            "data.multi_label=true trains them as multi-label"
        )
    elif multi_label is None and vectors:
        read, row = next((read, row) for read in columns.values() if (row := read.row_without_one) is not None)
        notes.append(f"{read.where}: 0/1 vectors with {read.count_in(row)} classes in row {row}: read as multi-label")
    return several


def _class_names(train: LabelColumn) -> list[str]:
    """Return the names of a ClassLabel, else the sorted values.

    Integers from 0 with at most half of them missing are class numbers: a missing one is a class without images. Other
    integers are class names.
    """
    if train.names is not None:
        return list(train.names)
    values = sorted(set(train.values))
    if _are_integers(train) and values and values[0] == 0 and 2 * len(values) > values[-1]:
        values = list(range(values[-1] + 1))
    return [str(value) for value in values]


def _are_integers(train: LabelColumn) -> bool:
    return train.names is None and all(type(value) is int for value in train.values)


def _require_classes(train: LabelColumn, names: Sequence[str], where: str) -> None:
    """Raise DataError for a training split that no classifier can learn from."""
    if len(names) < 2:
        raise DataError(f"{where}: only one class ({shortened(names)}); a classifier needs at least two")
    integers = [value for value in train.values if train.names is None and not isinstance(value, str)]
    if integers and max(integers) > 10 * len(train) + 1000 and 2 * len(integers) > len(train):
        raise DataError(f"{where}: labels up to {max(integers)} look like ids, not classes; name data.label_column")


def _require_differences(labels: LabelArray, names: Sequence[str], where: str) -> None:
    """Raise DataError if every image has every class, as with misread vectors of two classes."""
    if len(labels) and class_counts(labels, len(names)).min() == len(labels):
        raise DataError(
            f"{where}: every image has every class ({shortened(names)}), so there is nothing to learn; give lists of "
            "the classes that an image has, or name data.label_column"
        )


def _notes_on_names(train: LabelColumn, names: Sequence[str]) -> list[str]:
    """Return notes on class names: integers that are not just 0, 1, 2, ..., and names that differ in form only."""
    notes = []
    if _are_integers(train) and names != [str(number) for number in range(len(names))]:
        negative = min(train.values, default=0) < 0
        notes.append(
            f"integer labels with gaps: {shortened(names, 6)} are {len(names)} classes by these names; numbers that no "
            f"image has are not classes ({train.where})"
            + ("; remove rows with a negative label if it means unlabelled" if negative else "")
        )
    pairs = [f"{first!r} and {second!r}" for first, second in similar_names(names)]
    if pairs:
        notes.append(f"{train.where}: {shortened(pairs, 6)} are different classes, though they may mean the same")
    return notes


def _lookup(read: LabelColumn, train: LabelColumn, names: list[str], train_name: str, notes: list[str]) -> np.ndarray:
    """Return the class number of each distinct value of a column.

    Raises DataError with the first row whose value is not a class.
    """
    texts = read.texts
    matched = match_names(texts, names)
    by_number = _by_number(read, train, names)
    if by_number is not None and matched.unknown:
        bare = f"split '{train_name}'" if read.names is not None else "this split"
        notes.append(f"{read.where}: labels are matched to split '{train_name}' by number, since {bare} has no names")
        return np.array(by_number, dtype=np.int64)
    if by_number is not None and by_number != [matched.numbers[text] for text in texts]:
        raise DataError(
            f"{read.where}: its integers ({shortened(texts, 6)}) may be numbers or names of the classes of split "
            f"'{train_name}' ({shortened(names, 6)}); give both splits the same kind of labels"
        )
    if matched.unknown:
        label = matched.unknown[0]
        raise DataError(
            f"{read.where}: row {read.row_of(texts.index(label))} has label {label!r}, which is not a class of split "
            f"'{train_name}', or could be several; its labels are {shortened(texts, 6)}, the classes "
            f"{shortened(names, 6)}. Give every split the same labels"
        )
    if matched.renamed:
        notes.append(f"{read.where}: labels are matched to the classes of split '{train_name}': {matched.describe()}")
    return np.array([matched.numbers[text] for text in texts], dtype=np.int64)


def _by_number(read: LabelColumn, train: LabelColumn, names: list[str]) -> list[int] | None:
    """Return class numbers if one of the columns has class names and the other only integers, else None."""
    named, plain = (train, read) if train.names is not None else (read, train)
    if named.names is None or plain.names is not None or not all(type(value) is int for value in plain.values):
        return None
    if named is train:
        numbers = [int(value) for value in read.values]
        return numbers if all(0 <= number < len(names) for number in numbers) else None
    number_of = {name: number for number, name in enumerate(names)}
    texts = [str(value) for value in read.values]
    return [number_of[text] for text in texts] if all(text in number_of for text in texts) else None


def _multi_labels(read: LabelColumn, lookup: np.ndarray, num_classes: int) -> MultiLabels:
    """Return the classes of each row. Raises DataError for a row that names a class twice."""
    labels = MultiLabels.of_pairs(read.rows, lookup[read.codes], len(read), num_classes)
    rows = np.repeat(np.arange(len(labels)), np.diff(labels.offsets))
    repeated = (np.diff(labels.classes) == 0) & (np.diff(rows) == 0)
    if repeated.any():
        raise DataError(
            f"{read.where}: row {rows[np.argmax(repeated)]} names a class twice; give lists of the classes that an "
            "image has, such as [0, 3] or ['dog', 'cat'], or 0/1 vectors of one length"
        )
    return labels


def renumber(labels: LabelArray, numbers: Mapping[int, int], num_classes: int) -> LabelArray:
    """Return labels with classes renumbered; `numbers` maps each class that occurs to its new number."""
    if isinstance(labels, MultiLabels):
        return labels.renumber(numbers, num_classes)
    lookup = np.full(max(numbers, default=0) + 1, -1)
    lookup[list(numbers)] = list(numbers.values())
    return lookup[labels].astype(np.int64)
