"""Plans of the pixel cache: where a split's decoded pixels are kept (none, memory, disk, device), and how many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from hf_fasttrain.data.pixels.cache import (
    IN_MEMORY,
    ON_DISK,
    PIXELS_FILE,
    CacheEntry,
    PixelCache,
    cache_key,
    default_cache_dir,
    memory_cache,
    open_cache,
)
from hf_fasttrain.data.pixels.cache_limits import free_disk_bytes, make_room, nearest_existing, room_for
from hf_fasttrain.data.pixels.decode import DECODING_ERRORS, image_size_of, is_jpeg
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.from_recipe.auto import cache, cache_gb
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.utils.environment import free_memory_bytes
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.files import expand_user
from hf_fasttrain.utils.format import format_bytes

SAMPLE_SIZE = 64  # images whose headers are read to estimate the memory of all
DEVICE_SHARE = 0.03  # of a GPU's free memory that `auto` uses for images


@dataclass(frozen=True)
class CachePlan:
    """Where a split's pixels are cached, and how many bytes of them."""

    mode: str  # none, memory, disk or device
    budget: int = 0
    reason: str = ""
    need: int = 0  # bytes for all images, estimated from a sample


class CachePlanner:
    """Decides where pixels are cached; the main process of each machine decides for all of its processes."""

    def __init__(
        self, recipe: Recipe, settings: ResolvedSettings, accelerator: Accelerator, needed_memory: int = 0
    ) -> None:
        self.recipe, self.data, self.settings, self.accelerator = recipe, recipe.data, settings, accelerator
        self.processes, self.needed_memory = Processes(accelerator), needed_memory
        self.folder = cache_folder(recipe)
        self._reserved = {"memory": 0, "disk": 0}
        self._expected = {"memory": 0, "disk": 0}

    def plan(
        self,
        split: Split,
        preparation: Preparation,
        *,
        passes: float,
        batchable: bool,
        key: str,
        rows: int | None = None,
        evaluated: int | None = None,
    ) -> CachePlan:
        """Return where the pixels of a split that is read `passes` times are cached; recorded as `key`.

        `rows`: the number of images that a process reads, by default all. `evaluated`: bytes of the pixels of other
        splits that come later, all else may be used up; by default only what this split is estimated to need.
        """
        plan = CachePlan("none")
        if self.processes.is_local_main:
            rows = len(split) if rows is None else rows
            plan = self._plan(split, preparation, passes, batchable, rows, evaluated)
        plan = self.processes.from_local_main(plan)
        reason = f"set by the user: {plan.reason}" if self.data.cache != "auto" and plan.reason else plan.reason
        self.settings.refine(key, plan.mode, reason)
        if self.data.cache == "auto" and plan.mode != "none":
            location = {"memory": "memory", "disk": str(self.folder), "device": str(self.accelerator.device)}[plan.mode]
            self.settings.note(
                f"data.cache=auto: decoded images of split '{split.name}' are kept in {location}: {plan.reason}"
            )
        if plan.mode in ("memory", "disk") and self.data.cache != "auto" and plan.need > plan.budget:
            self.settings.note(
                f"data.cache={plan.mode}: split '{split.name}' needs {format_bytes(plan.need)}, "
                f"{format_bytes(plan.budget)} are kept (data.cache_gb); the rest is decoded every time"
            )
        return plan

    def _plan(
        self,
        split: Split,
        preparation: Preparation,
        passes: float,
        batchable: bool,
        rows: int,
        evaluated: int | None,
    ) -> CachePlan:
        mode: str = self.data.cache
        if mode == "none":
            return CachePlan("none")
        if mode == "auto" and passes <= 1:
            return CachePlan("none", reason=cache(passes=passes).reason)
        need = estimated_bytes(split, preparation)
        own = self.folder / cache_key(self._content(split, preparation))
        room = {mode: self._budget(mode, own) for mode in ("memory", "disk")}
        if mode == "auto":
            on_disk = kept_bytes(own)
            room["disk"] = room["disk"] + on_disk if can_write(self.folder) else 0
            fits = self._fits_device(preparation, need, batchable, share=rows / len(split))
            mode, reason = cache(passes=passes, needed=need, on_disk=on_disk, fits_device=fits, **room)
            if mode == "none":
                return CachePlan("none", reason=reason, need=need)
        if mode == "device":
            assert preparation.center is not None
            return self._plan_device(rows * preparation.center.image_size**2 * 3)
        # A sample may mislead by any factor (icons and a few panoramas): it does not limit what may be cached.
        budget = with_margin(need) if evaluated is None else max(with_margin(need), room[mode] - evaluated)
        budget = min(room[mode], budget)
        spare = max(0, room[mode] + self._reserved[mode] - self._expected[mode])  # others need not use what they may
        self._reserved[mode] += budget
        self._expected[mode] += min(budget, with_margin(need))
        return CachePlan(mode, budget, f"{format_bytes(need)} of pixels, {format_bytes(spare)} to spare", need)

    def _plan_device(self, need: int) -> CachePlan:
        device = self.accelerator.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()
        if need > free:
            raise DataError(
                f"data.cache=device: {format_bytes(need)} of pixels, but only "
                f"{format_bytes(free)} are free on {device}; use disk"
            )
        return CachePlan("device", need, f"{format_bytes(need)} of pixels", need)

    def _fits_device(self, preparation: Preparation, need: int, batchable: bool, share: float) -> bool:
        """Return whether a process's share of the decoded pixels takes only a small part of a GPU's free memory."""
        device = self.accelerator.device
        if not batchable or device.type != "cuda":
            return False
        decoded_bytes = share * (need if preparation.stored_quality is None else 10 * need)
        return decoded_bytes < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]

    def _budget(self, mode: str, own: Path) -> int:
        """Return the bytes that are left for the cache: of data.cache_gb, or of half the free memory or disk.

        On disk, that half is shared by all caches; those that no run has open go for `own`.
        """
        if not {"memory": IN_MEMORY, "disk": ON_DISK}[mode]:
            return 0
        if self.data.cache_gb != "auto":
            return max(0, int(self.data.cache_gb * 1e9) - self._reserved[mode])
        if mode == "memory":
            budget = self._free_memory
        else:
            budget = room_for(self.folder, own, free_disk_bytes(self.folder))
        return max(0, budget - self._reserved[mode])

    @cached_property  # what is free changes while splits are planned
    def _free_memory(self) -> int:
        return int(cache_gb(free=free_memory_bytes(), needed_elsewhere=self.needed_memory).value)

    @property
    def memory_bytes(self) -> int:
        """The memory that cached pixels are expected to take, for all splits planned so far."""
        return self._expected["memory"]

    def open(self, split: Split, preparation: Preparation, plan: CachePlan) -> PixelCache | None:
        """Return the cache of a plan, None without one; on disk it is shared with earlier runs and other recipes."""
        if plan.mode not in ("memory", "disk"):
            return None
        num_rows = len(split.images)
        if plan.mode == "disk":
            content = self._content(split, preparation)
            own = self.folder / cache_key(content)
            if self.processes.is_local_main:
                needed = min(plan.budget, with_margin(plan.need))
                if (text := room_made(own, needed, self.data.dataset, content["fingerprint"])) is not None:
                    self.settings.note(text)
            metadata = {"dataset": self.data.dataset, "split": split.name, **content}
            return open_cache(own, num_rows, plan.budget, metadata)
        cache = memory_cache(num_rows, plan.budget) if self.processes.is_local_main else None
        index, pixels = self.processes.from_local_main((cache.index_path, cache.pixels_path) if cache else None)
        return cache or PixelCache(index, pixels, num_rows, plan.budget)

    def _content(self, split: Split, preparation: Preparation) -> dict[str, Any]:
        """Return everything that determines a split's pixels; images that two splits share are cached once."""
        return {"fingerprint": split.images.fingerprint, "num_rows": len(split.images), **preparation.key()}


def room_made(own: Path, needed: int, dataset: str, fingerprint: str) -> str | None:
    """Delete caches of data that are no longer used, and those that keep this one from its size; return a note of it.

    `dataset` and `fingerprint` are those of this cache: others of the same data are the last ones to go.
    """

    def is_same_data(entry: CacheEntry) -> bool:
        return dataset == entry.about.get("dataset") or fingerprint == entry.about.get("fingerprint")

    missing = max(0, needed - kept_bytes(own))
    return make_room(own.parent, own, missing, free_disk_bytes(own.parent), is_same_data)


def kept_bytes(cache: Path) -> int:
    """Return the bytes of pixels in a cache on disk, 0 without one."""
    try:
        return (cache / PIXELS_FILE).stat().st_size
    except OSError:
        return 0


def with_margin(need: int) -> int:
    """Return the bytes that are kept free for pixels that are estimated to need so many."""
    return int(1.1 * need) + (1 << 20)


def estimated_bytes(split: Split, preparation: Preparation) -> int:
    """Return the estimated bytes of the pixels of all images of a split, from the headers of a sample."""
    sample = np.linspace(0, len(split) - 1, min(len(split), SAMPLE_SIZE), dtype=np.int64)
    sizes: list[int] = []
    for record in split.records(sample):
        try:
            width, height = preparation.size(*image_size_of(record), jpeg=is_jpeg(record))
        except DECODING_ERRORS:
            continue
        sizes.append(width * height * 3)
    if preparation.stored_quality is not None:
        sizes = _stored_sizes(split, preparation, sample[:: SAMPLE_SIZE // 8])
    return int(np.mean(sizes) * len(split)) if sizes else 0


def _stored_sizes(split: Split, preparation: Preparation, sample: Sequence[int] | np.ndarray) -> list[int]:
    sizes = []
    for record in split.records(sample):
        try:
            sizes.append(len(preparation.encoded(record)[1] or b""))
        except DataError:
            continue
    return sizes


def cache_folder(recipe: Recipe) -> Path:
    """Return the folder of data.cache=disk."""
    return expand_user(recipe.data.cache_dir) if recipe.data.cache_dir else default_cache_dir()


def can_write(folder: Path) -> bool:
    """Return whether a folder can be created or written to."""
    nearest = nearest_existing(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK)
