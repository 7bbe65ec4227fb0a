"""Resized pixels against Pillow's, and against a plain implementation of the filter."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hf_fasttrain.data.pixels.resize import FILTERS, resize, resize_short_side


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return smooth colours with noise and sharp edges, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(coarse).astype(np.int64) + rng.integers(-12, 13, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 3] = 255
    return np.clip(pixels, 0, 255).astype(np.uint8)


def pillow(pixels: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size, FILTERS[name])).astype(int)


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (31, 17), (500, 400)])
def test_bilinear_is_pillows_within_a_level(size: tuple[int, int]) -> None:
    for number, (width, height) in enumerate(((320, 240), (101, 333), (64, 64), (640, 31))):
        pixels = photo(width, height, number)
        difference = abs(resize(pixels, size, "bilinear") - pillow(pixels, size, "bilinear"))
        assert difference.max() <= 2
        assert (difference > 1).mean() < 1e-4


def weights(old: int, new: int) -> np.ndarray:
    """Return the antialiased bicubic filter (a = -0.5) as a matrix (new, old)."""
    scale = old / new
    wide = max(scale, 1.0)
    matrix = np.zeros((new, old))
    for row in range(new):
        center = (row + 0.5) * scale
        first, last = max(0, int(center - 2 * wide + 0.5)), min(old, int(center + 2 * wide + 0.5))
        x = abs((np.arange(first, last) - center + 0.5) / wide)
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        value = np.where(x < 1, near, np.where(x < 2, far, 0))
        matrix[row, first:last] = value / value.sum()
    return matrix


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (31, 17)])
def test_bicubic_filters_rows_and_then_columns(size: tuple[int, int]) -> None:
    for number, (width, height) in enumerate(((320, 240), (101, 133), (64, 64))):
        pixels = photo(width, height, number)
        rows = np.clip(np.floor(np.einsum("ij,hjc->hic", weights(width, size[0]), pixels.astype(float)) + 0.5), 0, 255)
        plain = np.clip(np.floor(np.einsum("ij,jwc->iwc", weights(height, size[1]), rows) + 0.5), 0, 255)
        difference = abs(resize(pixels, size, "bicubic") - plain)
        assert difference.max() <= 2
        assert (difference > 1).mean() < 1e-3


@pytest.mark.parametrize("name", ["nearest", "lanczos", "box", "hamming"])
def test_other_filters_are_pillows(name: str) -> None:
    pixels = photo(90, 70)
    assert np.array_equal(resize(pixels, (40, 50), name), pillow(pixels, (40, 50), name))


def test_a_box_is_cropped_before_it_is_filtered() -> None:
    pixels, box = photo(90, 70), (10, 5, 70, 60)
    cropped = np.ascontiguousarray(pixels[5:60, 10:70])
    out = np.zeros((32, 32, 3), np.uint8)
    assert np.array_equal(resize(pixels, (32, 32), "bilinear", box), resize(cropped, (32, 32), "bilinear"))
    assert resize(pixels, (32, 32), "bilinear", box, out) is out
    assert np.array_equal(resize(pixels, (60, 55), "bilinear", box), cropped)  # already of the right size
    frozen = cropped.copy()
    frozen.flags.writeable = False
    assert np.array_equal(resize(frozen, (32, 32), "bilinear"), out)


def test_the_short_side_is_only_reduced() -> None:
    assert resize_short_side(photo(90, 60), 30, "bilinear").shape == (30, 45, 3)
    assert resize_short_side(photo(61, 90), 30, "bilinear").shape == (44, 30, 3)
    small = photo(20, 90)
    assert resize_short_side(small, 30, "bilinear") is small
