"""The transforms: random crop, flips, turns, operations, erasing for training; resize and centre crop for evaluation.

Each image's randomness is a function of its key. RandAugment and other operations: operations.py; mixup and cutmix:
loading/batch.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_fasttrain.data.loading.sampler import (
    CROP_STREAM,
    ERASE_STREAM,
    FLIP_STREAM,
    NOISE_STREAM,
    OPERATION_STREAM,
    TURN_STREAM,
    VFLIP_STREAM,
    MicroBatchKey,
    keyed_rng,
    keyed_uniforms,
)
from hf_fasttrain.data.pixels.decode import Pixels
from hf_fasttrain.data.pixels.operations import Operations
from hf_fasttrain.data.pixels.resize import FILTERS, Box, resize, resize_part, size_with_short_side

BOX_TRIES = 10
FLIPPED_BYTES = 1 << 19  # flipped at a time: 22 us an image of 224 px, instead of 90 us in whole batches
WHOLE_PIXELS = 1 << 24  # of a resized image that is cropped afterwards; 67 MB


@dataclass(frozen=True)
class EvalTransform:
    """Resize so that the short side is image_size / crop_pct, then crop the centre, with exactly Pillow's resize.

    Of an image so thin that this would take much memory (30,000 x 2 pixels would become 3.3 million x 224), only the
    part that is left is resized, from the same pixels with the same filter: within a level of the rest's crop.

    `crop_mode` squash resizes any image to a square instead (as timm and ViT's processor do). If an odd
    number of pixels is cropped, center rounds half to even, as torchvision and timm do, and center_floor
    rounds down, as transformers' image processors do.
    """

    image_size: int
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __call__(self, pixels: Pixels) -> Pixels:
        """Return (image_size, image_size, 3) uint8 pixels of an image (H, W, 3)."""
        height, width = pixels.shape[:2]
        short = math.floor(self.image_size / self.crop_pct)
        size = (short, short) if self.crop_mode == "squash" else size_with_short_side(width, height, short)
        if size == (width, height) == (self.image_size, self.image_size):
            return pixels
        rounded = math.floor if self.crop_mode == "center_floor" else round
        left, top = (rounded((side - self.image_size) / 2) for side in size)
        box = left, top, left + self.image_size, top + self.image_size
        if size[0] * size[1] > max(WHOLE_PIXELS, 4 * short * short):
            return self._of_thin(pixels, size, box)
        image = Image.fromarray(pixels)
        if size != image.size:
            image = image.resize(size, FILTERS[self.interpolation], reducing_gap=None)
        return np.array(image.crop(box))

    def _of_thin(self, pixels: Pixels, size: tuple[int, int], box: Box) -> Pixels:
        """Return the part `box` of an image resized to `size`, black where it is beyond (crop_pct above 1)."""
        left, top = max(0, box[0]), max(0, box[1])
        right, bottom = min(size[0], box[2]), min(size[1], box[3])
        out = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        part = resize_part(pixels, size, (left, top, right, bottom), self.interpolation)
        out[top - box[1] : bottom - box[1], left - box[0] : right - box[0]] = part
        return out


@dataclass(frozen=True)
class Growth:
    """Progressive resizing (fastai; EfficientNetV2, arXiv 2104.00298): small images first, full size from `until` on.

    The size grows linearly with the epoch from `start_size`, in multiples of `multiple` pixels.
    """

    start_size: int
    until: int  # first epoch at full size
    multiple: int = 32

    def size(self, epoch: int, full: int) -> int:
        """Return the image size of an epoch, at most `full`."""
        if epoch >= self.until:
            return full
        size = self.start_size + (full - self.start_size) * epoch / self.until
        return min(full, max(self.start_size, round(size / self.multiple) * self.multiple))


@dataclass(frozen=True)
class NormalFill:
    """Normal noise in erased boxes, of a mean and std (of 0-1 pixels): one colour per pixel, or one per box.

    Those of data.mean and data.std are timm's modes pixel and rand, which draw after the normalisation; here the noise
    is rounded and cut to 0 and 255, as pixels are.
    """

    mean: Sequence[float]
    std: Sequence[float]
    per_pixel: bool = True

    def draw(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """Return pixels (height, width, 3) uint8, or (1, 1, 3) for one colour."""
        noise = rng.standard_normal((height, width, 3) if self.per_pixel else (1, 1, 3), np.float32)
        levels = 255 * (noise * np.array(self.std, np.float32) + np.array(self.mean, np.float32))
        return levels.round().clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class TrainTransform:
    """Random crop, operations, flips, turns and erasing; the same pixels for the same (seed, epoch, index, repeat).

    `crop` is ``random_resized`` (Inception's; scale and ratio as in torchvision), ``padded`` (shifted by up to
    `crop_padding` pixels over black) or ``none``; the last two need images of size `image_size`.
    """

    image_size: int
    seed: int = 0
    interpolation: str = "bilinear"
    crop: str = "random_resized"
    crop_scale: Sequence[float] = (0.08, 1.0)
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3)
    crop_padding: int = 4
    flip: bool | float = True  # the probability; True: one half
    vflip: float = 0.0
    quarter_turns: bool = False
    erase_prob: float = 0.0
    erase_fill: tuple[int, int, int] | NormalFill | None = (0, 0, 0)  # None: uniform noise
    operations: Operations = field(default_factory=Operations)
    growth: Growth | None = None

    def size_at(self, epoch: int) -> int:
        """Return the image size of an epoch."""
        return self.growth.size(epoch, self.image_size) if self.growth else self.image_size

    def __call__(self, pixels: Pixels, epoch: int, index: int, repeat: int = 0) -> Pixels:
        """Return (S, S, 3) uint8 pixels of one image."""
        size = self.size_at(epoch)
        out = np.empty((1, size, size, 3), np.uint8)
        self.write([(0, pixels)], MicroBatchKey(epoch, np.array([index]), np.array([repeat])), out)
        return out[0]

    def write(self, images: Iterable[tuple[int, Pixels]], key: MicroBatchKey, out: np.ndarray) -> None:
        """Write the batch of a key to `out` (B, S, S, 3).

        `images` are (row of the batch, pixels) in any order, each is used before the next is requested.
        """
        crops, seeds = self._crop_draws(key), self._operation_seeds(key)
        for row, pixels in images:
            self._crop(pixels, crops[row], out[row])
            if self.operations:
                out[row] = self.operations(out[row], int(seeds[row]))
        _change(out, np.flatnonzero(self.flips(key)), lambda images: images.flip(2))
        _change(out, np.flatnonzero(self.vflips(key)), lambda images: images.flip(1))
        turns = self.turns(key)
        for number in (1, 2, 3):
            _change(out, np.flatnonzero(turns == number), partial(torch.rot90, k=number, dims=(1, 2)))
        for row, box in self.erased(key, out.shape[1]):
            left, top, right, bottom = box
            out[row, top:bottom, left:right] = self._fill(key, row, box)

    def _draw(self, stream: int, key: MicroBatchKey, count: int) -> np.ndarray:
        return keyed_uniforms(self.seed, stream, key.epoch, key.indices, key.repeats, count)

    def _crop_draws(self, key: MicroBatchKey) -> np.ndarray:
        if self.crop == "random_resized":
            return self._draw(CROP_STREAM, key, 4 * BOX_TRIES)
        return self.shifts(key)

    def shifts(self, key: MicroBatchKey) -> np.ndarray:
        """Return how far each image is shifted to the left and upwards, (B, 2) in -crop_padding to crop_padding."""
        if self.crop != "padded":
            return np.zeros((len(key.indices), 2), np.int64)
        draws = self._draw(CROP_STREAM, key, 2)
        return (draws * (2 * self.crop_padding + 1)).astype(np.int64) - self.crop_padding

    def flips(self, key: MicroBatchKey) -> np.ndarray:
        """Return which images are mirrored left-right, (B,) bool."""
        return self._chosen(FLIP_STREAM, key, 0.5 if self.flip is True else float(self.flip))

    def vflips(self, key: MicroBatchKey) -> np.ndarray:
        """Return which images are mirrored top-bottom, (B,) bool."""
        return self._chosen(VFLIP_STREAM, key, self.vflip)

    def turns(self, key: MicroBatchKey) -> np.ndarray:
        """Return by how many quarters each image is turned to the left, (B,) of 0 to 3."""
        if not self.quarter_turns:
            return np.zeros(len(key.indices), np.int64)
        return (4 * self._draw(TURN_STREAM, key, 1)[:, 0]).astype(np.int64)

    def _chosen(self, stream: int, key: MicroBatchKey, probability: float) -> np.ndarray:
        if not probability:
            return np.zeros(len(key.indices), bool)
        return self._draw(stream, key, 1)[:, 0] < probability

    def erased(self, key: MicroBatchKey, size: int) -> list[tuple[int, Box]]:
        """Return (row, box) of the images with an erased box, 2 to 33 % of the area (arXiv 1708.04896)."""
        if not self.erase_prob:
            return []
        draws = self._draw(ERASE_STREAM, key, 1 + 4 * BOX_TRIES)
        chosen = np.flatnonzero(draws[:, 0] < self.erase_prob)
        return [(int(row), random_box((size, size), (0.02, 1 / 3), (0.3, 3.3), draws[row, 1:])) for row in chosen]

    def _operation_seeds(self, key: MicroBatchKey) -> np.ndarray:
        if not self.operations:
            return np.zeros(0)
        return (self._draw(OPERATION_STREAM, key, 1)[:, 0] * 2**53).astype(np.int64)

    def _crop(self, pixels: Pixels, draws: np.ndarray, out: np.ndarray) -> None:
        size = len(out)
        if self.crop == "random_resized":
            height, width = pixels.shape[:2]
            box = random_box((width, height), self.crop_scale, self.crop_ratio, draws)
            resize(pixels, (size, size), self.interpolation, box, out)
            return
        left, top = draws.tolist()
        if left == top == 0:
            out[...] = pixels
            return
        out[...] = 0
        out[max(0, -top) : size - max(0, top), max(0, -left) : size - max(0, left)] = pixels[
            max(0, top) : size - max(0, -top), max(0, left) : size - max(0, -left)
        ]

    def _fill(self, key: MicroBatchKey, row: int, box: Box) -> np.ndarray:
        if isinstance(self.erase_fill, tuple):
            return np.array(self.erase_fill, np.uint8)
        repeat = int(np.broadcast_to(key.repeats, key.indices.shape)[row])
        rng = keyed_rng(self.seed, NOISE_STREAM, key.epoch, int(key.indices[row]), repeat)
        height, width = box[3] - box[1], box[2] - box[0]
        if self.erase_fill is not None:
            return self.erase_fill.draw(rng, height, width)
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _change(batch: np.ndarray, rows: np.ndarray, change: Callable[[Tensor], Tensor]) -> None:
    """Flip or turn images of a batch (B, H, W, 3) in place: few at a time, so that copies stay in the CPU's cache.

    By torch: numpy takes ten times as long to flip pixels of three bytes.
    """
    step = max(1, FLIPPED_BYTES // batch[0].nbytes)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        batch[some] = change(torch.from_numpy(batch[some])).numpy()


def random_box(size: tuple[int, int], scale: Sequence[float], ratio: Sequence[float], draws: np.ndarray) -> Box:
    """Return (left, top, right, bottom) of a random part of an image of `size` (width, height).

    `scale` bounds the share of the area, `ratio` width / height, both as torchvision's RandomResizedCrop draws them:
    ten tries of four uniform numbers of `draws`, then the largest centred box within the ratio.
    """
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for number in range(0, len(draws), 4):
        share, shape, across, down = draws[number : number + 4].tolist()
        area = width * height * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
