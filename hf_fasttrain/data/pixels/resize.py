"""Antialiased resizing of pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from hf_fasttrain.data.pixels.decode import Pixels
from hf_fasttrain.utils.private_apis import antialiased_filters

FILTERS = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}
# torch's 8-bit kernels are the vectorised form of Pillow's algorithm, in a quarter of its time.
_TORCH_FILTERS = antialiased_filters()
Box = tuple[int, int, int, int]  # left, top, right, bottom
_LARGEST_SUPPORT = 3  # pixels on each side that a filter weighs: Lanczos's


def resize(
    pixels: Pixels, size: tuple[int, int], interpolation: str, box: Box | None = None, out: np.ndarray | None = None
) -> Pixels:
    """Return `pixels`, or the part of them in `box`, at `size` (width, height), written to `out` if given.

    Bilinear is within 1 of 255 levels of Pillow's filter (2 for one value in 100,000). So is bicubic if Pillow also
    filters rows before columns (always before version 13): overshoots are clipped in between.
    """
    left, top, right, bottom = box or (0, 0, pixels.shape[1], pixels.shape[0])
    part = pixels[top:bottom, left:right]
    width, height = size
    resized = np.empty((height, width, 3), np.uint8) if out is None else out
    if part.shape[:2] == (height, width):
        resized[...] = part
    elif interpolation in _TORCH_FILTERS:
        part = np.ascontiguousarray(part)
        if not part.flags.writeable:  # read-only memory from the cache; torch would warn, though it only reads
            part = part.copy()
        source = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
        target = torch.from_numpy(resized)[None].permute(0, 3, 1, 2)
        _TORCH_FILTERS[interpolation](source, [height, width], False, None, None, out=target)
    else:
        resized[...] = np.asarray(Image.fromarray(part).resize(size, FILTERS[interpolation]))
    return resized


def resize_part(pixels: Pixels, size: tuple[int, int], box: Box, interpolation: str) -> Pixels:
    """Return the part `box` of what Pillow resizes to `size` (width, height), without making the rest."""
    scales = pixels.shape[1] / size[0], pixels.shape[0] / size[1]
    ranges, inner = [], []
    for scale, side, start, end in zip(scales, (pixels.shape[1], pixels.shape[0]), box[:2], box[2:], strict=True):
        first, last = start * scale, end * scale
        margin = math.ceil(_LARGEST_SUPPORT * max(1.0, scale)) + 1
        ranges.append(slice(max(0, math.floor(first) - margin), min(side, math.ceil(last) + margin)))
        inner.append((first - ranges[-1].start, min(last, ranges[-1].stop) - ranges[-1].start))
    (left, right), (top, bottom) = inner
    image = Image.fromarray(np.ascontiguousarray(pixels[ranges[1], ranges[0]]))
    new = box[2] - box[0], box[3] - box[1]
    return np.array(image.resize(new, FILTERS[interpolation], box=(left, top, right, bottom), reducing_gap=None))


def resize_short_side(pixels: Pixels, short: int, interpolation: str) -> Pixels:
    """Return pixels whose short side is at most `short` pixels long; the aspect ratio is kept."""
    height, width = pixels.shape[:2]
    if min(height, width) <= short:
        return pixels
    return resize(pixels, size_with_short_side(width, height, short), interpolation)


def size_with_short_side(width: int, height: int, short: int) -> tuple[int, int]:
    """Return (width, height) with a short side of `short`; the long side is truncated, as in torchvision."""
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
