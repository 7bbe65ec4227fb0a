"""Random augmentation operations on one image, such as RandAugment, determined by a seed: add one in `_build`.

Crop, flip and erasing, which work on whole batches: augment.py. Mixup and cutmix: loading/batch.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from hf_fasttrain.data.loading.workers import worker_index
from hf_fasttrain.data.pixels.decode import Pixels
from hf_fasttrain.data.pixels.resize import FILTERS
from hf_fasttrain.utils.errors import RecipeError
from hf_fasttrain.utils.private_apis import let_timm_posterize_by

Operation = Callable[[Any], Any]  # PIL image -> PIL image


@dataclass(frozen=True)
class Operations:
    """The augmentations of an image beside crop, flip and erasing; those that are set, in this order.

    `randaugment` {num_ops, magnitude} (arXiv 1909.13719), `trivialaugment` (arXiv 2103.10158) and `augmix`
    {severity, mixture_width, chain_depth, alpha} (arXiv 1912.02781) are torchvision's. `three_augment` (DeiT III,
    arXiv 2204.07118) is one of greyscale, solarise and blur. `color_jitter` {brightness, contrast, saturation, hue}
    is torchvision's, in random order. `auto` {policy, image_size, mean, interpolation} is timm's: see `timm_policy`.
    """

    auto: dict[str, Any] | None = None
    randaugment: dict[str, int] | None = None
    trivialaugment: bool = False
    augmix: dict[str, Any] | None = None
    three_augment: bool = False
    color_jitter: dict[str, float] | None = None
    _steps: tuple[Operation, ...] = field(init=False, default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_steps", tuple(self._build()))

    def _build(self) -> list[Operation]:
        steps: list[Operation] = [timm_policy(**self.auto)] if self.auto else []
        if not (self.randaugment or self.trivialaugment or self.augmix or self.color_jitter or self.three_augment):
            return steps
        from torchvision.transforms import v2  # slow to import

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
        """Return the pixels (H, W, 3) after the operations that `seed` draws; no generator's state is changed."""
        with seeded_globals(seed) if self.auto else _seeded_torch(seed):
            image: Any = Image.fromarray(pixels)
            for step in self._steps:
                image = step(image)
        return np.asarray(image)


@contextmanager
def _seeded_torch(seed: int) -> Iterator[None]:
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch, and restore them afterwards; others' code draws from them.

    Those of a loader process have no other use, and stay as they are then.
    """
    states = None if worker_index() is not None else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def timm_policy(policy: str, image_size: int, mean: Sequence[float], interpolation: str) -> Operation:
    """Return timm's augmentation of a policy such as rand-m9-mstd0.5-inc1, made as timm's own transforms make it.

    `mean` (of 0-1 pixels) is the colour beside a shifted or rotated image. Raises RecipeError for a policy that timm
    does not accept.
    """
    from timm.data import auto_augment

    let_timm_posterize_by(posterize)
    color = tuple(min(255, round(255 * value)) for value in mean)
    options: dict[str, Any] = {"translate_const": int(image_size * 0.45), "img_mean": color}
    if interpolation in ("nearest", "bilinear", "bicubic"):  # Pillow can't rotate by others: timm's default then
        options["interpolation"] = FILTERS[interpolation]
    make: Callable[..., Operation] = auto_augment.auto_augment_transform
    if policy.startswith("rand"):
        make = auto_augment.rand_augment_transform
    elif policy.startswith("augmix"):
        make, options["translate_pct"] = auto_augment.augment_and_mix_transform, 0.3
    try:
        with seeded_globals(0):
            operation = make(policy, options)
            operation(Image.new("RGB", (8, 8)))  # more operations than there are, say, fail only when they are drawn
    except (AssertionError, ValueError, TypeError) as error:
        raise RecipeError(f"augment.auto={policy}: timm does not accept it: {error}") from None
    return operation


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Return the image with so many bits of each channel; black without any, as Pillow before version 13 did."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def three_augment(image: Image.Image) -> Image.Image:
    """Return the image in grey, solarised at 128, or blurred with a radius of 0.1 to 2 pixels; each a third."""
    choice, strength = torch.rand(2).tolist()
    if choice < 1 / 3:
        return image.convert("L").convert("RGB")
    if choice < 2 / 3:
        return ImageOps.solarize(image, 128)
    return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * strength))
