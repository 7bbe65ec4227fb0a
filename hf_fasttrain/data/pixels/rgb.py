"""Images of any of Pillow's modes as 8-bit RGB pixels, converted in tiles: whole copies would take gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from hf_fasttrain.data.pixels.jpeg import Pixels
from hf_fasttrain.data.pixels.limits import UnusableImage


class ValueRange(NamedTuple):
    """The values of deep grey (more than 8 bits) that become black and white.

    Values beyond are cut off if `clips`, else they raise UnusableImage: the range is an assumption then.
    """

    low: float
    high: float
    clips: bool = True


# Of images of which nothing else is known, by mode, whatever values an image has: the same value is the same grey in
# all images of a data set. Pillow scales 16-bit PGMs of any maximum to 65535 and gives them mode I.
INTEGERS, FLOATS = ValueRange(0, 65535, clips=False), ValueRange(0, 1, clips=False)
_TILE = 1 << 20  # pixels that are converted at a time
_BEYOND = 0.01  # of the range, by which values may be outside of it, as after resampling


def is_deep(mode: str) -> bool:
    """Return whether a mode is grey of more than 8 bits: 16-bit, 32-bit integers or floats."""
    return mode.startswith("I") or mode == "F"


def default_range(mode: str) -> ValueRange:
    """Return the range that images of a deep mode are taken to have."""
    return FLOATS if mode == "F" else INTEGERS


class Grey(NamedTuple):
    """What values a deep image has; the extremes are of its finite ones, 0 without any."""

    kind: str  # integers or floats
    lowest: float
    highest: float
    has_nan: bool


def grey_values(image: Image.Image) -> Grey:
    """Return what values an image of a deep mode has."""
    lowest, highest, has_nan = np.inf, -np.inf, False
    for box in _tiles(*image.size):
        values = np.asarray(image.crop(box))
        finite = values[np.isfinite(values)] if image.mode == "F" else values
        has_nan = has_nan or bool(np.isnan(values).any())
        if finite.size:
            lowest, highest = min(lowest, float(finite.min())), max(highest, float(finite.max()))
    extremes = (lowest, highest) if lowest <= highest else (0.0, 0.0)
    return Grey("floats" if image.mode == "F" else "integers", *extremes, has_nan)


def to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """Return an 8-bit RGB image; see `rgb_pixels`."""
    return image if image.mode == "RGB" else Image.fromarray(rgb_pixels(image, value_range))


def rgb_pixels(image: Image.Image, value_range: ValueRange | None = None, most: float | None = None) -> Pixels:
    """Return the RGB pixels (H, W, 3) of a Pillow image; alpha is dropped.

    Deep grey (16-bit, 32-bit integers, floats) is scaled so that `value_range` becomes 0 to 255; by default the mode's,
    up to `most` if the file declares a maximum. NaN is black. Raises UnusableImage for values beyond a range that does
    not clip. Of colour of 16 bits Pillow has kept the upper 8.
    """
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    grey = _Grey(image.mode, value_range, most) if is_deep(image.mode) else None
    for box in _tiles(width, height):
        left, top, right, bottom = box
        part = image if box == (0, 0, width, height) else image.crop(box)
        values = np.asarray(_in_colour(part) if grey is None else part)
        pixels[top:bottom, left:right] = values if grey is None else grey.levels(values)[..., None]
    if grey is not None:
        grey.require_in_range()
    return pixels


def _tiles(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (left, top, right, bottom) of the parts of an image; one part for images of usual sizes."""
    across = min(width, _TILE)
    down = max(1, _TILE // max(1, across))
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(width, left + across), min(height, top + down)


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns otherwise; the colours are the palette's either way
    return image if image.mode == "RGB" else image.convert("RGB")


class _Grey:
    """Scales deep grey to 8 bits, part by part, and keeps the extremes that it saw."""

    def __init__(self, mode: str, value_range: ValueRange | None, most: float | None) -> None:
        default = default_range(mode)
        self.mode, self.range = mode, value_range or default._replace(high=most or default.high)
        self.lowest, self.highest = np.inf, -np.inf

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Return values (H, W) as 0 to 255."""
        low, high, clips = self.range
        if not clips:
            finite = values[np.isfinite(values)] if self.mode == "F" else values
            if finite.size:
                self.lowest, self.highest = min(self.lowest, finite.min()), max(self.highest, finite.max())
        if values.dtype.itemsize == 2:
            return _table(low, high)[values]
        with np.errstate(invalid="ignore"):  # of signalling NaN
            values = values.astype(np.float64)
        return _scaled(np.nan_to_num(values, copy=False, nan=low, posinf=np.inf, neginf=-np.inf), low, high)

    def require_in_range(self) -> None:
        """Raise UnusableImage if values were beyond a range that does not clip."""
        low, high, _ = self.range
        beyond = _BEYOND * (high - low)
        if self.lowest >= low - beyond and self.highest <= high + beyond:
            return
        kind = "floats" if self.mode == "F" else "integers"
        raise UnusableImage(
            f"its {kind} are from {self.lowest:g} to {self.highest:g}, and those of the data set are taken to be from "
            f"{low:g} (black) to {high:g} (white)",
            "set data.value_range to what all images have, such as "
            f"[{min(0.0, self.lowest):g}, {self.highest:g}], or remove it",
        )


@lru_cache(maxsize=4)
def _table(low: float, high: float) -> np.ndarray:
    """Return the levels of all values of 16 bits."""
    return _scaled(np.arange(65536, dtype=np.float64), low, high)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return values as levels; they are overwritten."""
    values -= low
    values *= 255 / (high - low)
    return np.clip(np.round(values, out=values), 0, 255, out=values).astype(np.uint8)
