"""Decodes image files to 8-bit RGB pixels, with the fastest decoder that gives correct ones.

JPEGs are decoded by libjpeg-turbo (simplejpeg), which gives exactly Pillow's pixels in three quarters of its time and
reports damage that Pillow ignores; everything else by Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_fasttrain.data.pixels.integrity import strict_pillow, verify
from hf_fasttrain.data.pixels.jpeg import (
    JPEG_START,
    Encoded,
    Pixels,
    UnsupportedJpeg,
    decode_complete,
    decode_jpeg,
    inspect_header,
    normalize_header,
    verify_jpeg,
)
from hf_fasttrain.utils.errors import ImageError
from hf_fasttrain.utils.files import open_regular, read_regular
from hf_fasttrain.utils.library_errors import is_decoder_out_of_memory

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
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
)
_ORIENTATION = 0x0112  # EXIF
_TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_pixels(record: Any, *, at_least: int | None = None, pillow: bool = False) -> Pixels:
    """Return the RGB pixels of an undecoded HF record ``{"bytes", "path"}``, of encoded bytes, or of a path.

    Grayscale, palette, CMYK and 16-bit images are converted, alpha is dropped as transformers and timm do, the
    EXIF rotation is applied, and an animation's first frame is used. With `at_least`, JPEGs are decoded at
    1/2, 1/4 or 1/8 of their size if both sides stay that long; with `pillow` Pillow decodes them. Raises ImageError if
    the image is missing or damaged, and MemoryError, which says nothing about the image, if memory ran out.
    """
    data, path = _parts(record)
    if data is None and path is None:
        raise ImageError("image is missing (null); remove it")
    try:
        if data is None:
            data = read_regular(path)
        return decode(data, at_least=at_least, pillow=pillow)
    except (MemoryError, *DECODING_ERRORS) as error:
        name = path or f"{len(data or b'')} bytes"
        if is_decoder_out_of_memory(error):
            raise MemoryError(f"image {name}: no memory to decode it") from None
        reason = _reason(error)
        raise ImageError(f"image {name}: can't be decoded: {reason}; repair it or remove it", reason) from None


def _parts(record: Any) -> tuple[Encoded | None, Any]:
    if isinstance(record, dict):
        return record.get("bytes"), record.get("path")
    if isinstance(record, bytes | memoryview):
        return record, None
    return None, record


def _reason(error: Exception) -> str:
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def decode(data: Encoded, *, at_least: int | None = None, pillow: bool = False) -> Pixels:
    """Return the RGB pixels (H, W, 3) of an encoded image; raises one of DECODING_ERRORS if it is damaged."""
    if not len(data):
        raise ValueError("0 bytes")
    if data[:3] != JPEG_START:
        return _decode_by_pillow(data)
    has_exif, has_junk = inspect_header(data)
    if has_junk:
        data = normalize_header(data)
        has_exif, _ = inspect_header(data)
    try:
        if pillow:
            verify_jpeg(data)
            return _decode_by_pillow(data)
        pixels = decode_jpeg(data, at_least or 0)
    except UnsupportedJpeg:
        return decode_complete(data, _decode_by_pillow)
    return _rotate(pixels, data) if has_exif else pixels


def _decode_by_pillow(data: Encoded) -> Pixels:
    with strict_pillow():
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()  # here, so that errors of the image are not taken for errors of its EXIF data
        verify(image, data)
        with suppress(*DECODING_ERRORS):  # damaged EXIF data do not make the image bad
            image = ImageOps.exif_transpose(image)
        return np.array(to_rgb(image))


def _rotate(pixels: Pixels, data: Encoded) -> Pixels:
    """Return the pixels of a JPEG rotated as its EXIF or XMP data say."""
    try:
        turn = _TURNS.get(Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1))
    except DECODING_ERRORS:
        return pixels
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


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
    with io.BytesIO(data) if data is not None else open_regular(path) as file, Image.open(file) as image:
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
