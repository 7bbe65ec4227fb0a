"""Small data sets that live on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.loading.batch import augment_on_device
from hf_fasttrain.data.loading.prefetch import Batch, Feed, ImageBatches, Restartable
from hf_fasttrain.data.loading.sampler import MicroBatchKey


class DeviceFeed(Feed):
    """A feed for small data sets: every image is brought to the device once and stays there as uint8 pixels.

    Each is fetched by the workers when it is first needed; crop, flip and erasing are done on the device for the
    whole batch, with the same numbers and the same pixels as on the host. `rows` are those of the split that this
    process reads, by default all; the memory for them is taken when the first one is read.
    """

    def __init__(
        self, images: ImageBatches, device: torch.device, size: int, *, rows: range | None = None, **options: Any
    ) -> None:
        transform, split = images.transform, images.images.split
        super().__init__(ImageBatches(images.images), device, **options)
        self.transform, self.size = transform, size
        self.fill: Tensor | None = None  # erasing's colour
        if transform is not None and transform.erase_fill is not None:
            self.fill = torch.tensor(transform.erase_fill, dtype=torch.uint8, device=device)
        self.rows = range(len(split)) if rows is None else rows
        self.there = np.ones(len(split), bool)  # of those that are read
        self.there[self.rows.start : self.rows.stop] = False
        self._pixels: Tensor | None = None
        self._labels: Tensor | None = None
        self._is_given_up = False

    @property
    def pixels(self) -> Tensor:
        """All pixels (N, S, S, 3) uint8; those of a row that is not `there` yet are arbitrary."""
        if self._pixels is None:
            shape = (len(self.rows), self.size, self.size, 3)
            self._pixels = torch.empty(shape, dtype=torch.uint8, device=self.device)
        return self._pixels

    @property
    def labels(self) -> Tensor:
        """The labels of all pixels."""
        if self._labels is None:
            own = self.images.images.split.labels[self.rows.start : self.rows.stop]
            self._labels = torch.from_numpy(own).to(self.device, copy=True)
        return self._labels

    def release_memory(self) -> int:
        """Give up keeping images that are not augmented, and return the bytes that this frees on the device."""
        if self.transform is not None or self._pixels is None:
            return 0
        freed = self._pixels.nbytes
        self._pixels = self._labels = None
        self._is_given_up = True
        return freed

    def open(self, keys: Iterable[MicroBatchKey], largest: int, *, persistent: bool = False) -> Iterable[Batch]:
        """Return the batches of keys, which can be gone through more than once; see `Feed.open`."""
        return Restartable(lambda: self._batches(keys, largest))

    def _batches(self, keys: Iterable[MicroBatchKey], largest: int) -> Iterator[Batch]:
        if self._is_given_up:
            yield from super().open(keys, largest)
            return
        asked: deque[tuple[int, np.ndarray]] = deque()  # number of the key, rows that it is the first to need
        fetched = iter(super().open(self._missing(keys, asked), largest)) if not self.there.all() else iter(())
        arriving = next(fetched, None)
        for number, key in enumerate(keys):
            while arriving is not None and asked and asked[0][0] <= number:
                rows = asked.popleft()[1]
                self._place(rows, *arriving)
                arriving = next(fetched, None)
            yield self._batch(key)

    def _missing(self, keys: Iterable[MicroBatchKey], asked: deque[tuple[int, np.ndarray]]) -> Iterator[MicroBatchKey]:
        requested = self.there.copy()
        for number, key in enumerate(keys):
            rows = np.unique(key.indices[~requested[key.indices]])
            if len(rows):
                requested[rows] = True
                asked.append((number, rows))
                yield MicroBatchKey(key.epoch, rows)
            if requested.all():
                return

    def _place(self, rows: np.ndarray, pixels: Tensor, labels: Tensor) -> None:
        places = torch.from_numpy(rows - self.rows.start).to(self.device, non_blocking=True)
        self.pixels[places], self.labels[places] = pixels, labels
        self.there[rows] = True

    def _batch(self, key: MicroBatchKey) -> Batch:
        rows = torch.from_numpy(key.indices - self.rows.start).to(self.device, non_blocking=True)
        labels = self.labels[rows]
        if self.transform is None:
            return self.pixels[rows], labels
        if self.device.type == "cpu":
            batch = torch.empty((len(rows), self.size, self.size, 3), dtype=torch.uint8)
            own = self.pixels.numpy()
            self.transform.write(((row, own[place]) for row, place in enumerate(rows.tolist())), key, batch.numpy())
            return batch, labels
        return augment_on_device(self.pixels, rows, self.transform, key, self.fill), labels
