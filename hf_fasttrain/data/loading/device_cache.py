"""data.cache=device: small datasets whose images are stored on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.loading.batch import augment_on_device
from hf_fasttrain.data.loading.prefetch import Batch, ImageBatches, Prefetcher, Restartable
from hf_fasttrain.data.loading.sampler import MicroBatchKey
from hf_fasttrain.data.pixels.custom_transform import CustomTransform
from hf_fasttrain.data.source.multi_label import dense_labels


class DevicePrefetcher(Prefetcher):
    """A prefetcher for small datasets: every image is copied to the device once and stays there as uint8 pixels.

    Workers load an image when it is first needed. Crop, flip and erasing run on the device for the whole batch, with
    the same random numbers and the same pixels as on the host. `rows` are the rows of the split that this process
    reads, by default all; memory for them is allocated when the first one is read.
    """

    def __init__(
        self, images: ImageBatches, device: torch.device, size: int, *, rows: range | None = None, **options: Any
    ) -> None:
        transform, split = images.transform, images.images.split
        assert not isinstance(transform, CustomTransform)  # runs in loader processes only
        super().__init__(ImageBatches(images.images), device, **options)
        self.transform, self.size = transform, size
        self.fill: Tensor | None = None  # colour of random erasing
        if transform is not None and isinstance(transform.erase_fill, tuple):
            self.fill = torch.tensor(transform.erase_fill, dtype=torch.uint8, device=device)
        self.rows = range(len(split)) if rows is None else rows
        self.is_loaded = np.ones(len(split), bool)  # (N,); rows that are never read count as loaded
        self.is_loaded[self.rows.start : self.rows.stop] = False
        self._pixels: Tensor | None = None
        self._labels: Tensor | None = None
        self._is_disabled = False

    @property
    def pixels(self) -> Tensor:
        """All pixels (N, S, S, 3) uint8; undefined for a row until `is_loaded`."""
        if self._pixels is None:
            shape = (len(self.rows), self.size, self.size, 3)
            self._pixels = torch.empty(shape, dtype=torch.uint8, device=self.device)
        return self._pixels

    @property
    def labels(self) -> Tensor:
        """The labels of `pixels`, (N,) or (N, K)."""
        if self._labels is None:
            labels = dense_labels(self.images.images.split.labels, slice(self.rows.start, self.rows.stop))
            self._labels = torch.from_numpy(labels).to(self.device, copy=True)
        return self._labels

    def release_memory(self) -> int:
        """Stop caching images that are not augmented (evaluation), and return the bytes freed on the device."""
        if self.transform is not None or self._pixels is None:
            return 0
        freed = self._pixels.nbytes
        self._pixels = self._labels = None
        self._is_disabled = True
        return freed

    def open(self, keys: Iterable[MicroBatchKey], largest: int, *, persistent: bool = False) -> Iterable[Batch]:
        """Return an iterable over the batches of keys, which can be iterated again; see `Prefetcher.open`."""
        return Restartable(lambda: self._batches(keys, largest))

    def _batches(self, keys: Iterable[MicroBatchKey], largest: int) -> Iterator[Batch]:
        if self._is_disabled:
            yield from super().open(keys, largest)
            return
        queued: deque[tuple[int, np.ndarray]] = deque()  # index of the key, rows that it needs first
        batches = iter(super().open(self._missing(keys, queued), largest)) if not self.is_loaded.all() else iter(())
        loaded = next(batches, None)
        for number, key in enumerate(keys):
            while loaded is not None and queued and queued[0][0] <= number:
                rows = queued.popleft()[1]
                self._store(rows, *loaded)
                loaded = next(batches, None)
            yield self._batch(key)

    def _missing(self, keys: Iterable[MicroBatchKey], queued: deque[tuple[int, np.ndarray]]) -> Iterator[MicroBatchKey]:
        requested = self.is_loaded.copy()
        for number, key in enumerate(keys):
            rows = np.unique(key.indices[~requested[key.indices]])
            if len(rows):
                requested[rows] = True
                queued.append((number, rows))
                yield MicroBatchKey(key.epoch, rows)
            if requested.all():
                return

    def _store(self, rows: np.ndarray, pixels: Tensor, labels: Tensor) -> None:
        positions = torch.from_numpy(rows - self.rows.start).to(self.device, non_blocking=True)
        self.pixels[positions], self.labels[positions] = pixels, labels
        self.is_loaded[rows] = True

    def _batch(self, key: MicroBatchKey) -> Batch:
        rows = torch.from_numpy(key.indices - self.rows.start).to(self.device, non_blocking=True)
        labels = self.labels[rows]
        if self.transform is None:
            return self.pixels[rows], labels
        if self.device.type == "cpu":
            batch = torch.empty((len(rows), self.size, self.size, 3), dtype=torch.uint8)
            pixels = self.pixels.numpy()
            images = ((position, pixels[row]) for position, row in enumerate(rows.tolist()))
            self.transform.write(images, key, batch.numpy())
            return batch, labels
        return augment_on_device(self.pixels, rows, self.transform, key, self.fill), labels
