"""Damage that Pillow ignores: checksums that it skips, JPEGs in TIFFs, and LOAD_TRUNCATED_IMAGES set by a library."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from PIL import ImageFile

from hf_fasttrain.data.pixels.jpeg import Encoded, UnsupportedJpeg, verify_jpeg

_INFLATED_AT_ONCE = 1 << 20  # bytes
_COMPRESSION, _JPEG_TABLES = 259, 347  # TIFF's tags
_DATA_TAGS = ((273, 279), (324, 325))  # offsets and lengths: of strips, of tiles
_JPEG, _DEFLATE = 7, (8, 32946)


class _StrictMode:
    """Counts the decoding threads, so that the last one restores Pillow's setting."""

    def __init__(self) -> None:
        self.lock, self.number, self.lenient = threading.Lock(), 0, False

    def enter(self) -> None:
        with self.lock:
            if not self.number:
                self.lenient = ImageFile.LOAD_TRUNCATED_IMAGES
            self.number += 1
            ImageFile.LOAD_TRUNCATED_IMAGES = False

    def leave(self) -> None:
        with self.lock:
            self.number -= 1
            if not self.number:
                ImageFile.LOAD_TRUNCATED_IMAGES = self.lenient


_strict_mode = _StrictMode()


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Make Pillow reject truncated images, even if a library has set ImageFile.LOAD_TRUNCATED_IMAGES."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES and not _strict_mode.number:
        yield
        return
    _strict_mode.enter()
    try:
        yield
    finally:
        _strict_mode.leave()


def verify(image: Any, data: Encoded) -> None:
    """Raise ValueError or zlib.error if an image that Pillow could load from `data` is damaged."""
    if image.format == "PNG":
        _verify_png(data)
    elif image.format == "TIFF":
        _verify_tiff(image, data)


def _verify_png(data: Encoded) -> None:
    """Verify the checksums of the image data, which Pillow skips; it often does not reach zlib's either."""
    view, offset = memoryview(data), 8
    while offset + 12 <= len(view):
        end = offset + 8 + int.from_bytes(view[offset : offset + 4], "big")
        kind = view[offset + 4 : offset + 8]
        if kind == b"IEND":
            return
        if kind == b"IDAT" and zlib.crc32(view[offset + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("broken PNG file (bad checksum of its image data)")
        offset = end + 4


def _verify_tiff(image: Any, data: Encoded) -> None:
    compression = image.tag_v2.get(_COMPRESSION)
    for offsets, lengths in _DATA_TAGS:
        for start, length in zip(image.tag_v2.get(offsets, ()), image.tag_v2.get(lengths, ()), strict=False):
            if compression == _JPEG:
                _verify_tiff_jpeg(data[start : start + length], image.tag_v2.get(_JPEG_TABLES, b""))
            elif compression in _DEFLATE:
                _verify_deflate(data[start : start + length])


def _verify_tiff_jpeg(part: Encoded, tables: bytes) -> None:
    """Check one of the JPEGs that a TIFF is made of; `tables`, a JPEG without an image, are common to all."""
    with suppress(UnsupportedJpeg):  # libtiff could read it
        verify_jpeg(tables[:-2] + bytes(part[2:]) if tables else part)


def _verify_deflate(part: Encoded) -> None:
    """Raise zlib.error if deflated data or their checksum are wrong; libtiff stops before the checksum."""
    inflate = zlib.decompressobj()
    while part and not inflate.eof:
        inflate.decompress(part, _INFLATED_AT_ONCE)
        part = inflate.unconsumed_tail
