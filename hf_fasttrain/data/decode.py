"""Encoded bytes to 8-bit RGB pixels, by the fastest decoder that gives right ones.

JPEGs go through libjpeg-turbo (simplejpeg), which gives exactly Pillow's pixels in three quarters of its time;
everything else, and every JPEG that is out of the ordinary, through Pillow.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_fasttrain.errors import DataError

Pixels = np.ndarray  # (H, W, 3) uint8, contiguous
Encoded = bytes | memoryview
DECODING_ERRORS = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    Image.DecompressionBombError,
    ValueError,
    # What Pillow's readers let through of damaged files:
    struct.error,
    zlib.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
)
_JPEG_START = b"\xff\xd8\xff"
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}


def read_pixels(record: Any, *, at_least: int | None = None, pillow: bool = False) -> Pixels:
    """Return the RGB pixels of an undecoded HF record ``{"bytes", "path"}``, of encoded bytes, or of a path.

    Grayscale, palette, CMYK and 16-bit images are converted, alpha is dropped as transformers and timm do, the
    EXIF rotation is applied, and of an animation the first frame is taken. With `at_least`, JPEGs are decoded at
    1/2, 1/4 or 1/8 of their size if both sides stay that long; with `pillow` Pillow decodes them. Raises DataError if
    there is no right image in it.
    """
    data, path = _parts(record)
    if data is None and path is None:
        raise DataError("image is missing (null); take it out")
    try:
        if data is None:
            data = Path(path).read_bytes()
        return decode(data, at_least=at_least, pillow=pillow)
    except DECODING_ERRORS as error:
        name = path or f"{len(data or b'')} bytes"
        raise DataError(f"image {name}: can't be decoded: {_reason(error)}; repair it or take it out") from None


def _parts(record: Any) -> tuple[Encoded | None, Any]:
    if isinstance(record, dict):
        return record.get("bytes"), record.get("path")
    if isinstance(record, bytes | memoryview):
        return record, None
    return None, record


def _reason(error: Exception) -> str:
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def decode(data: Encoded, *, at_least: int | None = None, pillow: bool = False) -> Pixels:
    """Return the RGB pixels (H, W, 3) of an encoded image; raises one of DECODING_ERRORS."""
    if not len(data):
        raise ValueError("0 bytes")
    if not pillow and data[:3] == _JPEG_START and is_plain_jpeg(data):
        try:
            return _decode_jpeg(data, at_least or 0)
        except ValueError:
            pass  # damaged, or in a colour space of its own: Pillow decides
    image = Image.open(io.BytesIO(data))
    try:
        turned = ImageOps.exif_transpose(image)
    except DECODING_ERRORS:
        turned = image  # if only its EXIF data are damaged, the image itself is not
    return np.array(to_rgb(turned))


def _decode_jpeg(data: Encoded, at_least: int) -> Pixels:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours == "CMYK":
        raise ValueError("CMYK")
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 2**63)
    if height * width > limit:
        raise Image.DecompressionBombError(f"{width} x {height} pixels are more than {limit:,}: a decompression bomb?")
    if not at_least:
        return simplejpeg.decode_jpeg(data)
    # Other factors, such as 3/8, would be slower than none: libjpeg-turbo has vector code for powers of two only.
    factor = next((k for k in (8, 4, 2) if min(height, width) >= k * at_least), 1)
    return simplejpeg.decode_jpeg(data, min_height=-(-height // factor), min_width=-(-width // factor))


def is_jpeg(record: Any) -> bool:
    """Return whether a record begins as a JPEG does; not if it can't be read."""
    data, path = _parts(record)
    if data is None and path is not None:
        try:
            with Path(path).open("rb") as file:
                data = file.read(len(_JPEG_START))
        except OSError:
            return False
    return data is not None and data[:3] == _JPEG_START


def is_plain_jpeg(data: Encoded) -> bool:
    """Return whether a JPEG has neither EXIF nor XMP data, so that it can't ask to be rotated, or says it is upright.

    Walks the markers before the image itself: a microsecond or two, whatever the size.
    """
    place, end = 2, len(data)
    while place + 4 <= end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in _WITHOUT_LENGTH:
            place += 2
            continue
        if marker == _START_OF_SCAN:
            return True
        length = data[place + 2] << 8 | data[place + 3]
        if marker == _APP1:
            return _is_upright(data)
        place += 2 + length
    return False


def _is_upright(data: Encoded) -> bool:
    try:
        return Image.open(io.BytesIO(data)).getexif().get(0x0112, 1) in (0, 1)
    except DECODING_ERRORS:
        return False


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Return the pixels as a JPEG with halved colour resolution (4:2:0), which is decoded a third faster than 4:4:4."""
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420")


def image_size_of(record: Any) -> tuple[int, int]:
    """Return (width, height) of an encoded image from its header, as stored; raises one of DECODING_ERRORS."""
    data, path = _parts(record)
    if data is None and path is None:
        raise ValueError("image is missing (null)")
    with Image.open(io.BytesIO(data) if data is not None else os.fspath(path)) as image:
        return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an 8-bit RGB image; 16-bit and floating-point grey is scaled, where Pillow would clip it."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        deepest = 1.0 if image.mode == "F" and grey.max(initial=0) <= 1 else 255.0 if grey.max() <= 255 else 65535.0
        if image.mode.startswith("I;16"):
            deepest = 65535.0
        image = Image.fromarray(np.clip(np.round(grey * (255 / deepest)), 0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns otherwise; the colours are the palette's either way
    return image.convert("RGB")
