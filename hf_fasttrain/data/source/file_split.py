"""A split of image files (class folders, rows of metadata files) or of images in memory. Made without `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_fasttrain.data.source.columns import Form, Kind
from hf_fasttrain.data.source.records import FileRecords, ImageRecords

IMAGE, LABEL = "image", "label"  # the columns of class folders


@dataclass(frozen=True)
class Groups:
    """The group of each row of a split: a patient, a camera, a video."""

    codes: np.ndarray  # (N,) int64 into `names`; -1: none
    names: list[str]


@dataclass(frozen=True)
class FileSplit:
    """Columns of images, and the others; each has a value for every row."""

    images: Mapping[str, ImageRecords]
    columns: dict[str, Any]  # (N,) int64 class numbers, or an Arrow array
    class_names: list[str] | None = None  # of class numbers, also in lists
    groups: Groups | None = None

    @property
    def forms(self) -> dict[str, Form]:
        """The form of each column."""
        images = {name: Form(Kind.IMAGE, "Image") for name in self.images}
        return images | {name: _form(values) for name, values in self.columns.items()}

    def __len__(self) -> int:
        return len(next(iter(self.images.values())))


def _form(values: Any) -> Form:
    if isinstance(values, np.ndarray):
        return Form(Kind.CLASS, "ClassLabel")
    return Form(Kind.OTHER, str(values.type))


def class_folders(root: str, names: Sequence[str], labels: Sequence[int], class_names: list[str]) -> FileSplit:
    """Return the split of images at `names` below `root`, with the number of each one's class."""
    return FileSplit({IMAGE: FileRecords(root, names)}, {LABEL: np.array(labels, np.int64)}, class_names)
