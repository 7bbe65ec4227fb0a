"""Batches of image files without labels: bad images are left out, not replaced."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fasttrain.data.loading.prefetch import ImageBatches, PixelBatch, pixel_buffer
from hf_fasttrain.data.loading.sampler import MicroBatchKey
from hf_fasttrain.data.pixels.bad_images import BadImage, Event
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.records import ImageRecords
from hf_fasttrain.utils.errors import DataError


class FileBatches(ImageBatches):
    """Builds the uint8 pixels (B, S, S, 3) of a key's images; the `labels` (B,) are the indices of those it holds.

    An image that can't be decoded is an event, and in no batch: a batch has fewer images than its key, or none.
    """

    def __init__(self, records: ImageRecords, preparation: Preparation, image_size: int) -> None:
        self.records, self.preparation, self.image_size = records, preparation, image_size

    @property
    def num_images(self) -> int:
        """Number of images, bad ones included."""
        return len(self.records)

    def make(self, key: MicroBatchKey, buffer: Tensor | None = None) -> PixelBatch:
        """Return the batch of a key; its pixels are written to `buffer` (bytes) if they fit."""
        pixels = pixel_buffer(buffer, len(key.indices), self.image_size, self.image_size)
        good: list[int] = []
        events: list[Event] = []
        for index in key.indices.tolist():
            record = self.records[index]
            try:
                pixels.numpy()[len(good)] = self.preparation.encoded(record)[0]
                good.append(index)
            except DataError as error:
                events.append(BadImage("", index, record["path"], str(error), -1))
        return PixelBatch(pixels[: len(good)], torch.tensor(good, dtype=torch.int64), tuple(events))

    def max_bytes(self, num_images: int) -> int:
        """Return the number of bytes that the pixels of `num_images` images need."""
        return num_images * self.image_size**2 * 3
