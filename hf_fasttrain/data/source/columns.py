"""Finds the image and label columns of an HF dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_fasttrain.utils.errors import DataError, nearest, shortened

IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "png", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "cls", "classes", "tags")


@dataclass(frozen=True)
class Columns:
    """The names of the image and the label column."""

    image: str
    label: str


def find_columns(dataset: Any, image_column: str, label_column: str, *, where: str) -> Columns:
    """Return the image and label columns: the given names, or for "auto" the only candidate by type and name.

    Raises DataError, which lists the columns, if there are none or several.
    """
    features = dataset.features
    image = _find(features, image_column, "image", _image_candidates(features), where)
    label = _find(features, label_column, "label", _label_candidates(features, image), where)
    if image == label:
        raise DataError(f"{where}: column '{image}' can't be both images and labels; name data.label_column")
    return Columns(image, label)


def _find(features: Mapping[str, Any], column: str, kind: str, candidates: Sequence[str], where: str) -> str:
    listed = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    if column != "auto":
        if column not in features:
            hint = nearest(column, features)
            raise DataError(f"data.{kind}_column: '{column}' is not a column of {where}; it has {listed}.{hint}")
        return column
    if len(candidates) == 1:
        return candidates[0]
    problem = f"several columns may be the {kind}s: {', '.join(candidates)}" if candidates else f"no {kind} column"
    raise DataError(f"{where}: {problem}; set data.{kind}_column. Its columns are {listed}")


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
    return [name for name, f in rest.items() if isinstance(element_of(f), datasets.ClassLabel)]


def element_of(feature: Any) -> Any:
    """Return the type of a list's elements, or of the value itself."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None) or feature


def require_columns(dataset: Any, columns: Columns, *, where: str, split: str, train: str) -> None:
    """Raise DataError if a split lacks a column that the split `train` has."""
    if columns.label not in dataset.features or columns.image not in dataset.features:
        raise DataError(
            f"{where}: split '{split}' lacks column '{columns.label}' or '{columns.image}', which '{train}' has; "
            f"it has {shortened(dataset.features)}"
        )
