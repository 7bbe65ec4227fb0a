"""Batches of a user's loader: a pair, or a mapping with one entry of images and one of labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_fasttrain.utils.errors import DataError, shortened

# Names of transformers' collators and of datasets.
IMAGE_KEYS = ("pixel_values", "image", "images", "img")
LABEL_KEYS = ("labels", "label", "targets", "target")
ALLOWED = (
    "a batch is (images, targets), or a mapping with one entry of images "
    f"({', '.join(IMAGE_KEYS)}) and one of labels ({', '.join(LABEL_KEYS)})"
)


def images_and_targets(batch: Any, name: str) -> tuple[Any, Any]:
    """Return (images, targets) of a batch of the loader `name`. Raises DataError for any other batch."""
    if isinstance(batch, Mapping):
        return _from_mapping(batch, name)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    description, hint = _describe(batch), ""
    if isinstance(batch, tuple | list):
        description += f" of {len(batch)}: {shortened(map(_describe, batch), 4)}"
        hint = "; put what else the loss needs into the targets" if len(batch) > 2 else ""
    raise DataError(f"a batch of {name} is {description}; {ALLOWED}{hint}")


def _from_mapping(batch: Mapping[Any, Any], name: str) -> tuple[Any, Any]:
    images, labels = ([key for key in names if key in batch] for names in (IMAGE_KEYS, LABEL_KEYS))
    if len(images) != 1 or len(labels) != 1:
        raise DataError(f"a batch of {name} is a mapping with {shortened(batch)}; {ALLOWED}")
    others = [key for key in batch if key not in (images[0], labels[0])]
    if others:
        raise DataError(
            f"a batch of {name} has {shortened(others)} in addition to {images[0]} and {labels[0]}, which would not be "
            "used; drop it in the loader's collate_fn, or return (images, targets) with what the loss needs in the "
            "targets"
        )
    return batch[images[0]], batch[labels[0]]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"
