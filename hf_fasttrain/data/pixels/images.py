"""The prepared pixels of a split's images, cached or decoded, and the substitutes of bad images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_fasttrain.data.pixels.bad_images import BadImage, Event
from hf_fasttrain.data.pixels.cache import PixelCache, StoredPixels
from hf_fasttrain.data.pixels.decode import Pixels
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.utils.errors import DataError

SUBSTITUTES_TRIED = 100
CACHE_WRITE_BYTES = 8 << 20  # pixels that a worker collects before it writes them to the cache


class Images:
    """The prepared pixels of a split. A bad image is replaced by the next good one of the split, label included."""

    def __init__(self, split: Split, preparation: Preparation, cache: PixelCache | None = None) -> None:
        self.split, self.preparation, self.cache = split, preparation, cache
        self._substitutes: dict[int, int] = {}
        self._has_reported = False  # the cache's problem

    def pixels(self, indices: np.ndarray, used: np.ndarray, events: list[Event]) -> Iterator[tuple[int, Pixels]]:
        """Yield (position in the batch, pixels (H, W, 3)) of all images; use each before the next is requested.

        `used` (B,) is set to the indices whose pixels they are, which differ from `indices` for bad images. Bad images
        and notes are appended to `events`. An image that occurs more than once is decoded once.
        """
        unique: np.ndarray = np.unique(indices)
        if len(unique) < len(indices):
            unique_used = np.empty_like(unique)
            for number, pixels in self.pixels(unique, unique_used, events):
                for position in np.flatnonzero(indices == unique[number]).tolist():
                    used[position] = unique_used[number]
                    yield position, pixels
            return
        used[...] = indices
        rows = self.split.rows_of(indices)
        cached: Iterator[Pixels | None] = iter([None] * len(rows))
        if self.cache is not None:
            cached = self.cache.read(rows, self.split.images.stamp)
        to_cache: list[StoredPixels] = []
        for position, cached_pixels in enumerate(cached):
            if cached_pixels is None:
                decoded, used[position] = self._decode(int(indices[position]), to_cache, events)
                yield position, decoded
            else:
                yield position, cached_pixels
        self._write_to_cache(to_cache)
        if self.cache is not None and self.cache.problem and not self._has_reported:
            self._has_reported = True
            events.append(
                f"data.cache of split '{self.split.name}': {self.cache.problem}; images that are not in it are "
                "decoded every time"
            )

    def _decode(self, index: int, to_cache: list[StoredPixels], events: list[Event]) -> tuple[Pixels, int]:
        """Return the pixels of an image, or of its substitute, and their index."""
        if index in self._substitutes:
            return self._prepare(self._substitutes[index], None), self._substitutes[index]
        try:
            return self._prepare(index, to_cache), index
        except DataError as error:
            reason = str(error)
        for other in self._candidates(index):
            try:
                pixels = self._prepare(other, None)
            except DataError:
                continue
            self._substitutes[index] = other
            path = self.split.records([index])[0]["path"]
            events.append(BadImage(self.split.name, index, path, reason, other))
            return pixels, other
        raise DataError(
            f"split '{self.split.name}', row {index}: {reason}; nor can any of {SUBSTITUTES_TRIED} other images"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield the possible substitutes of a bad image: its neighbours, then images farther and farther away."""
        number = len(self.split)
        steps = (step if step <= 16 else (step - 14) ** 3 for step in range(1, SUBSTITUTES_TRIED + 1))
        yield from dict.fromkeys((index + step) % number for step in steps if (index + step) % number != index)

    def _prepare(self, index: int, to_cache: list[StoredPixels] | None) -> Pixels:
        row = int(self.split.rows_of(np.array([index]))[0])
        writes = self.cache is not None and self.cache.problem is None and to_cache is not None
        stamp = self.split.images.stamp(row) if writes else (0, 0, 0)  # before the image is read
        pixels, jpeg = self.preparation.encoded(self.split.images[row])
        if writes and to_cache is not None:
            to_cache.append(StoredPixels(row, stamp, pixels, jpeg))
            if sum(item.pixels.nbytes for item in to_cache) > CACHE_WRITE_BYTES:
                self._write_to_cache(to_cache)
        return pixels

    def _write_to_cache(self, items: list[StoredPixels]) -> None:
        if self.cache is not None:
            self.cache.add(items)
        items.clear()
