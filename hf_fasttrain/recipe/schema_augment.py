"""The schema of the recipe's section `augment`."""

from __future__ import annotations

from typing import Annotated, Literal

from hf_fasttrain.recipe.fields import DurationField, OnOrOff, OrOff, PolicyField, Probability, Section, result


class RandAugment(Section):
    num_ops: int = result(2, "operations per image", ge=1, examples=[3])
    magnitude: int = result(9, "strength, 0 to 30", ge=0, le=30, examples=[15])


class AugMix(Section):
    severity: int = result(3, "strength of the operations, 1 to 10", ge=1, le=10, examples=[5])
    mixture_width: int = result(3, "chains of operations that are mixed", ge=1, examples=[4])
    chain_depth: int = result(-1, "operations in a chain; -1: 1 to 3 at random", ge=-1, examples=[2])
    alpha: float = result(
        1.0, "alpha of the Dirichlet and Beta distributions that mix the chains", gt=0.0, examples=[0.5]
    )


class ColorJitter(Section):
    brightness: float = result(0.0, "factor from 1 - x to 1 + x", ge=0.0, examples=[0.4])
    contrast: float = result(0.0, "factor from 1 - x to 1 + x", ge=0.0, examples=[0.4])
    saturation: float = result(0.0, "factor from 1 - x to 1 + x", ge=0.0, examples=[0.4])
    hue: float = result(0.0, "hue shift from -x to x, as a share of the colour circle", ge=0.0, le=0.5, examples=[0.1])


class Progressive(Section):
    start_size: int = result(..., "image size in the first epoch, in pixels", ge=8, examples=[128])
    until: DurationField = result(..., "when the full size is reached, such as '10 epochs'")
    multiple: int = result(32, "sizes in between are multiples of this", ge=1, examples=[16])


class AugmentSection(Section):
    crop: Literal["random_resized", "padded", "center"] = result(
        "random_resized", "padded: pad by crop_padding and cut; center: as in evaluation"
    )
    crop_scale: list[float] = result(
        [0.08, 1.0], "random_resized: smallest and largest share of the image's area", examples=[[0.35, 1.0]]
    )
    crop_ratio: list[float] = result(
        [0.75, 1.3333333333333333], "random_resized: smallest and largest width / height", examples=[[1.0, 1.0]]
    )
    crop_padding: int = result(4, "padded: black pixels at each side", ge=0, examples=[8])
    flip: bool | Probability = result(
        True, "mirror left-right; true: with probability 0.5; or a probability", examples=[False, 0.3]
    )
    vflip: Probability = result(0.0, "probability that an image is mirrored top-bottom", examples=[0.5])
    quarter_turns: bool = result(False, "turn images by 0, 90, 180 or 270 degrees, each with the same probability")
    auto: PolicyField | None = result(None, "a timm policy (--aa), parsed by timm: rand-m9-mstd0.5-inc1")
    randaugment: Annotated[RandAugment | None, OnOrOff] = result(None, "{num_ops: 2, magnitude: 9}")
    trivialaugment: bool = result(False, "one random operation of random strength per image")
    augmix: Annotated[AugMix | None, OnOrOff] = result(None, "chains of operations mixed with the image: {severity: 3}")
    three_augment: bool = result(False, "one of greyscale, solarise and blur per image (DeiT III)")
    color_jitter: ColorJitter | None = result(None, "{brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.0}")
    repeats: int = result(
        1, "how often an image appears in a step, augmented differently each time", ge=1, examples=[3]
    )
    progressive: Annotated[Progressive | None, OrOff] = result(
        None, "image size by epoch: {start_size: 128, until: 10 epochs}"
    )
    mixup: float = result(0.0, "alpha of mixup's Beta distribution; 0: off", ge=0.0, examples=[0.2])
    cutmix: float = result(0.0, "alpha of cutmix's Beta distribution; 0: off", ge=0.0, examples=[1.0])
    mixup_prob: Probability = result(
        1.0, "probability that a step's images are mixed, by mixup or cutmix", examples=[0.5]
    )
    mixup_switch_prob: Probability = result(0.5, "with both mixup and cutmix: probability of cutmix", examples=[0.8])
    mixup_mode: Literal["batch", "pair", "elem"] = result(
        "batch", "whether mixup and cutmix are drawn per step, per pair of images or per image"
    )
    mixup_until: DurationField | None = result(
        None, "when mixup and cutmix end (timm's --mixup-off-epoch), such as '80 epochs'; null: never"
    )
    label_smoothing: float = result(0.0, "share of each target spread over all classes", ge=0.0, lt=1.0, examples=[0.1])
    erase: Probability = result(0.0, "probability that a random box of an image is erased", examples=[0.25])
    erase_fill: Literal["black", "mean", "noise", "pixel", "color"] = result(
        "black",
        "fill of erased boxes; mean: data.mean; noise: uniform; pixel: normal noise with data.mean and "
        "data.std, color: one such colour per box (timm's --remode pixel and rand)",
    )
