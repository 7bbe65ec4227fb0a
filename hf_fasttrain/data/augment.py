"""One image at a time, on its way to the batch: crop, resize, flip, operations. Randomness comes from its key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_fasttrain.data.order import AUGMENT_STREAM, keyed_rng

FILTERS = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}
Pixels = np.ndarray  # (H, W, 3) uint8


@dataclass(frozen=True)
class EvalTransform:
    """Resize so that the short side is image_size / crop_pct, then cut the centre: exactly Pillow's resize.

    `crop_mode` squash resizes to a square instead, whatever the image's shape (as timm and ViT's processor do).
    """

    image_size: int
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __call__(self, image: Image.Image, *key: int) -> Pixels:
        """Return (image_size, image_size, 3) uint8 pixels of an RGB image."""
        short = math.floor(self.image_size / self.crop_pct)
        width, height = image.size
        # As torchvision's Resize (and so timm and transformers): the long side is truncated.
        if self.crop_mode == "squash":
            size = (short, short)
        else:
            size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        if size != image.size:
            image = image.resize(size, FILTERS[self.interpolation], reducing_gap=None)
        left, top = (round((side - self.image_size) / 2) for side in image.size)
        return np.asarray(image.crop((left, top, left + self.image_size, top + self.image_size)))


@dataclass(frozen=True)
class TrainTransform:
    """Random crop, flip, operations and erasing; the same pixels for the same (seed, epoch, index, repeat).

    `crop` is ``random_resized`` (Inception's; scale and ratio as in torchvision), ``padded`` or ``center``.
    RandAugment (arXiv 1909.13719) and TrivialAugment (arXiv 2103.10158) are torchvision's.
    """

    image_size: int
    seed: int = 0
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop: str = "random_resized"
    crop_scale: Sequence[float] = (0.08, 1.0)
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3)
    crop_padding: int = 4
    flip: bool = True
    erase_prob: float = 0.0
    randaugment: dict[str, int] | None = None
    trivialaugment: bool = False
    _operation: Callable[[Any], Any] | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_operation", self._build_operation())

    def _build_operation(self) -> Callable[[Any], Any] | None:
        if not self.randaugment and not self.trivialaugment:
            return None
        from torchvision.transforms import v2

        return v2.RandAugment(**self.randaugment) if self.randaugment else v2.TrivialAugmentWide()

    def __call__(self, image: Image.Image, epoch: int, index: int, repeat: int = 0) -> Pixels:
        """Return (image_size, image_size, 3) uint8 pixels of an RGB image."""
        rng = keyed_rng(self.seed, AUGMENT_STREAM, epoch, index, repeat)
        image = self._crop(image, rng)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._operation is not None:
            image = _with_torch_seed(int(rng.integers(2**63)), self._operation, image)
        pixels = np.asarray(image)
        return self._erase(pixels, rng) if self.erase_prob and rng.random() < self.erase_prob else pixels

    def _crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        size = (self.image_size, self.image_size)
        if self.crop == "center":
            return Image.fromarray(EvalTransform(self.image_size, self.interpolation, self.crop_pct)(image))
        if self.crop == "random_resized":
            box = random_box(image.size, self.crop_scale, self.crop_ratio, rng)
            return image.crop(box).resize(size, FILTERS[self.interpolation])
        if image.size != size:
            image = Image.fromarray(EvalTransform(self.image_size, self.interpolation, 1.0)(image))
        left, top = (int(rng.integers(2 * self.crop_padding + 1)) - self.crop_padding for _ in range(2))
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    def _erase(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """Blacken a box of 2 to 33 % of the area (arXiv 1708.04896)."""
        left, top, right, bottom = random_box((self.image_size,) * 2, (0.02, 1 / 3), (0.3, 3.3), rng)
        pixels = pixels.copy()
        pixels[top:bottom, left:right] = 0
        return pixels


def random_box(
    size: tuple[int, int], scale: Sequence[float], ratio: Sequence[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a random part of an image of `size` (width, height).

    `scale` bounds the share of the area, `ratio` width / height, both as torchvision's RandomResizedCrop draws them:
    ten tries, then the largest centred box within the ratio.
    """
    width, height = size
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _with_torch_seed(seed: int, operation: Callable[[Any], Any], image: Any) -> Any:
    """Apply an operation that draws from torch's global generator, which is put back as it was."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        return operation(image)
    finally:
        torch.default_generator.set_state(state)
