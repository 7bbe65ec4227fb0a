"""A recipe's loaders: preparation (once), augmentation (every epoch), cache and loader processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from hf_fasttrain.data.loading.batch import Mixing, Normalize
from hf_fasttrain.data.loading.device_cache import DevicePrefetcher
from hf_fasttrain.data.loading.loader import EvalLoader, TrainLoader
from hf_fasttrain.data.loading.prefetch import ImageBatches, Prefetcher
from hf_fasttrain.data.loading.sampler import SamplingPlan, process_share
from hf_fasttrain.data.pixels.augment import EvalTransform, Growth, NormalFill, TrainTransform
from hf_fasttrain.data.pixels.bad_images import BadImages, Event
from hf_fasttrain.data.pixels.custom_transform import CustomTransform
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.data.pixels.operations import Operations
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.from_recipe.accelerator import local_processes
from hf_fasttrain.from_recipe.auto import decide
from hf_fasttrain.from_recipe.cache_plan import CachePlan, CachePlanner, with_margin
from hf_fasttrain.from_recipe.custom import NO_CUSTOM_PARTS, CustomParts
from hf_fasttrain.models.model import Preprocessing
from hf_fasttrain.recipe.load import with_values
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.utils.environment import num_cores
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.qualified_name import qualified_name

REDUCED_DECODE = "data.reduced_decode"


def resolve_loading(settings: ResolvedSettings, device: torch.device) -> tuple[int, bool]:
    """Return the number of loader processes and whether their batches are pinned."""
    gpu, key = device.type == "cuda", "data.pin_memory"
    workers = decide(settings, "data.workers", gpu=gpu, cores=num_cores(), processes=local_processes())
    pinned = decide(settings, key, gpu=gpu)
    if pinned and not gpu and not settings.is_open(key):
        settings.note("data.pin_memory=true has no effect without a GPU")
        pinned = settings.record(key, False, "no effect without a GPU")
    return workers, pinned


def resolve_decoding(recipe: Recipe, settings: ResolvedSettings, custom: CustomParts) -> Recipe:
    """Return the recipe with `data.reduced_decode` decided. A custom transform gets all pixels of an image."""
    data, augment = recipe.data, recipe.augment
    inputs: dict[str, Any] = {"size": data.size_in_training, "short_side": data.short_side}
    inputs |= {"scale": augment.crop_scale, "ratio": augment.crop_ratio}
    crop = augment.crop if custom.transform is None else "custom"
    return with_values(recipe, {REDUCED_DECODE: decide(settings, REDUCED_DECODE, crop=crop, **inputs)})


def eval_transform(pre: Preprocessing) -> EvalTransform:
    """Return the transform of evaluation and prediction."""
    return EvalTransform(pre.image_size, pre.interpolation, pre.crop_pct, pre.crop_mode)


def train_preparation(recipe: Recipe, pre: Preprocessing) -> Preparation:
    """Return the deterministic preparation of training images, done once before augmentation."""
    data, center = recipe.data, None
    if recipe.augment.crop == "padded":
        center = EvalTransform(data.size_in_training, pre.interpolation, 1.0)
    elif recipe.augment.crop == "center":
        center = replace(eval_transform(pre), image_size=data.size_in_training)
    return Preparation(
        data.short_side,
        pre.interpolation,
        center,
        data.stored_quality,
        _least_pixels(data.reduced_decode, data.short_side),
        pillow=data.decoder == "pillow",
        value_range=pre.value_range,
    )


def _least_pixels(reduced_decode: Any, short_side: int | None) -> int | None:
    """Return how many pixels a decoded JPEG's sides keep; None: all of them."""
    if reduced_decode is True:
        return short_side
    return None if reduced_decode in (False, "auto") else int(reduced_decode)


def eval_preparation(pre: Preprocessing, decoder: str = "simplejpeg") -> Preparation:
    """Return the preparation of images for evaluation."""
    return Preparation(center=eval_transform(pre), pillow=decoder == "pillow", value_range=pre.value_range)


def train_transform(recipe: Recipe, pre: Preprocessing, steps_per_epoch: int) -> TrainTransform:
    """Return the augmentation of training images, different in every epoch."""
    augment, size = recipe.augment, recipe.data.size_in_training
    mean = tuple(round(255 * value) for value in pre.mean)
    fills: dict[str, Any] = {"black": (0, 0, 0), "mean": mean, "noise": None}
    fills |= {fill: NormalFill(pre.mean, pre.std, per_pixel=fill == "pixel") for fill in ("pixel", "color")}
    policies = (augment.randaugment, augment.augmix, augment.color_jitter)
    randaugment, augmix, color_jitter = (policy.model_dump() if policy else None for policy in policies)
    timm_policy: dict[str, Any] | None = None
    if augment.auto:
        timm_policy = {"policy": augment.auto, "image_size": size}
        timm_policy |= {"mean": pre.mean, "interpolation": pre.interpolation}
    return TrainTransform(
        image_size=size,
        seed=recipe.seed,
        interpolation=pre.interpolation,
        crop="none" if augment.crop == "center" else augment.crop,
        crop_scale=augment.crop_scale,
        crop_ratio=augment.crop_ratio,
        crop_padding=augment.crop_padding,
        flip=augment.flip,
        vflip=augment.vflip,
        quarter_turns=augment.quarter_turns,
        erase_prob=augment.erase,
        erase_fill=fills[augment.erase_fill],
        operations=Operations(
            timm_policy, randaugment, augment.trivialaugment, augmix, augment.three_augment, color_jitter
        ),
        growth=growth_of(recipe, steps_per_epoch),
    )


def growth_of(recipe: Recipe, steps_per_epoch: int) -> Growth | None:
    """Return how the image size grows, None if it is constant."""
    progressive = recipe.augment.progressive
    if progressive is None:
        return None
    until = -(-progressive.until.to_steps(steps_per_epoch) // steps_per_epoch)
    return Growth(progressive.start_size, max(1, until), progressive.multiple)


def build_transform(
    recipe: Recipe, pre: Preprocessing, steps_per_epoch: int, custom: CustomParts, split: Split
) -> TrainTransform | CustomTransform:
    """Return the augmentation of a split's prepared training images: the user's transform, or the recipe's."""
    if custom.transform is None:
        return train_transform(recipe, pre, steps_per_epoch)
    return CustomTransform(
        custom.transform,
        qualified_name(custom.transform),
        split,
        image_size=recipe.data.size_in_training,
        seed=recipe.seed,
        interpolation=pre.interpolation,
        growth=growth_of(recipe, steps_per_epoch),
    )


def train_mixing(recipe: Recipe, num_classes: int, steps_per_epoch: int) -> Mixing | None:
    """Return mixup and cutmix of a recipe, None if both are off."""
    augment = recipe.augment
    if not augment.mixup and not augment.cutmix:
        return None
    return Mixing(
        augment.mixup,
        augment.cutmix,
        num_classes,
        recipe.seed,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        mode=augment.mixup_mode,
        until=augment.mixup_until.to_steps(steps_per_epoch) if augment.mixup_until else None,
    )


def _runs_on_device(transform: TrainTransform | CustomTransform) -> bool:
    """Return whether `augment_on_device` can do what a transform does."""
    if isinstance(transform, CustomTransform):
        return False
    erases_with_noise = bool(transform.erase_prob) and not isinstance(transform.erase_fill, tuple)
    return transform.crop != "random_resized" and not transform.operations and not erases_with_noise


class Loaders:
    """Builds the loaders of a run; bad images are reported to `bad_images`.

    Without `keep_pixels` no cache is created or opened, but its plan is still recorded. `needed_memory`: bytes that
    this machine's training processes will still allocate, which the cache must leave free. `evaluated_images`: numbers
    of the splits that are evaluated, whose pixels have priority over those for training.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: ResolvedSettings,
        accelerator: Accelerator,
        pre: Preprocessing,
        bad_images: BadImages,
        *,
        keep_pixels: bool = True,
        needed_memory: int = 0,
        evaluated_images: Sequence[int] = (),
        custom: CustomParts = NO_CUSTOM_PARTS,
    ) -> None:
        self.recipe, self.accelerator, self.pre, self.bad_images = recipe, accelerator, pre, bad_images
        self.device, self.custom = accelerator.device, custom
        self.workers, self.pinned = resolve_loading(settings, self.device)
        custom.require_picklable(self.workers)
        channels_last = recipe.accelerate.channels_last is True
        self.normalize = Normalize(pre.mean, pre.std, self.device, channels_last=channels_last)
        self.planner = CachePlanner(recipe, settings, accelerator, needed_memory)
        self.keep_pixels = keep_pixels
        self.evaluated = sum(with_margin(3 * pre.image_size**2 * number) for number in evaluated_images)

    def train_loader(self, split: Split, sampling_plan: SamplingPlan, num_steps: int, num_classes: int) -> TrainLoader:
        """Return the loader of the training images."""
        steps_per_epoch = sampling_plan.steps_per_epoch
        transform = build_transform(self.recipe, self.pre, steps_per_epoch, self.custom, split)
        preparation = train_preparation(self.recipe, self.pre)
        batchable = _runs_on_device(transform)
        if self.recipe.data.cache == "device" and isinstance(transform, CustomTransform):
            raise DataError(f"data.cache=device: transform={transform.name} runs in loader processes; use memory")
        if self.recipe.data.cache == "device" and not batchable:
            raise DataError(
                "data.cache=device: only crop, flip and erasing run on the device; remove the other operations "
                "of augment, or use data.cache=memory"
            )
        passes = num_steps / steps_per_epoch
        plan = self.planner.plan(
            split, preparation, passes=passes, batchable=batchable, key="data.cache", evaluated=self.evaluated
        )
        prefetcher = self._prefetcher(split, preparation, plan, transform)
        mixing = train_mixing(self.recipe, num_classes, steps_per_epoch)
        views = self.recipe.data.views
        return TrainLoader(prefetcher, sampling_plan, self.normalize, mixing, transform.size_at, views)

    def eval_loader(self, split: Split, batch_size: int, *, passes: float = 1) -> EvalLoader:
        """Return the loader of a split that is evaluated `passes` times."""
        preparation = eval_preparation(self.pre, self.recipe.data.decoder)
        group = Processes(self.accelerator)
        processes, index = group.number, group.index
        rows = process_share(len(split), processes, index)
        plan = self.planner.plan(
            split, preparation, passes=passes, batchable=True, key="cache of evaluation images", rows=len(rows)
        )
        prefetcher = self._prefetcher(split, preparation, plan, None, rows)
        loader = EvalLoader(prefetcher, len(split), batch_size, self.normalize, processes, index, name=split.name)
        loader.split = split
        return loader

    def pass_over(
        self, split: Split, report: Callable[[Event, int], None], *, augmented: bool, steps_per_epoch: int
    ) -> Prefetcher:
        """Return the loader of one pass over a split, as evaluated or `augmented`; its pixels are not kept."""
        preparation = eval_preparation(self.pre, self.recipe.data.decoder)
        transform = None
        if augmented:
            preparation = train_preparation(self.recipe, self.pre)
            transform = build_transform(self.recipe, self.pre, steps_per_epoch, self.custom, split)
        images = ImageBatches(Images(split, preparation), transform)
        return Prefetcher(images, self.device, workers=self.workers, pin_memory=self.pinned, report=report)

    def _prefetcher(
        self,
        split: Split,
        preparation: Preparation,
        plan: CachePlan,
        transform: TrainTransform | CustomTransform | None,
        rows: range | None = None,
    ) -> Prefetcher:
        cache = self.planner.open(split, preparation, plan) if self.keep_pixels else None
        images = ImageBatches(Images(split, preparation, cache), transform)
        options: dict[str, Any] = {"workers": self.workers, "pin_memory": self.pinned, "report": self.bad_images.report}
        if plan.mode == "device":
            size = self.pre.image_size if transform is None else transform.image_size
            return DevicePrefetcher(images, self.device, size, rows=rows, **options)
        return Prefetcher(images, self.device, **options)
