"""Encoded bytes to 8-bit RGB pixels."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_fasttrain.errors import DataError

DECODING_ERRORS = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    Image.DecompressionBombError,
    ValueError,
    struct.error,  # damaged WebP
)


def read_image(record: Any) -> Image.Image:
    """Return the RGB image of an undecoded HF record ``{"bytes", "path"}``, of encoded bytes, or of a path.

    Grayscale, palette, CMYK and 16-bit images are converted, alpha is dropped as transformers and timm do, the
    EXIF rotation is applied, and of an animation the first frame is taken. Raises DataError if that fails.
    """
    data: bytes | None
    path: Any
    data, path = (record.get("bytes"), record.get("path")) if isinstance(record, dict) else (None, record)
    if isinstance(record, bytes):
        data, path = record, None
    if data is None and path is None:
        raise DataError("image is missing (null); take it out")
    try:
        image = Image.open(io.BytesIO(data) if data is not None else path)
        return to_rgb(ImageOps.exif_transpose(image))
    except DECODING_ERRORS as error:
        name = path or f"{len(data or b'')} bytes"
        raise DataError(f"image {name}: can't be decoded: {error}; repair it or take it out") from None


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
