"""Every kind of image is decoded to the correct RGB pixels."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from hf_fasttrain.data.pixels import limits
from hf_fasttrain.data.pixels.augment import random_box
from hf_fasttrain.data.pixels.decode import (
    DECODING_ERRORS,
    decode,
    image_size_of,
    inspect_header,
    is_jpeg,
    read_pixels,
)
from hf_fasttrain.data.pixels.jpeg import reduction
from hf_fasttrain.data.pixels.resize import resize
from hf_fasttrain.data.pixels.rgb import ValueRange
from hf_fasttrain.from_recipe.auto import reduced_decode
from hf_fasttrain.utils.errors import DataError, ImageError
from hf_fasttrain.utils.files import LARGEST_FILE

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
PHOTO = np.asarray(Image.fromarray(RNG.integers(0, 256, (8, 9, 3), dtype=np.uint8)).resize((80, 56)))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def orientation_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def pixels(record: Any) -> np.ndarray:
    image = read_pixels(record)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    return image


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_their_pixels(form: str) -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOUR), form)), COLOUR)
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOUR), "WEBP", lossless=True)), COLOUR)


def test_grey_is_repeated_in_all_channels() -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(GREY))), np.repeat(GREY[..., None], 3, 2))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    deep = GREY.astype(np.uint16) * 257
    assert np.array_equal(pixels(encoded(Image.fromarray(deep)))[..., 0], GREY)
    assert np.array_equal(pixels(encoded(Image.fromarray(deep), "TIFF"))[..., 0], GREY)


def test_integer_and_float_grey() -> None:
    whole = encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF")
    assert np.array_equal(read_pixels(whole, value_range=ValueRange(0, 255))[..., 0], GREY)
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
    merged = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(255 - GREY)])
    assert np.array_equal(pixels(encoded(merged))[..., 0], GREY)


def test_one_bit_images() -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(GREY > 100)))[..., 0], (GREY > 100) * np.uint8(255))


def test_cmyk_jpegs() -> None:
    solid = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = pixels(encoded(solid, "JPEG", quality=100)).mean((0, 1))
    assert red[0] > 245
    assert red[1:].max() < 10


@pytest.mark.parametrize(("orientation", "turned"), [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied(orientation: int, turned: int) -> None:
    record = encoded(Image.fromarray(COLOUR), exif=orientation_exif(orientation))
    assert np.array_equal(pixels(record), np.rot90(COLOUR, turned))


def test_first_frame_of_an_animation() -> None:
    first = Image.new("RGB", (8, 8), (255, 0, 0))
    record = encoded(first, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 255, 0))])
    assert pixels(record)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(Image.fromarray(COLOUR))["bytes"][:60]])
def test_a_file_that_is_not_an_image_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(DataError, match=r"bytes: can't be decoded: .*; repair it or remove it"):
        read_pixels({"bytes": data, "path": None})


def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")  # which would wait for a writer
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")  # which would be read until memory runs out
    (tmp_path / "proc.jpg").symlink_to("/proc/self/status")  # which claims to have no bytes
    expected = {"fifo.jpg": "a FIFO, not a", "folder.jpg": "a folder, not a", "zero.jpg": "a device, not a"}
    for name, reason in {**expected, "proc.jpg": "0 bytes", "gone.jpg": "No such file", "a\0b": "null"}.items():
        path = str(tmp_path / name)
        with pytest.raises(ImageError, match=f"can't be decoded: .*{reason}"):
            read_pixels(path)
        assert not is_jpeg(path)
        with pytest.raises(DECODING_ERRORS):
            image_size_of(path)
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)  # sparse
    with pytest.raises(ImageError, match="too large to be read"):
        read_pixels(tmp_path / "huge.jpg")


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    return encoded(Image.fromarray(pixels), "JPEG", **options)["bytes"]


JPEGS: dict[str, bytes] = {
    "4:2:0": jpeg(PHOTO, quality=90),
    "4:4:4": jpeg(PHOTO, quality=95, subsampling=0),
    "4:2:2, odd sizes": jpeg(PHOTO[:37, :51], quality=75, subsampling=1),
    "progressive": jpeg(PHOTO, progressive=True),
    "grey": jpeg(PHOTO[..., 0]),
    "restart markers": jpeg(PHOTO, restart_marker_blocks=2),
    "comment and resolution": jpeg(PHOTO, comment=b"a flower", dpi=(72, 72)),
    "colour profile": jpeg(PHOTO, icc_profile=b"x" * 70_000),
    "upright EXIF": jpeg(PHOTO, exif=orientation_exif(1)),
    "padding before a marker": jpeg(PHOTO)[:2] + b"\xff\xff" + jpeg(PHOTO)[2:],
    "RGB without a colour transform": jpeg(PHOTO, keep_rgb=True),
}


@pytest.mark.parametrize("name", JPEGS)
def test_the_fast_decoder_gives_pillows_pixels(name: str) -> None:
    data = JPEGS[name]
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert inspect_header(data)[:2] == (b"Exif" in data, False)
    assert np.array_equal(decode(data), plain)
    assert np.array_equal(read_pixels({"bytes": memoryview(data), "path": None}), plain)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_every_exif_orientation_of_a_jpeg(orientation: int) -> None:
    data = jpeg(PHOTO, exif=orientation_exif(orientation))
    assert inspect_header(data)[:2] == (True, False)
    assert np.array_equal(decode(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_an_orientation_in_xmp_is_applied_too() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = jpeg(PHOTO, xmp=xmp)
    plain = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert plain.shape[:2] == PHOTO.shape[1::-1]
    assert np.array_equal(decode(data), plain)


def test_damaged_exif_is_treated_as_by_pillow() -> None:
    data = jpeg(PHOTO, exif=orientation_exif(1))
    data = data.replace(b"Exif\0\0", b"Exif\0\0\xff\xff\xff", 1)
    assert read_pixels({"bytes": data, "path": None}).shape == PHOTO.shape


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_image_is_an_error(form: str) -> None:
    data = encoded(Image.fromarray(PHOTO), form)["bytes"]
    for share in (0.3, 0.7):
        with pytest.raises(DataError, match="can't be decoded"):
            read_pixels({"bytes": data[: int(len(data) * share)], "path": "flower"})


def test_a_decompression_bomb_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PIXELS", PHOTO.shape[0] * PHOTO.shape[1] - 1)
    for form in ("JPEG", "PNG", "TIFF", "PPM"):
        with pytest.raises(DataError, match=r"pixels are more than .*: a decompression bomb\?; shrink it or remove it"):
            read_pixels(encoded(Image.fromarray(PHOTO), form))


@pytest.mark.parametrize("form", ["WEBP", "GIF", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_read(form: str) -> None:
    frames = [Image.fromarray(PHOTO[i:, i:][:40, :40]).quantize(64).convert("RGB") for i in (0, 5)]
    options = {"lossless": True} if form == "WEBP" else {}
    record = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(record["bytes"])).n_frames == 2
    assert np.array_equal(pixels(record), np.asarray(Image.open(io.BytesIO(record["bytes"])).convert("RGB")))


def test_reduced_decoding_keeps_both_sides_long_enough() -> None:
    large = np.asarray(Image.fromarray(PHOTO).resize((640, 400)))
    data = jpeg(large, quality=95)
    assert decode(data, at_least=100).shape == (100, 160, 3)
    assert decode(data, at_least=101).shape == (200, 320, 3)
    assert decode(data, at_least=201).shape == (400, 640, 3)
    assert decode(data, at_least=401).shape == (400, 640, 3)
    expected_half = np.asarray(Image.fromarray(large).resize((320, 200), Image.Resampling.BOX)).astype(int)
    assert abs(decode(data, at_least=200) - expected_half).mean() < 3


@pytest.mark.parametrize("size", [(640, 400), (641, 403), (647, 407)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_both_decoders_reduce_to_the_same_pixels(size: tuple[int, int], mode: str) -> None:
    data = encoded(Image.fromarray(PHOTO).resize(size).convert(mode), "JPEG", quality=92)["bytes"]
    for at_least in (50, 100, 200, 201):
        expected = decode(data, at_least=at_least)
        assert np.array_equal(decode(data, at_least=at_least, pillow=True), expected)
        divisor = 1 if mode == "CMYK" else reduction(*size, at_least)
        assert expected.shape[:2] == (-(-size[1] // divisor), -(-size[0] // divisor))


def test_crops_of_reduced_photos_differ_from_those_of_whole_ones_no_more_than_pillows_thumbnails() -> None:
    photo = load_sample_image("china.jpg")
    data, size = jpeg(photo, quality=92), 48
    at_least = reduced_decode(
        size=size, crop="random_resized", scale=(0.08, 1), ratio=(3 / 4, 4 / 3), short_side=None
    ).value
    half, whole = decode(data, at_least=at_least), decode(data)
    assert whole.shape[0] == 2 * half.shape[0] - whole.shape[0] % 2
    thumbnail = Image.open(io.BytesIO(data))
    thumbnail.thumbnail((size, size), Image.Resampling.BILINEAR)
    resized = Image.fromarray(whole).resize(thumbnail.size, Image.Resampling.BILINEAR)
    tolerance = abs(np.asarray(thumbnail).astype(int) - np.asarray(resized)).mean()
    differences = []
    for draws in np.random.default_rng(0).random((40, 40)):
        box = random_box((half.shape[1], half.shape[0]), (0.08, 1), (3 / 4, 4 / 3), draws)
        double = tuple(min(2 * value, whole.shape[1 - place % 2]) for place, value in enumerate(box))
        crops = resize(half, (size, size), "bilinear", box), resize(whole, (size, size), "bilinear", double)
        differences.append(abs(crops[0].astype(int) - crops[1]).mean())
    assert np.mean(differences) < max(1.0, tolerance)


def test_a_missing_image_is_a_clear_error() -> None:
    with pytest.raises(DataError, match=r"image is missing \(null\); remove it"):
        read_pixels({"bytes": None, "path": None})
    with pytest.raises(DataError, match=r"image nowhere.jpg: can't be decoded: .*No such file"):
        read_pixels("nowhere.jpg")
    with pytest.raises(DataError, match=r"image flower.jpg: can't be decoded: 0 bytes"):
        read_pixels({"bytes": b"", "path": "flower.jpg"})
