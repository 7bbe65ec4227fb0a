"""Damage that Pillow ignores: checksums that it skips, JPEGs in TIFFs, LOAD_TRUNCATED_IMAGES; and what it prints."""

from __future__ import annotations

import logging
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from PIL import ImageFile

from hf_fasttrain.data.pixels.jpeg import Encoded, UnsupportedJpeg, verify_jpeg
from hf_fasttrain.data.pixels.tiff import COMPRESSION, DATA_TAGS, DEFLATE, JPEG, jpeg_part
from hf_fasttrain.utils.private_apis import silence_libtiff

_INFLATED_AT_ONCE = 1 << 20  # bytes
_MAX_RATIO = 32  # bytes of a pixel: 8 channels of 32 bits
_PILLOW = r"PIL\."  # its modules


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


def quiet_pillow() -> None:
    """Keep Pillow and libtiff from printing what they think of an image: it is used, or it is a bad image.

    The filter of warnings stays: setting and resetting it for each image would show other libraries' warnings, which
    are shown once, again each time.
    """
    if not any(
        action == "ignore" and module and module.pattern == _PILLOW for action, _, _, module, _ in warnings.filters
    ):
        warnings.filterwarnings("ignore", module=_PILLOW)
    _quiet_libraries()


@cache
def _quiet_libraries() -> None:
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # else errors that nobody handles are printed
    silence_libtiff()


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
    tags, room = image.tag_v2, _MAX_RATIO * image.width * image.height + _INFLATED_AT_ONCE
    compression = tags.get(COMPRESSION)
    for offsets, lengths in DATA_TAGS:
        for start, length in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False):
            if compression == JPEG:
                with suppress(UnsupportedJpeg):  # libtiff could read it
                    verify_jpeg(jpeg_part(tags, data, start, length))
            elif compression in DEFLATE:
                room -= _verify_deflate(data[start : start + length], room)


def _verify_deflate(part: Encoded, most: int) -> int:
    """Raise zlib.error if deflated data or their checksum are wrong; libtiff stops before the checksum.

    Returns how many bytes were inflated; stops at `most`, which no image needs.
    """
    inflate, number = zlib.decompressobj(), 0
    while part and not inflate.eof and number < most:
        number += len(inflate.decompress(part, _INFLATED_AT_ONCE))
        part = inflate.unconsumed_tail
    return number
