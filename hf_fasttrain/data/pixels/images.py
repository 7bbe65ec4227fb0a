"""The prepared pixels of a split's images, cached or decoded, and the substitutes of bad images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hf_fasttrain.data.pixels.cache import Kept, PixelCache
from hf_fasttrain.data.pixels.decode import Pixels
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.files import append_line, read_lines, reason

BAD_IMAGES_FILE = "bad_images.jsonl"
SUBSTITUTES_TRIED = 100
CACHE_WRITE_BYTES = 8 << 20  # pixels that a worker collects before it writes them to the cache


@dataclass(frozen=True)
class BadImage:
    """An image that can't be decoded, and its substitute from the same split."""

    split: str
    index: int  # in the split
    path: str | None
    error: str
    substitute: int  # index in the split


Event = BadImage | str  # a str is a note, which is shown once


class Images:
    """The prepared pixels of a split. A bad image is replaced by the next good one of the split, label included."""

    def __init__(self, split: Split, preparation: Preparation, cache: PixelCache | None = None) -> None:
        self.split, self.preparation, self.cache = split, preparation, cache
        self._substitutes: dict[int, int] = {}
        self._has_reported = False  # the cache's trouble

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
        to_cache: list[Kept] = []
        for position, cached_pixels in enumerate(cached):
            if cached_pixels is None:
                decoded, used[position] = self._decode(int(indices[position]), to_cache, events)
                yield position, decoded
            else:
                yield position, cached_pixels
        self._write_to_cache(to_cache)
        if self.cache is not None and self.cache.trouble and not self._has_reported:
            self._has_reported = True
            events.append(
                f"data.cache of split '{self.split.name}': {self.cache.trouble}; images that are not in it are "
                "decoded every time"
            )

    def _decode(self, index: int, to_cache: list[Kept], events: list[Event]) -> tuple[Pixels, int]:
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

    def _prepare(self, index: int, to_cache: list[Kept] | None) -> Pixels:
        row = int(self.split.rows_of(np.array([index]))[0])
        writes = self.cache is not None and self.cache.trouble is None and to_cache is not None
        stamp = self.split.images.stamp(row) if writes else (0, 0, 0)  # before the image is read
        pixels, jpeg = self.preparation.encoded(self.split.images[row])
        if writes and to_cache is not None:
            to_cache.append(Kept(row, stamp, pixels, jpeg))
            if sum(item.pixels.nbytes for item in to_cache) > CACHE_WRITE_BYTES:
                self._write_to_cache(to_cache)
        return pixels

    def _write_to_cache(self, items: list[Kept]) -> None:
        if self.cache is not None:
            self.cache.add(items)
        items.clear()


class BadImages:
    """The bad images of a run, as listed in bad_images.jsonl; stops the run if there are too many.

    Every process appends its own lines; `count` counts each image once.
    """

    def __init__(self, folder: Path | None, max_fraction: float, note: Callable[[str], None]) -> None:
        self.path = folder / BAD_IMAGES_FILE if folder is not None else None
        self.max_fraction, self.note = max_fraction, note
        self._bad: dict[tuple[str, int], BadImage] = {}

    def report(self, event: Event, num_images: int) -> None:
        """Record an event of a split with `num_images` images; DataError if too many of them are bad."""
        if isinstance(event, str):
            self.note(event)
            return
        key = (event.split, event.index)
        if key in self._bad:
            return
        if not self._bad:
            self.note(f"bad images are replaced by others: {_describe(event)}; {self.where}")
        self._bad[key] = event
        self._write(event)
        self._require_few(event.split, num_images)

    def _write(self, event: BadImage) -> None:
        if self.path is None or (event.split, event.index) in self._listed():
            return
        try:
            append_line(self.path, json.dumps(asdict(event)))
        except OSError as error:
            self.note(f"{self.path} can't be written ({reason(error)}): not all bad images are listed there")

    def _listed(self) -> set[tuple[str, int]]:
        return set() if self.path is None else {(line["split"], line["index"]) for line in read_lines(self.path)}

    def _require_few(self, split: str, num_images: int) -> None:
        bad = [event for event in self._bad.values() if event.split == split]
        number = sum(key[0] == split for key in self._listed() | set(self._bad))
        if number <= self.max_fraction * num_images:
            return
        first = "\n".join(f"  {_describe(event)}" for event in bad[:10])
        more = f"\n  ... and {number - len(bad[:10])} more" if number > len(bad[:10]) else ""
        error = DataError(
            f"data.max_bad_fraction={self.max_fraction}: {number} of {num_images:,} images of split '{split}' "
            f"can't be decoded; `hf-fasttrain check RECIPE --images` finds them all; repair them, remove them or "
            f"raise data.max_bad_fraction:\n{first}{more}"
        )
        error.on_every_process = False
        raise error

    @property
    def where(self) -> str:
        """Where bad images are listed, for messages."""
        return f"{self.path} lists them" if self.path else "`hf-fasttrain check RECIPE --images` lists them"

    @property
    def count(self) -> int:
        """Number of bad images on all processes, including runs that this one has resumed."""
        return len(self._listed() | set(self._bad))


def _describe(event: BadImage) -> str:
    return f"split '{event.split}', row {event.index}: {event.error}"
