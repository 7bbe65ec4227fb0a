"""Small data sets that live on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.batch import augment_on_device
from hf_fasttrain.data.feed import Again, Batch, Feed, ImageBatches
from hf_fasttrain.data.order import MicroBatchKey


class DeviceFeed(Feed):
    """A feed for small data sets: every image is brought to the device once and stays there as uint8 pixels.

    Each is fetched by the workers when it is first needed; crop, flip and erasing are done on the device for the
    whole batch, with the same numbers and the same pixels as on the host.
    """

    def __init__(self, images: ImageBatches, device: torch.device, size: int, **options: Any) -> None:
        transform, split = images.transform, images.images.split
        super().__init__(ImageBatches(images.images), device, **options)
        self.transform, self.size = transform, size
        self.pixels = torch.empty((len(split), size, size, 3), dtype=torch.uint8, device=device)
        self.labels = torch.from_numpy(split.labels).to(device, copy=True)
        self.there = np.zeros(len(split), bool)

    def open(self, keys: Iterable[MicroBatchKey], largest: int, *, persistent: bool = False) -> Iterable[Batch]:
        """Return the batches of keys, which can be gone through more than once; see `Feed.open`."""
        return Again(lambda: self._batches(keys, largest))

    def _batches(self, keys: Iterable[MicroBatchKey], largest: int) -> Iterator[Batch]:
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
        places = torch.from_numpy(rows).to(self.device, non_blocking=True)
        self.pixels[places], self.labels[places] = pixels, labels
        self.there[rows] = True

    def _batch(self, key: MicroBatchKey) -> Batch:
        rows = torch.from_numpy(key.indices).to(self.device, non_blocking=True)
        labels = self.labels[rows]
        if self.transform is None:
            return self.pixels[rows], labels
        if self.device.type == "cpu":
            batch = torch.empty((len(rows), self.size, self.size, 3), dtype=torch.uint8)
            own = self.pixels.numpy()
            self.transform.write(((row, own[index]) for row, index in enumerate(key.indices)), key, batch.numpy())
            return batch, labels
        return augment_on_device(self.pixels, rows, self.transform, key), labels
