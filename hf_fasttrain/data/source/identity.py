"""What an image is called in every run, by which two runs on the same images find each other's predictions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import xxhash

from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.data.source.fingerprint import add_images
from hf_fasttrain.data.source.records import FileRecords
from hf_fasttrain.run_folder.predictions import Predictions


def with_images(predictions: Predictions, split: Split | None) -> Predictions:
    """Return the predictions for images of a split with the images that they are of, and their groups."""
    rows = predictions.rows.numpy()
    if split is None or (rows < 0).any():
        return predictions
    images = image_ids(split)
    groups = group_ids(split, images)
    images, groups = images[rows], None if groups is None else groups[rows]
    return replace(
        predictions,
        images=torch.from_numpy(images),
        groups=None if groups is None else torch.from_numpy(groups),
    )


def image_ids(split: Split) -> np.ndarray:
    """Return a number (N,) int64 for each image of a split, the same in every run on the same data.

    Of a file it is a hash of its path below the data set's folder, which may be moved; of other images a hash of the
    row and of some of the data set's images.
    """
    rows = split.rows_of(np.arange(len(split))).tolist()
    if isinstance(split.images, FileRecords):
        return _hashes(split.images.names_of(rows))
    key = xxhash.xxh3_64(str(len(split.images)).encode())
    add_images(key, split.images, len(split.images))
    prefix = key.digest()
    return _hashes([prefix + row.to_bytes(8, "little") for row in rows])


def group_ids(split: Split, images: np.ndarray) -> np.ndarray | None:
    """Return a number (N,) int64 for each image's group, that of the image (`images`) itself if it has none.

    None for a split without groups (data.group_column).
    """
    if split.groups is None:
        return None
    codes = split.groups.codes[split.rows_of(np.arange(len(split)))]
    names = _hashes([f"group {name}".encode() for name in split.groups.names])
    return np.where(codes >= 0, names[codes], images) if len(names) else images


def _hashes(names: list[bytes]) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(name) for name in names], np.uint64).view(np.int64)
