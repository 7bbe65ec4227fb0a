"""Random colour and shape operations on one image, determined by a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from hf_fasttrain.data.pixels.decode import Pixels

Operation = Callable[[Any], Any]  # PIL image -> PIL image


@dataclass(frozen=True)
class Operations:
    """The augmentations of an image beside crop, flip and erasing; those that are set, in this order.

    `randaugment` {num_ops, magnitude} (arXiv 1909.13719), `trivialaugment` (arXiv 2103.10158) and `augmix`
    {severity, mixture_width, chain_depth, alpha} (arXiv 1912.02781) are torchvision's. `three_augment` (DeiT III,
    arXiv 2204.07118) is one of greyscale, solarise and blur. `color_jitter` {brightness, contrast, saturation, hue}
    is torchvision's, in random order.
    """

    randaugment: dict[str, int] | None = None
    trivialaugment: bool = False
    augmix: dict[str, Any] | None = None
    three_augment: bool = False
    color_jitter: dict[str, float] | None = None
    _steps: tuple[Operation, ...] = field(init=False, default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_steps", tuple(self._build()))

    def _build(self) -> list[Operation]:
        if not (self.randaugment or self.trivialaugment or self.augmix or self.color_jitter or self.three_augment):
            return []
        from torchvision.transforms import v2  # slow to import

        steps: list[Operation] = []
        if self.randaugment:
            steps.append(v2.RandAugment(**self.randaugment))
        if self.trivialaugment:
            steps.append(v2.TrivialAugmentWide())
        if self.augmix:
            steps.append(v2.AugMix(**self.augmix))
        if self.three_augment:
            steps.append(three_augment)
        if self.color_jitter:
            steps.append(v2.ColorJitter(**self.color_jitter))
        return steps

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __call__(self, pixels: Pixels, seed: int) -> Pixels:
        """Return the pixels (H, W, 3) after the operations that `seed` draws; torch's generator is restored."""
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            image: Any = Image.fromarray(pixels)
            for step in self._steps:
                image = step(image)
        finally:
            torch.default_generator.set_state(state)
        return np.asarray(image)


def three_augment(image: Image.Image) -> Image.Image:
    """Return the image in grey, solarised at 128, or blurred with a radius of 0.1 to 2 pixels; each a third."""
    choice, strength = torch.rand(2).tolist()
    if choice < 1 / 3:
        return image.convert("L").convert("RGB")
    if choice < 2 / 3:
        return ImageOps.solarize(image, 128)
    return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * strength))
