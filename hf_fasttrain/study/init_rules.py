"""The rules of `init`: what suits data and machine. RULES is their table, and the constants are all thresholds.

A rule returns its choice with the reason, which becomes the comment in the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hf_fasttrain.from_recipe.auto import Choice

FEW_IMAGES = 500  # up to here: finetune_small
MANY_IMAGES = 20_000  # up to here: finetune; above: efficientnet
SMALL_SIDE = 64  # pixels of the median short side, up to which images are small
MEDIUM_SIDE = 160  # up to which 128 px suffice
IMBALANCE = 10  # largest / smallest class, above which rare classes matter
FEW_CORES = 4  # up to which a CPU gets a smaller model and smaller images
STEPS_PER_EPOCH = 4  # minimum, by fewer images per step
FEWEST_IMAGES = 8  # per step: batch norm needs some
HELD_OUT_OF_FEW = 0.2  # share of up to 1,000 images, of which a tenth would be too few to compare runs by
TRANSFORMERS = (
    "vit_",
    "deit",
    "beit",
    "eva",
    "flexivit",
    "samvit",
    "test_vit",
)  # beginnings of names: models of blocks
# Models whose weights are looked for, the preferred one first.
MODELS = ("efficientnet_b0", "tf_efficientnet_lite0", "resnet50", "convnext_tiny", "mobilenetv3_large_100", "resnet18")
SMALL_MODELS = ("tf_efficientnet_lite0", "mobilenetv3_large_100", "efficientnet_b0", "resnet18", "resnet50")


@dataclass(frozen=True)
class Facts:
    """What the rules of RULES look at."""

    images: int  # to train on, before any are held out
    held_out: bool  # whether there is no validation split
    test_split: str | None
    short_side: int  # median, in pixels; 0 if unknown
    imbalance: float  # largest / smallest class
    multi_label: bool
    is_weak_machine: bool
    usual_image_size: int  # of the shipped recipe
    usual_batch_size: int
    fixed_image_size: int | None  # of the model; None if it takes others


class Suggestion(NamedTuple):
    """A setting that is written as a comment."""

    key: str
    text: str  # key: value, as in a recipe
    reason: str


def is_transformer(name: str) -> bool:
    """Return whether a model is a vision transformer by its name."""
    return name.removeprefix("timm/").startswith(TRANSFORMERS) or (name.startswith("transformers:") and "vit" in name)


def base_recipe(*, images: int, model: str) -> Choice:
    """Return the shipped recipe whose values the written one starts from."""
    if images <= FEW_IMAGES and not is_transformer(model):
        return Choice("finetune_small", f"up to {FEW_IMAGES} training images")
    if images <= MANY_IMAGES:
        return Choice("finetune_vit" if is_transformer(model) else "finetune", f"up to {MANY_IMAGES:,} training images")
    return Choice("vit" if is_transformer(model) else "efficientnet", f"more than {MANY_IMAGES:,} training images")


def model_name(*, cores: int, gpu: bool, there: Collection[str]) -> Choice:
    """Return the first of MODELS, or on a small machine of SMALL_MODELS, whose weights are `there`; else the first."""
    is_weak = is_weak_machine(cores=cores, gpu=gpu)
    preferred = SMALL_MODELS if is_weak else MODELS
    reason = f"small, for up to {FEW_CORES} cores and no GPU" if is_weak else "small and accurate"
    found = next((name for name in preferred if name in there), None)
    if found is None or found == preferred[0]:
        return Choice(preferred[0], reason)
    return Choice(found, f"its weights are here; {preferred[0]} would be the first choice")


def image_size(facts: Facts) -> Choice:
    """Return the image size: of the model, if it has one, else by data and machine."""
    side, usual = facts.short_side, facts.usual_image_size
    if facts.fixed_image_size is not None:
        return Choice(facts.fixed_image_size, "the size that the model was made for")
    if 0 < side <= SMALL_SIDE:
        return Choice(SMALL_SIDE, f"small images: the median short side is {side} px")
    if 0 < side <= MEDIUM_SIDE:
        return Choice(128, f"the median short side is {side} px")
    if facts.is_weak_machine:
        return Choice(128, f"up to {FEW_CORES} cores and no GPU; {usual} would take three times as long")
    return Choice(usual, f"the median short side is {side:,} px" if side else "no image's header could be read")


def batch_size(facts: Facts) -> Choice | None:
    """Return fewer images per step for a small dataset, None if the shipped recipe's are right."""
    size = facts.usual_batch_size
    while size > FEWEST_IMAGES and facts.images < STEPS_PER_EPOCH * size:
        size //= 2
    return None if size == facts.usual_batch_size else Choice(size, f"{STEPS_PER_EPOCH} steps per epoch or more")


def eval_fraction(facts: Facts) -> Choice | None:
    """Return the share of images to hold out, None if there is a validation split or the default is right."""
    if not facts.held_out:
        return None
    if facts.images > 1000:
        return Choice(0.1, "held out to evaluate on: there is no validation split")
    return Choice(HELD_OUT_OF_FEW, "held out to evaluate on: there is no validation split, and few images")


def best_metric(facts: Facts) -> Choice | None:
    """Return the metric that decides which evaluation is best, None for the default."""
    if facts.multi_label:
        return Choice("f1_macro", "several labels per image: accuracy counts only images with all of them right")
    if facts.imbalance <= IMBALANCE:
        return None
    return Choice("f1_macro", f"the largest class has {facts.imbalance:.0f} times the images of the smallest")


# Key -> the rule that decides it; base_recipe and model_name come before.
RULES: dict[str, Callable[[Facts], Choice | None]] = {
    "data.image_size": image_size,
    "data.eval_fraction": eval_fraction,
    "train.batch_size": batch_size,
    "checkpoint.best.metric": best_metric,
}


def suggestions(facts: Facts) -> Sequence[Suggestion]:
    """Return what is only suggested, as comments."""
    found = []
    if facts.test_split is not None:
        found.append(Suggestion("data.test_split", f"test_split: {facts.test_split}", "measured once, at the end"))
    if facts.imbalance > IMBALANCE and not facts.multi_label:
        often = Suggestion("train.sampling", "sampling: sqrt", "draws images of rare classes more often")
        weighs = Suggestion("train.class_weights", "class_weights: balanced", "or weighs them in the loss")
        found += [often, weighs]
    return found


def is_weak_machine(*, cores: int, gpu: bool) -> bool:
    """Return whether a machine trains slowly."""
    return not gpu and cores <= FEW_CORES
