"""Every form of image comes out as right RGB."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_fasttrain.data.decode import read_pixels
from hf_fasttrain.errors import DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(record: Any) -> np.ndarray:
    image = read_pixels(record)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    return image


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_forms_keep_their_pixels(form: str) -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOUR), form)), COLOUR)
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOUR), "WEBP", lossless=True)), COLOUR)


def test_grey_is_repeated() -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(GREY))), np.repeat(GREY[..., None], 3, 2))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    deep = GREY.astype(np.uint16) * 257
    assert np.array_equal(pixels(encoded(Image.fromarray(deep)))[..., 0], GREY)
    assert np.array_equal(pixels(encoded(Image.fromarray(deep), "TIFF"))[..., 0], GREY)


def test_integer_and_float_grey() -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"))[..., 0], GREY)
    share = (GREY / 255).astype(np.float32)
    assert np.array_equal(pixels(encoded(Image.fromarray(share), "TIFF"))[..., 0], GREY)


def test_palette_and_transparency() -> None:
    palette = Image.fromarray(COLOUR).quantize(16)
    assert np.array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    palette.info["transparency"] = 3
    assert np.array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGBA").convert("RGB")))


def test_alpha_is_dropped() -> None:
    alpha = np.dstack([COLOUR, GREY])
    assert np.array_equal(pixels(encoded(Image.fromarray(alpha))), COLOUR)
    both = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(255 - GREY)])
    assert np.array_equal(pixels(encoded(both))[..., 0], GREY)


def test_one_bit() -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(GREY > 100)))[..., 0], (GREY > 100) * np.uint8(255))


def test_cmyk_jpeg() -> None:
    solid = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = pixels(encoded(solid, "JPEG", quality=100)).mean((0, 1))
    assert red[0] > 245
    assert red[1:].max() < 10


@pytest.mark.parametrize(("orientation", "turned"), [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied(orientation: int, turned: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    record = encoded(Image.fromarray(COLOUR), exif=exif)
    assert np.array_equal(pixels(record), np.rot90(COLOUR, turned))


def test_first_frame_of_an_animation() -> None:
    first = Image.new("RGB", (8, 8), (255, 0, 0))
    record = encoded(first, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 255, 0))])
    assert pixels(record)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(Image.fromarray(COLOUR))["bytes"][:60]])
def test_what_is_no_image_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(DataError, match=r"bytes: can't be decoded: .*; repair it or take it out"):
        read_pixels({"bytes": data, "path": None})
