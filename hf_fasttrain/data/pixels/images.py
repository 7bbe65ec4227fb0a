"""The images of a split as prepared pixels, from the cache or made anew, and what stands in for bad ones."""

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
KEPT_AT_ONCE = 8 << 20  # bytes of pixels that a worker collects before it writes them to the cache


@dataclass(frozen=True)
class BadImage:
    """An image that can't be decoded, and the one of the same split that stands in for it."""

    split: str
    index: int  # in the split
    path: str | None
    error: str
    substitute: int  # index in the split


Event = BadImage | str  # a note is said once


class Images:
    """Prepared pixels of a split's images. A bad one is replaced by the next good one of the split, label included."""

    def __init__(self, split: Split, preparation: Preparation, cache: PixelCache | None = None) -> None:
        self.split, self.preparation, self.cache = split, preparation, cache
        self._substitutes: dict[int, int] = {}
        self._has_told = False  # of the cache's trouble

    def pixels(self, indices: np.ndarray, used: np.ndarray, events: list[Event]) -> Iterator[tuple[int, Pixels]]:
        """Yield (place in the batch, pixels (H, W, 3)) of all images; each is to be read before the next.

        `used` (B,) is set to the indices whose pixels they are, which differ from `indices` for bad images; what
        there is to tell is appended to `events`. An image that is there more than once is decoded once.
        """
        different: np.ndarray = np.unique(indices)
        if len(different) < len(indices):
            once = np.empty_like(different)
            for place, one in self.pixels(different, once, events):
                for other in np.flatnonzero(indices == different[place]).tolist():
                    used[other] = once[place]
                    yield other, one
            return
        used[...] = indices
        rows = self.split.rows_of(indices)
        found: Iterator[Pixels | None] = iter([None] * len(rows))
        if self.cache is not None:
            found = self.cache.read(rows, self.split.images.stamp)
        kept: list[Kept] = []
        for place, pixels in enumerate(found):
            if pixels is None:
                made, used[place] = self._make(int(indices[place]), kept, events)
                yield place, made
            else:
                yield place, pixels
        self._keep(kept)
        if self.cache is not None and self.cache.trouble and not self._has_told:
            self._has_told = True
            events.append(
                f"data.cache of split '{self.split.name}': {self.cache.trouble}; images that are not in it are "
                "decoded every time"
            )

    def _make(self, index: int, kept: list[Kept], events: list[Event]) -> tuple[Pixels, int]:
        """Return pixels made anew, and the index whose they are."""
        if index in self._substitutes:
            return self._prepare(self._substitutes[index], None), self._substitutes[index]
        try:
            return self._prepare(index, kept), index
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
        """Yield the images that may stand in for a bad one: its neighbours, then others ever farther away."""
        number = len(self.split)
        steps = (step if step <= 16 else (step - 14) ** 3 for step in range(1, SUBSTITUTES_TRIED + 1))
        yield from dict.fromkeys((index + step) % number for step in steps if (index + step) % number != index)

    def _prepare(self, index: int, kept: list[Kept] | None) -> Pixels:
        row = int(self.split.rows_of(np.array([index]))[0])
        keeping = self.cache is not None and self.cache.trouble is None and kept is not None
        stamp = self.split.images.stamp(row) if keeping else (0, 0, 0)  # before the image is read
        pixels, stored = self.preparation.encoded(self.split.images[row])
        if keeping and kept is not None:
            kept.append(Kept(row, stamp, pixels, stored))
            if sum(item.pixels.nbytes for item in kept) > KEPT_AT_ONCE:
                self._keep(kept)
        return pixels

    def _keep(self, kept: list[Kept]) -> None:
        if self.cache is not None:
            self.cache.add(kept)
        kept.clear()


class BadImages:
    """The bad images that a run has met, as listed in bad_images.jsonl; stops the run when they are too many.

    Every process adds its own lines; `count` counts an image once.
    """

    def __init__(self, folder: Path | None, max_fraction: float, note: Callable[[str], None]) -> None:
        self.path = folder / BAD_IMAGES_FILE if folder is not None else None
        self.max_fraction, self.note = max_fraction, note
        self._met: dict[tuple[str, int], BadImage] = {}

    def report(self, event: Event, num_images: int) -> None:
        """Take note of what a loader tells of a split of `num_images`; DataError if too many of them are bad."""
        if isinstance(event, str):
            self.note(event)
            return
        key = (event.split, event.index)
        if key in self._met:
            return
        if not self._met:
            self.note(f"bad images are replaced by others: {_place(event)}; {self.where}")
        self._met[key] = event
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
        bad = [event for event in self._met.values() if event.split == split]
        number = sum(key[0] == split for key in self._listed() | set(self._met))
        if number <= self.max_fraction * num_images:
            return
        first = "\n".join(f"  {_place(event)}" for event in bad[:10])
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
        """Where they are listed."""
        return f"{self.path} lists them" if self.path else "`hf-fasttrain check RECIPE --images` lists them"

    @property
    def count(self) -> int:
        """How many bad images all processes have met, in this run and the ones it goes on from."""
        return len(self._listed() | set(self._met))


def _place(event: BadImage) -> str:
    return f"split '{event.split}', row {event.index}: {event.error}"
