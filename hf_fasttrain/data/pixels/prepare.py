"""The part of the pipeline that does not depend on the epoch, so that its pixels can be cached."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from typing import Any

from hf_fasttrain.data.pixels.augment import EvalTransform
from hf_fasttrain.data.pixels.decode import MAX_JPEG_SIDE, Pixels, decode, encode_jpeg, read_pixels
from hf_fasttrain.data.pixels.jpeg import reduction
from hf_fasttrain.data.pixels.resize import resize_short_side, size_with_short_side
from hf_fasttrain.data.pixels.rgb import ValueRange

PIXELS_VERSION = 3  # raised whenever the same image and settings give different pixels
PIXEL_MAKERS = ("pillow", "simplejpeg", "torch")  # another version of these may give different pixels too


@dataclass(frozen=True)
class Preparation:
    """Decodes an image; optionally shrinks its short side, crops the centre and compresses it as a JPEG.

    The result depends on the image and these settings only, so it is the same whether it comes from the cache or not.
    """

    short_side: int | None = None
    interpolation: str = "bilinear"
    center: EvalTransform | None = None
    stored_quality: int | None = None
    at_least: int | None = None  # pixels that both sides keep when a JPEG is decoded at a fraction of its size
    pillow: bool = False  # decode JPEGs by Pillow: the same pixels
    value_range: ValueRange | None = None  # of grey of more than 8 bits

    def encoded(self, record: Any) -> tuple[Pixels, bytes | None]:
        """Return the pixels (H, W, 3) of a record and, with `stored_quality`, the JPEG that they were decoded from.

        Images with a side of more than MAX_JPEG_SIDE are not made JPEGs.

        Raises DataError for an image that can't be decoded.
        """
        pixels = read_pixels(record, at_least=self.at_least, pillow=self.pillow, value_range=self.value_range)
        if self.short_side is not None:
            pixels = resize_short_side(pixels, self.short_side, self.interpolation)
        if self.center is not None:
            pixels = self.center(pixels)
        if self.stored_quality is None or max(pixels.shape[:2]) > MAX_JPEG_SIDE:
            return pixels, None
        stored = encode_jpeg(pixels, self.stored_quality)
        return decode(stored, pillow=self.pillow), stored

    def size(self, width: int, height: int, *, jpeg: bool = False) -> tuple[int, int]:
        """Return the (width, height) of the prepared pixels of an image, or JPEG, of this size."""
        if self.center is not None:
            return self.center.image_size, self.center.image_size
        if self.short_side is not None and min(width, height) > self.short_side:
            return size_with_short_side(width, height, self.short_side)
        divisor = reduction(width, height, self.at_least or 0) if jpeg else 1
        return -(-width // divisor), -(-height // divisor)

    def key(self) -> dict[str, Any]:
        """Return everything that determines the pixels, for the cache key."""
        versions = {package: importlib.metadata.version(package) for package in PIXEL_MAKERS}
        settings = {name: value for name, value in asdict(self).items() if name != "pillow"}
        return {**settings, "pixels_version": PIXELS_VERSION, "versions": versions}
