"""Finds the image and label columns of a split, by the forms of its columns and their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from hf_fasttrain.utils.errors import DataError, nearest, shortened

IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "png", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "cls", "classes", "tags")


@dataclass(frozen=True)
class Columns:
    """The names of the image and the label column, and of others that were found."""

    image: str
    label: str
    listed: tuple[str, ...] = ()  # the columns of a table that are one class each; `label` then is for messages
    split: str | None = None  # of a table


class Kind(Enum):
    """What the values of a column may be."""

    IMAGE = auto()  # encoded images or paths, as datasets.Image
    BYTES = auto()  # encoded images, perhaps
    TEXT = auto()  # paths, perhaps
    ARRAY = auto()  # pixels, perhaps: nested lists of numbers, datasets.Array2D, Array3D
    CLASS = auto()  # datasets.ClassLabel, or lists of it
    UNREAD = auto()  # of a table: a type that `datasets` does not know
    OTHER = auto()


@dataclass(frozen=True)
class Form:
    """The form of a column."""

    kind: Kind
    text: str  # for messages: "list of int64"


CAN_BE_IMAGES = (Kind.IMAGE, Kind.BYTES, Kind.TEXT, Kind.ARRAY)


def forms_of(dataset: Any) -> dict[str, Form]:
    """Return the form of each column of a split: of an HF dataset, or of a FileSplit, which has them."""
    own: dict[str, Form] | None = getattr(dataset, "forms", None)
    if own is not None:
        return own
    unread: dict[str, str] = getattr(dataset, "unread_columns", {})  # `open_tables` names them
    forms = {name: _form(feature) for name, feature in dataset.features.items()}
    return forms | {name: Form(Kind.UNREAD, text) for name, text in unread.items()}


def _form(feature: Any) -> Form:
    """Return the form of an HF feature; by the names of classes, so that `datasets` need not be imported."""
    name, text = type(feature).__name__, _type_name(feature)
    if name == "Image" or (isinstance(feature, dict) and feature.keys() & {"bytes", "path"}):
        return Form(Kind.IMAGE, text)
    if name == "Value":
        return Form(Kind.BYTES if "binary" in text else Kind.TEXT if "string" in text else Kind.OTHER, text)
    if type(element_of(feature)).__name__ == "ClassLabel":
        return Form(Kind.CLASS, text)
    depth = {"Array2D": 2, "Array3D": 3}.get(name, text.count("list of "))
    dtype = text.rsplit(" ", 1)[-1]
    return Form(Kind.ARRAY if depth in (2, 3) and ("int" in dtype or dtype == "bool") else Kind.OTHER, text)


def _type_name(feature: Any) -> str:
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None:
        return f"list of {_type_name(inner)}"
    name = type(feature).__name__
    if name == "dict":
        return f"struct of {shortened(feature, 4)}"
    if name in ("Array2D", "Array3D", "Array4D", "Array5D"):
        return f"{name} {'x'.join(map(str, feature.shape))} of {feature.dtype}"
    return str(feature.dtype) if name == "Value" else name


def find_columns(dataset: Any, image_column: str, label_column: str, *, where: str) -> Columns:
    """Return the image and label columns: the given names, or for "auto" the only candidate by form and name.

    Raises DataError, which lists the columns, if there are none or several, or if one can't hold images.
    """
    forms = forms_of(dataset)
    image = _find(forms, image_column, "image", _image_candidates(forms), where)
    if forms[image].kind not in CAN_BE_IMAGES:
        raise DataError(
            f"{where}: column '{image}' ({forms[image].text}) can't be read as images; allowed are encoded images "
            "(datasets.Image, or binary), paths (string), and arrays of integers (H, W) or (H, W, 3), one for each row"
        )
    label = _find(forms, label_column, "label", _label_candidates(forms, image), where)
    if forms[label].kind is Kind.UNREAD:
        raise DataError(
            f"{where}: column '{label}' ({forms[label].text}) can't be read as labels; allowed are integers, texts, "
            "booleans, and lists of them"
        )
    if image == label:
        raise DataError(f"{where}: column '{image}' can't be both images and labels; name data.label_column")
    return Columns(image, label)


def _find(forms: Mapping[str, Form], column: str, kind: str, candidates: Sequence[str], where: str) -> str:
    column_list = ", ".join(f"{name} ({form.text})" for name, form in forms.items())
    if column != "auto":
        if column not in forms:
            hint = nearest(column, forms)
            raise DataError(f"data.{kind}_column: '{column}' is not a column of {where}; it has {column_list}.{hint}")
        return column
    if len(candidates) == 1:
        return candidates[0]
    problem = f"several columns may be the {kind}s: {', '.join(candidates)}" if candidates else f"no {kind} column"
    raise DataError(f"{where}: {problem}; set data.{kind}_column. Its columns are {column_list}")


def _image_candidates(forms: Mapping[str, Form]) -> list[str]:
    """Return the columns of images by their form, or else by their names: those of an unfit form last."""
    typed = [name for name, form in forms.items() if form.kind is Kind.IMAGE and not form.text.startswith("struct")]
    usual_names = [name for name in typed if name in IMAGE_NAMES]
    if typed:
        return usual_names if len(typed) > 1 and usual_names else typed
    possible = [name for name in forms if name in IMAGE_NAMES]
    return [name for name in possible if forms[name].kind in CAN_BE_IMAGES] or possible


def _label_candidates(forms: Mapping[str, Form], image: str) -> list[str]:
    others = {name: form for name, form in forms.items() if name != image}
    usual_names = [name for name in others if name in LABEL_NAMES]
    return usual_names or [name for name, form in others.items() if form.kind is Kind.CLASS]


def element_of(feature: Any) -> Any:
    """Return the type of a list's elements, or of the value itself."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None) or feature


def require_columns(dataset: Any, columns: Columns, *, where: str, split: str, train: str) -> None:
    """Raise DataError if a split lacks a column that the split `train` has."""
    forms = forms_of(dataset)
    if columns.label not in forms or columns.image not in forms:
        raise DataError(
            f"{where}: split '{split}' lacks column '{columns.label}' or '{columns.image}', which '{train}' has; "
            f"it has {shortened(forms)}"
        )
