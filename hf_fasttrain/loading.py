"""A recipe's loaders: what is done to images once, what in every epoch, and where their pixels are kept between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_fasttrain.data.augment import EvalTransform, Growth, TrainTransform
from hf_fasttrain.data.batch import Mixing, Normalize
from hf_fasttrain.data.cache import (
    IN_MEMORY,
    ON_DISK,
    PIXELS_FILE,
    PixelCache,
    cache_key,
    default_cache_dir,
    in_gb,
    memory_cache,
    open_cache,
)
from hf_fasttrain.data.decode import DECODING_ERRORS, image_size_of
from hf_fasttrain.data.device import DeviceFeed
from hf_fasttrain.data.feed import Feed, ImageBatches
from hf_fasttrain.data.images import BadImages, Images
from hf_fasttrain.data.loader import EvalLoader, TrainLoader
from hf_fasttrain.data.operations import Operations
from hf_fasttrain.data.order import Order, process_share
from hf_fasttrain.data.prepare import Preparation
from hf_fasttrain.data.source import Split
from hf_fasttrain.environment import free_memory_bytes, num_cores
from hf_fasttrain.errors import DataError
from hf_fasttrain.facts import Facts
from hf_fasttrain.model import Preprocessing
from hf_fasttrain.recipe import Recipe
from hf_fasttrain.threads import local_processes

SAMPLED = 64  # images whose headers are looked at to know how much memory all of them need
DEVICE_SHARE = 0.03  # of a GPU's free memory that `auto` gives to images


def resolve_loading(recipe: Recipe, device: torch.device, facts: Facts) -> tuple[int, bool]:
    """Return the number of loader processes and whether their batches are pinned."""
    cuda, workers, pinned = device.type == "cuda", recipe.data.workers, recipe.data.pin_memory
    if workers == "auto":
        number = min(16, num_cores() // local_processes()) if cuda else 1
        why = "the cores of each training process, at most 16" if cuda else "one on a CPU"
        workers = facts.resolve("data.workers", max(1, number), why)
    if pinned == "auto":
        pinned = facts.resolve("data.pin_memory", cuda, "a GPU" if cuda else "there is no GPU")
    elif pinned and not cuda:
        facts.note("data.pin_memory=true has no effect without a GPU")
        pinned = facts.resolve("data.pin_memory", False, "no effect without a GPU")
    return workers, pinned


def eval_transform(pre: Preprocessing) -> EvalTransform:
    """Return the transform of evaluation and prediction."""
    return EvalTransform(pre.image_size, pre.interpolation, pre.crop_pct, pre.crop_mode)


def train_preparation(recipe: Recipe, pre: Preprocessing) -> Preparation:
    """Return what happens to training images once, before the random part."""
    data, center = recipe.data, None
    if recipe.augment.crop == "padded":
        center = EvalTransform(pre.image_size, pre.interpolation, 1.0)
    elif recipe.augment.crop == "center":
        center = eval_transform(pre)
    return Preparation(
        data.short_side,
        pre.interpolation,
        center,
        data.stored_quality,
        data.reduced_decode,
        pillow=data.decoder == "pillow",
    )


def train_transform(recipe: Recipe, pre: Preprocessing, steps_per_epoch: int) -> TrainTransform:
    """Return what happens to training images in every epoch anew."""
    augment = recipe.augment
    mean = tuple(round(255 * value) for value in pre.mean)
    fills: dict[str, Any] = {"black": (0, 0, 0), "mean": mean, "noise": None}
    growth = None
    if augment.progressive:
        until = -(-augment.progressive.until.to_steps(steps_per_epoch) // steps_per_epoch)
        growth = Growth(augment.progressive.start_size, max(1, until), augment.progressive.multiple)
    policies = (augment.randaugment, augment.augmix, augment.color_jitter)
    randaugment, augmix, color_jitter = (policy.model_dump() if policy else None for policy in policies)
    return TrainTransform(
        image_size=pre.image_size,
        seed=recipe.seed,
        interpolation=pre.interpolation,
        crop="none" if augment.crop == "center" else augment.crop,
        crop_scale=augment.crop_scale,
        crop_ratio=augment.crop_ratio,
        crop_padding=augment.crop_padding,
        flip=augment.flip,
        erase_prob=augment.erase,
        erase_fill=fills[augment.erase_fill],
        operations=Operations(randaugment, augment.trivialaugment, augmix, augment.three_augment, color_jitter),
        growth=growth,
    )


def train_mixing(recipe: Recipe, num_classes: int) -> Mixing | None:
    """Return what mixes the images of a step, None if nothing does."""
    augment = recipe.augment
    if not augment.mixup and not augment.cutmix:
        return None
    return Mixing(augment.mixup, augment.cutmix, num_classes, recipe.seed)


class Loaders:
    """Makes the loaders of a run; bad images are told to `bad_images`.

    Without `keep_pixels` no cache is made or opened, though it is decided where it would be. `needed_memory`: bytes
    that this machine's training processes will take yet, which pixels are not kept in.
    """

    def __init__(
        self,
        recipe: Recipe,
        facts: Facts,
        accelerator: Accelerator,
        pre: Preprocessing,
        bad_images: BadImages,
        *,
        keep_pixels: bool = True,
        needed_memory: int = 0,
    ) -> None:
        self.recipe, self.accelerator, self.pre, self.bad_images = recipe, accelerator, pre, bad_images
        self.device = accelerator.device
        self.workers, self.pinned = resolve_loading(recipe, self.device, facts)
        channels_last = recipe.accelerate.channels_last is True
        self.normalize = Normalize(pre.mean, pre.std, self.device, channels_last=channels_last)
        self.keeper = Keeper(recipe, facts, accelerator, needed_memory)
        self.keep_pixels = keep_pixels

    def training(self, split: Split, order: Order, num_steps: int, num_classes: int) -> TrainLoader:
        """Return the loader of the training images."""
        augment = self.recipe.augment
        transform = train_transform(self.recipe, self.pre, order.steps_per_epoch)
        preparation = train_preparation(self.recipe, self.pre)
        noisy = bool(augment.erase) and transform.erase_fill is None
        batchable = augment.crop != "random_resized" and not transform.operations and not noisy
        if self.recipe.data.cache == "device" and not batchable:
            raise DataError(
                "data.cache=device: only crop, flip and erasing are made on the device; take the other operations "
                "of augment out, or use data.cache=memory"
            )
        passes = num_steps / order.steps_per_epoch
        plan = self.keeper.plan(split, preparation, passes=passes, batchable=batchable, key="data.cache")
        feed = self._feed(split, preparation, plan, transform)
        mixing = train_mixing(self.recipe, num_classes)
        return TrainLoader(feed, order, self.normalize, mixing, transform.size_at)

    def evaluating(self, split: Split, batch_size: int, *, passes: float = 1) -> EvalLoader:
        """Return the loader of a split that is evaluated `passes` times."""
        preparation = Preparation(center=eval_transform(self.pre), pillow=self.recipe.data.decoder == "pillow")
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        rows = process_share(len(split), processes, index)
        plan = self.keeper.plan(
            split, preparation, passes=passes, batchable=True, key="cache of evaluation images", rows=len(rows)
        )
        feed = self._feed(split, preparation, plan, None, rows)
        return EvalLoader(feed, len(split), batch_size, self.normalize, processes, index, name=split.name)

    def _feed(
        self,
        split: Split,
        preparation: Preparation,
        plan: Plan,
        transform: TrainTransform | None,
        rows: range | None = None,
    ) -> Feed:
        cache = self.keeper.open(split, preparation, plan) if self.keep_pixels else None
        images = ImageBatches(Images(split, preparation, cache), transform)
        options: dict[str, Any] = {"workers": self.workers, "pin_memory": self.pinned, "report": self.bad_images.report}
        if plan.mode == "device":
            return DeviceFeed(images, self.device, self.pre.image_size, rows=rows, **options)
        return Feed(images, self.device, **options)


@dataclass(frozen=True)
class Plan:
    """Where a split's pixels are kept, and how many bytes of them."""

    mode: str  # none, memory, disk or device
    budget: int = 0
    why: str = ""
    need: int = 0  # bytes for all of them, as far as a sample tells


class Keeper:
    """Decides where pixels are kept; the main process of each machine decides for all of its processes."""

    def __init__(self, recipe: Recipe, facts: Facts, accelerator: Accelerator, needed_memory: int = 0) -> None:
        self.recipe, self.data, self.facts, self.accelerator = recipe, recipe.data, facts, accelerator
        self.needed_memory = needed_memory
        self.folder = cache_folder(recipe)
        self._taken = {"memory": 0, "disk": 0}

    def plan(
        self,
        split: Split,
        preparation: Preparation,
        *,
        passes: float,
        batchable: bool,
        key: str,
        rows: int | None = None,
    ) -> Plan:
        """Return where the pixels of a split that is gone through `passes` times are kept; recorded as `key`.

        `rows`: how many of its images a process reads, by default all.
        """
        plan = Plan("none")
        if self.accelerator.is_local_main_process:
            plan = self._plan(split, preparation, passes, batchable, len(split) if rows is None else rows)
        plan = self._shared(plan)
        why = f"asked for: {plan.why}" if self.data.cache != "auto" and plan.why else plan.why
        self.facts.resolve(key, plan.mode, self.facts.why(key, why))
        if self.data.cache == "auto" and plan.mode != "none":
            where = {"memory": "memory", "disk": str(self.folder), "device": str(self.accelerator.device)}[plan.mode]
            self.facts.note(f"data.cache=auto: decoded images of split '{split.name}' are kept in {where}: {plan.why}")
        if plan.mode in ("memory", "disk") and self.data.cache != "auto" and plan.need > plan.budget:
            self.facts.note(
                f"data.cache={plan.mode}: split '{split.name}' needs {in_gb(plan.need)}, {in_gb(plan.budget)} are kept "
                "(data.cache_gb); the rest is decoded every time"
            )
        return plan

    def _plan(self, split: Split, preparation: Preparation, passes: float, batchable: bool, rows: int) -> Plan:
        wish: str = self.data.cache
        if wish == "none":
            return Plan("none")
        if wish == "auto" and passes <= 1:
            return Plan("none", why="each image is needed once")
        need = estimated_bytes(split, preparation)
        room = {mode: self._room(mode) for mode in ("memory", "disk")}
        if wish == "auto":
            there = self._there(split, preparation)
            room["disk"] = room["disk"] + there if can_write(self.folder) else 0
            wish = self._chosen(preparation, need, room, batchable, share=rows / len(split))
            if room["disk"] and 0.9 * need < there:  # an earlier run has kept them already
                wish = "disk"
        if wish == "none":
            why = (
                f"{in_gb(need)} of pixels, {in_gb(room['memory'])} of memory and {in_gb(room['disk'])} of disk to spare"
            )
            return Plan("none", why=why, need=need)
        if wish == "device":
            return self._on_device(rows * self.recipe.data.image_size**2 * 3)
        budget = min(room[wish], int(1.1 * need) + (1 << 20))  # the rest is for other splits
        self._taken[wish] += budget
        return Plan(wish, budget, f"{in_gb(need)} of pixels, {in_gb(room[wish])} to spare", need)

    def _on_device(self, need: int) -> Plan:
        device = self.accelerator.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()
        if need > free:
            raise DataError(
                f"data.cache=device: {in_gb(need)} of pixels, but only {in_gb(free)} are free on {device}; use disk"
            )
        return Plan("device", need, f"{in_gb(need)} of pixels", need)

    def _chosen(self, preparation: Preparation, need: int, room: dict[str, int], batchable: bool, share: float) -> str:
        device = self.accelerator.device
        decoded = share * (need if preparation.stored_quality is None else 10 * need)
        if batchable and device.type == "cuda" and decoded < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return "device"
        fitting = (mode for mode in ("memory", "disk") if need <= room[mode])
        return next(fitting, "none")

    def _room(self, mode: str) -> int:
        """Return the bytes that may be used: as the recipe says, else half of what is free."""
        if not {"memory": IN_MEMORY, "disk": ON_DISK}[mode]:
            return 0
        if self.data.cache_gb != "auto":
            return max(0, int(self.data.cache_gb * 1e9) - self._taken[mode])
        if mode == "memory":
            return max(0, (free_memory_bytes() - self.needed_memory) // 2 - self._taken[mode])
        return max(0, free_disk_bytes(self.folder) // 2 - self._taken[mode])

    @property
    def memory_bytes(self) -> int:
        """The most that pixels kept in memory will take of it, for all splits planned so far."""
        return self._taken["memory"]

    def open(self, split: Split, preparation: Preparation, plan: Plan) -> PixelCache | None:
        """Return the cache of a plan; on disk the one that earlier runs and other recipes have filled."""
        if plan.mode not in ("memory", "disk"):
            return None
        num_rows = len(split.images)
        if plan.mode == "disk":
            content = self._content(split, preparation)
            about = {"dataset": self.data.dataset, "split": split.name, **content}
            return open_cache(self.folder / cache_key(content), num_rows, plan.budget, about)
        cache = memory_cache(num_rows, plan.budget) if self.accelerator.is_local_main_process else None
        index, pixels = self._shared((cache.index_path, cache.pixels_path) if cache else None)
        return cache or PixelCache(index, pixels, num_rows, plan.budget)

    def _content(self, split: Split, preparation: Preparation) -> dict[str, Any]:
        """Return everything that decides a split's pixels; what two splits of a data set share is kept once."""
        return {"fingerprint": split.images.fingerprint, "num_rows": len(split.images), **preparation.key()}

    def _there(self, split: Split, preparation: Preparation) -> int:
        """Return how many bytes of the split's pixels are on disk already."""
        try:
            return (self.folder / cache_key(self._content(split, preparation)) / PIXELS_FILE).stat().st_size
        except OSError:
            return 0

    def _shared(self, value: Any) -> Any:
        """Return the value of the main process of this machine."""
        if self.accelerator.num_processes == 1:
            return value
        return gather_object([value])[self.accelerator.process_index - self.accelerator.local_process_index]


def estimated_bytes(split: Split, preparation: Preparation) -> int:
    """Return how many bytes the pixels of all images of a split need, by the headers of a sample."""
    sampled = np.linspace(0, len(split) - 1, min(len(split), SAMPLED), dtype=np.int64)
    sizes: list[int] = []
    for record in split.records(sampled):
        try:
            width, height = preparation.size(*image_size_of(record))
        except DECODING_ERRORS:
            continue
        sizes.append(width * height * 3)
    if preparation.stored_quality is not None:
        sizes = _stored_sizes(split, preparation, sampled[:: SAMPLED // 8])
    return int(np.mean(sizes) * len(split)) if sizes else 0


def _stored_sizes(split: Split, preparation: Preparation, sampled: Sequence[int] | np.ndarray) -> list[int]:
    sizes = []
    for record in split.records(sampled):
        try:
            sizes.append(len(preparation.encoded(record)[1] or b""))
        except DataError:
            continue
    return sizes


def cache_folder(recipe: Recipe) -> Path:
    """Return where data.cache=disk keeps pixels."""
    return Path(recipe.data.cache_dir).expanduser() if recipe.data.cache_dir else default_cache_dir()


def can_write(folder: Path) -> bool:
    """Return whether a folder can be made, or written to."""
    there = existing_part(folder)
    return there.is_dir() and os.access(there, os.W_OK)


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be on."""
    return shutil.disk_usage(existing_part(folder)).free


def existing_part(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
