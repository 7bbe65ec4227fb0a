"""Decodes image files to 8-bit RGB pixels, with the fastest decoder that gives correct ones.

JPEGs are decoded by libjpeg-turbo (simplejpeg), which gives exactly Pillow's pixels in three quarters of its time and
reports damage that Pillow ignores; everything else by Pillow.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any, NamedTuple

import simplejpeg
from PIL import Image, UnidentifiedImageError

from hf_fasttrain.data.pixels import netpbm
from hf_fasttrain.data.pixels.containers import format_of, open_image
from hf_fasttrain.data.pixels.integrity import quiet_pillow, strict_pillow, verify
from hf_fasttrain.data.pixels.jpeg import (
    JPEG_START,
    Encoded,
    Pixels,
    UnsupportedJpeg,
    decode_complete,
    decode_jpeg,
    exif_and_xmp,
    inspect_header,
    normalize_header,
    reduction,
    verify_jpeg,
)
from hf_fasttrain.data.pixels.orientation import UPRIGHT, orientation_of, upright
from hf_fasttrain.data.pixels.rgb import Grey, ValueRange, grey_values, is_deep, rgb_pixels
from hf_fasttrain.data.pixels.tiff import declared_maximum
from hf_fasttrain.utils.errors import ImageError
from hf_fasttrain.utils.files import open_regular, read_regular, reason
from hf_fasttrain.utils.library_errors import is_decoder_out_of_memory

MAX_JPEG_SIDE = 65_500  # pixels; libjpeg's limit
_START_BYTES = 1 << 18  # of a file, which hold the header in most formats
DECODING_ERRORS = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    Image.DecompressionBombError,
    ValueError,
    # Raised by Pillow's readers for damaged files:
    struct.error,
    zlib.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    Warning,  # raised where the user has made errors of warnings
)


def read_pixels(
    record: Any, *, at_least: int | None = None, pillow: bool = False, value_range: ValueRange | None = None
) -> Pixels:
    """Return the RGB pixels of an undecoded HF record ``{"bytes", "path"}``, of encoded bytes, or of a path.

    Grayscale, palette and CMYK images are converted, alpha is dropped as transformers and timm do, the EXIF rotation is
    applied, and an animation's first frame is used. Grey of 16 or 32 bits is scaled so that `value_range` becomes 0 to
    255; by default 0 to 65535, of floats 0 to 1. With `at_least`, JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if
    both sides stay that long; Pillow decodes them with `pillow`. Raises ImageError if the image is missing, damaged
    or beyond the limits (limits.py), and MemoryError, which says nothing about the image, if memory ran out.
    """
    data, path = _parts(record)
    if data is None and path is None:
        raise ImageError("image is missing (null); remove it")
    try:
        if data is None:
            data = read_regular(path)
        return decode(data, at_least=at_least, pillow=pillow, value_range=value_range)
    except (MemoryError, *DECODING_ERRORS) as error:
        name = path or f"{len(data or b'')} bytes"
        if is_decoder_out_of_memory(error):
            raise MemoryError(f"image {name}: no memory to decode it") from None
        why, advice = str(error) or type(error).__name__, getattr(error, "advice", "repair it or remove it")
        if isinstance(error, PermissionError):
            why, advice = reason(error), f"give user {os.getuid()} permission to read it (chmod), or remove it"
        raise ImageError(f"image {name}: can't be decoded: {why}; {advice}", why) from None


def _parts(record: Any) -> tuple[Encoded | None, Any]:
    if isinstance(record, dict):
        return record.get("bytes"), record.get("path")
    if isinstance(record, bytes | memoryview):
        return record, None
    return None, record


def decode(
    data: Encoded, *, at_least: int | None = None, pillow: bool = False, value_range: ValueRange | None = None
) -> Pixels:
    """Return the RGB pixels (H, W, 3) of an encoded image; raises one of DECODING_ERRORS if it can't be used."""
    if not len(data):
        raise ValueError("0 bytes")
    if data[:3] != JPEG_START:
        return _decode_by_pillow(data, value_range)
    header = inspect_header(data)
    if header.has_junk:
        data = normalize_header(data)
        header = inspect_header(data)
    try:
        if pillow:
            verify_jpeg(data)
            return _decode_by_pillow(data, at_least=at_least or 0)
        pixels = decode_jpeg(data, at_least or 0)
    except UnsupportedJpeg:
        return decode_complete(data, _decode_by_pillow)
    return upright(pixels, orientation_of(*exif_and_xmp(data))) if header.has_exif else pixels


def _decode_by_pillow(data: Encoded, value_range: ValueRange | None = None, at_least: int = 0) -> Pixels:
    image, orientation = _loaded(data, at_least)
    return upright(rgb_pixels(image, value_range, declared_maximum(image)), orientation)


def _loaded(data: Encoded, at_least: int = 0) -> tuple[Image.Image, int]:
    """Return a decoded image, not turned yet, and its orientation; a JPEG reduced while both sides stay `at_least`."""
    if format_of(data) == "PPM" and netpbm.is_slow(header := netpbm.header_of(data)):
        return netpbm.decode_netpbm(data, header), UPRIGHT
    quiet_pillow()
    with strict_pillow():
        opened = open_image(data)
        divisor = reduction(*opened.image.size, at_least)
        if divisor > 1 and opened.image.mode != "CMYK":  # which is never reduced, as by simplejpeg
            opened.image.draft(None, (opened.image.width // divisor, opened.image.height // divisor))
        opened.image.load()
        verify(opened.image, data)
    return opened.image, opened.orientation


class Inspected(NamedTuple):
    """What the header of an image says."""

    format: str  # JPEG, PNG, ...
    mode: str  # Pillow's: RGB, L, CMYK, ...
    unusual: list[str]  # CMYK, palette, 16-bit, 32-bit, EXIF rotation, several frames


def inspect(data: Encoded) -> Inspected:
    """Return what the header of an image says, whose pixels could be decoded."""
    try:
        quiet_pillow()
        image, orientation, has_frames = open_image(data)
    except DECODING_ERRORS:
        return Inspected("unknown", "unknown", [])
    tiles = " ".join(str(tile[3]) for tile in image.tile)  # 16-bit colour has mode RGB; only its tiles show it
    maximum = netpbm.header_of(data).maximum if image.format == "PPM" else 255
    found = {
        "CMYK": image.mode == "CMYK",
        "palette": image.mode in ("P", "PA"),
        "16-bit": ";16" in image.mode or ";16" in tiles or maximum > 255,
        "32-bit": image.mode in ("I", "F") and ";16" not in tiles and maximum <= 255,
        "EXIF rotation": orientation != UPRIGHT,
        "several frames": has_frames,
    }
    return Inspected(image.format or "unknown", image.mode, [name for name, is_so in found.items() if is_so])


def grey_of(record: Any) -> Grey | None:
    """Return what values an image of grey of more than 8 bits has; None for any other image, and for a bad one."""
    try:
        data, path = _parts(record)
        data = read_regular(path) if data is None else data
        if data[:3] == JPEG_START or not is_deep(_mode_of(data)):
            return None
        return grey_values(_loaded(data)[0])
    except DECODING_ERRORS:
        return None


def _mode_of(data: Encoded) -> str:
    if format_of(data) == "PPM":
        header = netpbm.header_of(data)
        return "I" if header.maximum > 255 and header.channels == 1 else "L"
    quiet_pillow()
    return open_image(data).image.mode


def is_jpeg(record: Any) -> bool:
    """Return whether a record starts with a JPEG header; False if it can't be read."""
    data, path = _parts(record)
    if data is None and path is not None:
        try:
            with open_regular(path) as file:
                data = file.read(len(JPEG_START))
        except (OSError, ValueError):
            return False
    return data is not None and data[:3] == JPEG_START


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Return the pixels as a JPEG with halved colour resolution (4:2:0), which is decoded a third faster than 4:4:4."""
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420")


def image_size_of(record: Any) -> tuple[int, int]:
    """Return (width, height) of an encoded image from its header, as stored; raises one of DECODING_ERRORS."""
    data, path = _parts(record)
    if data is None and path is None:
        raise ValueError("image is missing (null)")
    if data is not None:
        return _size_of(data)
    with open_regular(path) as file:
        data = file.read(_START_BYTES)
    try:
        return _size_of(data)
    except DECODING_ERRORS:
        if len(data) < _START_BYTES:
            raise
    return _size_of(read_regular(path))


def _size_of(data: Encoded) -> tuple[int, int]:
    if data[:3] != JPEG_START:
        quiet_pillow()
        return open_image(data).image.size
    header = inspect_header(data)
    if header.has_junk:
        header = inspect_header(normalize_header(data))
    if header.frame is None:
        raise ValueError("not a valid JPEG file")
    return header.frame.width, header.frame.height
