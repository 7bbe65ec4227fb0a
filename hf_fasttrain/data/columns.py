"""Which columns of an HF dataset hold images and labels, and what the labels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_fasttrain.errors import DataError, nearest, shortened, shown

IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "png", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "cls", "classes", "tags")


@dataclass(frozen=True)
class Columns:
    """The names of the image and the label column."""

    image: str
    label: str


@dataclass(frozen=True)
class Labels:
    """The labels of several splits in one numbering."""

    labels: dict[str, np.ndarray]  # split -> (N,) int64, or (N, K) float32 of 0 and 1
    class_names: list[str]
    multi_label: bool


def find_columns(dataset: Any, image_wish: str, label_wish: str, *, where: str) -> Columns:
    """Return the image and label columns: those wished for, else the only candidates by type and name.

    Raises DataError, which lists the columns, if there are none or several.
    """
    features = dataset.features
    image = _find(features, image_wish, "image", _image_candidates(features), where)
    label = _find(features, label_wish, "label", _label_candidates(features, image), where)
    if image == label:
        raise DataError(f"{where}: column '{image}' can't be both images and labels; name data.label_column")
    return Columns(image, label)


def _find(features: Mapping[str, Any], wish: str, kind: str, candidates: Sequence[str], where: str) -> str:
    listed = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    if wish != "auto":
        if wish not in features:
            hint = nearest(wish, features)
            raise DataError(f"data.{kind}_column: '{wish}' is no column of {where}; it has {listed}.{hint}")
        return wish
    if len(candidates) == 1:
        return candidates[0]
    problem = f"several columns may be the {kind}s: {', '.join(candidates)}" if candidates else f"no {kind} column"
    raise DataError(f"{where}: {problem}; name it by data.{kind}_column. Its columns are {listed}")


def _type_name(feature: Any) -> str:
    if isinstance(feature, list):
        return f"list of {_type_name(feature[0])}"
    inner = getattr(feature, "feature", None)
    dtype = getattr(feature, "dtype", None)
    name = type(feature).__name__
    return f"list of {_type_name(inner)}" if inner is not None else (str(dtype) if name == "Value" else name)


def _image_candidates(features: Mapping[str, Any]) -> list[str]:
    import datasets

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(typed) > 1:
        named = [name for name in typed if name in IMAGE_NAMES]
        return named or typed
    if typed:
        return typed
    encoded = [n for n, f in features.items() if _type_name(f) in ("binary", "large_binary") or isinstance(f, dict)]
    return [name for name in encoded if name in IMAGE_NAMES]


def _label_candidates(features: Mapping[str, Any], image: str) -> list[str]:
    import datasets

    rest = {name: feature for name, feature in features.items() if name != image}
    named = [name for name in rest if name in LABEL_NAMES]
    if named:
        return named
    return [name for name, f in rest.items() if isinstance(_element(f), datasets.ClassLabel)]


def _element(feature: Any) -> Any:
    """Return the type of a list's elements, or of the value itself."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None) or feature


def read_labels(splits: Mapping[str, Any], columns: Columns, *, where: str, train: str) -> Labels:
    """Return the labels of all splits, numbered alike, with class names from the train split.

    Integers, strings and class labels are understood; lists of them are multi-label.
    Raises DataError for labels that are missing or out of range, and for fewer than two classes.
    """
    import datasets

    for name, dataset in splits.items():
        if columns.label not in dataset.features or columns.image not in dataset.features:
            raise DataError(
                f"{where}: split '{name}' lacks column '{columns.label}' or '{columns.image}', which '{train}' has; "
                f"it has {shortened(dataset.features)}"
            )
    feature = splits[train].features[columns.label]
    element = _element(feature)
    multi_label = element is not feature
    raw = {name: _rows(dataset, columns.label, f"{where}, split '{name}'") for name, dataset in splits.items()}
    if isinstance(element, datasets.ClassLabel):
        class_names = list(element.names)
    else:
        class_names = _names_of_values(raw[train], multi_label, where)
    if len(class_names) < 2:
        raise DataError(f"{where}: only one class ({shortened(class_names)}); a classifier needs at least two")
    number = {name: i for i, name in enumerate(class_names)}
    labels = {}
    for name, rows in raw.items():
        rows = _by_name(rows, splits[name].features[columns.label], class_names)
        place = f"{where}, split '{name}', column '{columns.label}'"
        labels[name] = _encode(rows, number, multi_label, place)
    return Labels(labels, class_names, multi_label)


def _by_name(rows: list[Any], feature: Any, class_names: list[str]) -> list[Any]:
    """Return rows of class labels as names where a split numbers its classes otherwise than the train split."""
    own = getattr(_element(feature), "names", None)
    if own is None or list(own) == class_names:
        return rows

    def name(value: Any) -> Any:
        return own[value] if isinstance(value, int) and 0 <= value < len(own) else value

    return [[name(value) for value in row] if isinstance(row, list) else name(row) for row in rows]


def _rows(dataset: Any, column: str, where: str) -> list[Any]:
    table = dataset.select_columns([column]).with_format("arrow")[:]
    rows = table[column].to_pylist()
    missing = next((row for row, value in enumerate(rows) if value is None), None)
    if missing is not None:
        raise DataError(f"{where}: row {missing} has no label in column '{column}'; take such rows out")
    if any(isinstance(row, list) and len(set(map(str, row))) < len(row) for row in rows):
        raise DataError(
            f"{where}: lists in column '{column}' name a class twice, as 0/1 vectors do; give lists of the classes "
            "that an image has, such as [0, 3] or ['dog', 'cat']"
        )
    return rows


def _names_of_values(rows: Sequence[Any], multi_label: bool, where: str) -> list[str]:
    flat = [value for row in rows for value in row] if multi_label else rows
    if not all(isinstance(value, str | int) for value in flat):
        raise DataError(f"{where}: labels must be integers or texts; got {shortened(map(shown, flat), 3)}")
    values = {value for row in rows for value in row} if multi_label else set(rows)
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if all(isinstance(value, int) for value in values) and values:
        if max(values) > 10 * len(rows) + 1000:
            raise DataError(f"{where}: labels up to {max(values)} look like ids, not classes; name data.label_column")
        return [str(i) for i in range(max(values) + 1)]
    raise DataError(f"{where}: labels must be integers or texts; got {shortened(sorted(map(repr, values)), 5)}")


def _encode(rows: Sequence[Any], number: Mapping[str, int], multi_label: bool, place: str) -> np.ndarray:
    def encoded(row: int, value: Any) -> int:
        label = number.get(value, -1) if isinstance(value, str) else value
        if not 0 <= label < len(number):
            raise DataError(
                f"{place}: row {row} has label {value!r}; allowed are 0 to {len(number) - 1} "
                f"({shortened(number, 6)}), which are the train split's"
            )
        return label

    if not multi_label:
        return np.array([encoded(row, value) for row, value in enumerate(rows)], dtype=np.int64)
    hot = np.zeros((len(rows), len(number)), dtype=np.float32)
    for row, values in enumerate(rows):
        for value in values:
            hot[row, encoded(row, value)] = 1.0
    return hot
