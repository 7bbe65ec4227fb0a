"""A fingerprint of a dataset: its labels in order, and the bytes of a sample of its images."""

from __future__ import annotations

import numpy as np
import xxhash

from hf_fasttrain.data.source.dataset import Source, Split
from hf_fasttrain.data.source.multi_label import LabelArray, MultiLabels, dense_labels
from hf_fasttrain.data.source.records import ImageRecords
from hf_fasttrain.utils.files import read_regular

SAMPLED = 16  # images of each split whose bytes are read
MAX_DENSE = 4_000_000_000  # labels x classes, which take some seconds
ROWS_AT_ONCE = 1000


def fingerprint(source: Source) -> str:
    """Return a short text that identifies the data independently of its location: sizes and a hash.

    Hashed are the class names and, for the training and the evaluation split, all labels, the rows of the dataset
    that belong to it, and the encoded bytes of SAMPLED images spread over it. A replaced image may go unnoticed.
    """
    hashed = xxhash.xxh3_64()
    hashed.update("\0".join(source.class_names).encode())
    for split in (source.train, source.evaluation):
        _add(hashed, split)
    images = f"{len(source.train):,} + {len(source.evaluation):,} images"
    return f"{images}, {len(source.class_names)} classes, {hashed.hexdigest()}"


def _add_labels(hashed: xxhash.xxh3_64, labels: LabelArray) -> None:
    """Add class numbers, or multi-hot vectors, which older versions stored; beyond MAX_DENSE only their classes."""
    if isinstance(labels, MultiLabels) and len(labels) * labels.num_classes > MAX_DENSE:
        hashed.update(labels.offsets.tobytes())
        hashed.update(labels.classes.tobytes())
        return
    for start in range(0, len(labels), ROWS_AT_ONCE):
        rows = dense_labels(labels, slice(start, start + ROWS_AT_ONCE))
        hashed.update(np.ascontiguousarray(rows).tobytes())


def _add(hashed: xxhash.xxh3_64, split: Split) -> None:
    _add_labels(hashed, split.labels)
    if not len(split):
        return
    if split.rows is not None:
        hashed.update(np.ascontiguousarray(split.rows).tobytes())
    add_images(hashed, split.images, len(split), split.rows)


def add_images(hashed: xxhash.xxh3_64, images: ImageRecords, number: int, rows: np.ndarray | None = None) -> None:
    """Add the encoded bytes of SAMPLED of `number` images, those at `rows`; None: of all."""
    sampled = np.unique(np.linspace(0, number - 1, SAMPLED, dtype=np.int64))
    for row in (sampled if rows is None else rows[sampled]).tolist():
        record = images[row]
        hashed.update(b"image")
        if record["bytes"] is not None:
            hashed.update(bytes(record["bytes"]))
        elif record["path"] is not None:
            try:
                hashed.update(read_regular(record["path"]))
            except (OSError, ValueError):
                hashed.update(b"unreadable")  # a bad image, which gets a substitute in training
