"""Whether each epoch of a recipe gives the same pixels of an image: what a frozen model computes can be kept then."""

from __future__ import annotations

from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.utils.train_phases import TrainPhases

RANDOM: tuple[str, ...] = ("flip", "vflip", "quarter_turns", "auto", "randaugment", "trivialaugment", "augmix")
RANDOM += ("three_augment", "color_jitter", "erase", "progressive", "mixup", "cutmix")


def changing_pixels(recipe: Recipe) -> str | None:
    """Return the first setting by which an image looks different in each epoch, None if there is none."""
    augment = recipe.augment
    if augment.crop == "random_resized" or (augment.crop == "padded" and augment.crop_padding):
        return f"augment.crop={augment.crop}"
    for name in RANDOM:
        value = getattr(augment, name)
        if value:
            is_section = not isinstance(value, bool | int | float | str)
            return f"augment.{name}" if is_section else f"augment.{name}={str(value).lower()}"
    return None


def without_kept_features(recipe: Recipe) -> str | None:
    """Return the setting for which features can't be kept instead of images, None if they can at first."""
    if recipe.model.trained.phases[0].part != TrainPhases.parse("head").phases[0].part:
        return f"model.train={recipe.model.trained}"
    for key in ("distill", "lora"):
        if getattr(recipe, key) is not None:
            return key
    if recipe.accelerate.compile is True:
        return "accelerate.compile=true"
    if recipe.data.views > 1:
        return f"data.views={recipe.data.views}"
    return changing_pixels(recipe)
