"""How much an image may take to be decoded: pixels, bytes of memory and work. docs/data.md has the same numbers.

The limits are the same on every machine, so that the same images are bad everywhere. They are compared with what a
file's header says, before anything is decoded: a few hundred bytes can claim any size.
"""

from __future__ import annotations

from hf_fasttrain.utils.format import format_bytes

MAX_PIXELS = 178_956_970  # twice Pillow's MAX_IMAGE_PIXELS, beyond which Pillow refuses too
MAX_MEMORY = 3 << 29  # bytes, of the encoded image and all that is made of it; 1.6 GB
MAX_SCAN_PIXELS = 10 * MAX_PIXELS  # pixels of a JPEG times its scans: 3 to 6 s
MAX_RLE_PIXELS = 1 << 24  # of run-length encoded BMPs, which Pillow decodes in Python: about a second
MAX_PARTS = 1 << 18  # chunks of a PNG, strips of a TIFF, segments of a JPEG: seconds of Python


class UnusableImage(ValueError):
    """An image that is not damaged, but can't be used; `advice` says what to do about it."""

    def __init__(self, reason: str, advice: str = "shrink it or remove it") -> None:
        super().__init__(reason)
        self.advice = advice


def require_pixels(width: int, height: int, most: int | None = None) -> None:
    """Raise UnusableImage for an image of too many pixels, ValueError for one of none."""
    if width <= 0 or height <= 0:
        raise ValueError(f"{width} x {height} pixels")
    most = MAX_PIXELS if most is None else most
    if width * height > most:
        raise UnusableImage(f"{width:,} x {height:,} pixels are more than {most:,}: a decompression bomb?")


def require_memory(num_bytes: float) -> None:
    """Raise UnusableImage if an image needs more than MAX_MEMORY bytes to be decoded."""
    if num_bytes > MAX_MEMORY:
        raise UnusableImage(
            f"it takes {format_bytes(num_bytes)} of memory to decode, more than {format_bytes(MAX_MEMORY)}: "
            "a decompression bomb?"
        )


def require_parts(number: int, kind: str) -> None:
    """Raise UnusableImage for an image of too many parts, each of which takes time."""
    if number > MAX_PARTS:
        raise UnusableImage(f"it has more than {MAX_PARTS:,} {kind}")
