"""What a batch of a user's loader is: a pair, or a mapping with one entry of images and one of labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_fasttrain.utils.errors import DataError, shortened

# Names of transformers' collators and of datasets.
OF_IMAGES = ("pixel_values", "image", "images", "img")
OF_LABELS = ("labels", "label", "targets", "target")
ALLOWED = (
    "a batch is (images, targets), or a mapping with one entry of images "
    f"({', '.join(OF_IMAGES)}) and one of labels ({', '.join(OF_LABELS)})"
)


def pair_of(batch: Any, name: str) -> tuple[Any, Any]:
    """Return (images, targets) of a batch of the loader `name`. Raises DataError for anything else, and for more."""
    if isinstance(batch, Mapping):
        return _pair_in(batch, name)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    found, more = _described(batch), ""
    if isinstance(batch, tuple | list):
        found += f" of {len(batch)}: {shortened(map(_described, batch), 4)}"
        more = "; put what else the loss needs into the targets" if len(batch) > 2 else ""
    raise DataError(f"a batch of {name} is {found}; {ALLOWED}{more}")


def _pair_in(batch: Mapping[Any, Any], name: str) -> tuple[Any, Any]:
    images, labels = ([key for key in known if key in batch] for known in (OF_IMAGES, OF_LABELS))
    if len(images) != 1 or len(labels) != 1:
        raise DataError(f"a batch of {name} is a mapping with {shortened(batch)}; {ALLOWED}")
    others = [key for key in batch if key not in (images[0], labels[0])]
    if others:
        raise DataError(
            f"a batch of {name} has {shortened(others)} beside {images[0]} and {labels[0]}, and nothing would be done "
            "with that; leave it out in the loader's collate_fn, or give (images, targets) with what the loss needs "
            "among the targets"
        )
    return batch[images[0]], batch[labels[0]]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"
