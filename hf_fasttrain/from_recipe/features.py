"""Features of a split's images by a model without its head: computed once by the fast loader, and kept on disk.

Whatever a frozen model computes of an image can be kept so: a teacher's logits too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.loading.batch import Normalize
from hf_fasttrain.data.loading.prefetch import Prefetcher
from hf_fasttrain.data.loading.sampler import MicroBatchKey, process_share
from hf_fasttrain.data.pixels.bad_images import BadImage, Event
from hf_fasttrain.data.pixels.cache import PixelCache, StoredFeatures, cache_key, open_cache
from hf_fasttrain.data.pixels.cache_limits import free_disk_bytes, room_for
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.from_recipe.cache_plan import cache_folder, can_write, kept_bytes, room_made, with_margin
from hf_fasttrain.from_recipe.parts import Parts
from hf_fasttrain.models.features import Head, backbone_digest
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.utils.environment import describe_versions
from hf_fasttrain.utils.errors import DataError

WRITE_BYTES = 1 << 20  # features that are collected before they are written


Compute = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> features (B, C) float32


class Computed(NamedTuple):
    """This process's share of the features of a split's images."""

    rows: np.ndarray  # (N,) indices in the split
    features: np.ndarray  # (N, V, C) float32; of a bad image those of its substitute
    num_kept: int  # images whose features were read from the disk
    substitutes: dict[int, int]  # bad image -> the one that was read instead, both indices in the split

    def without_bad(self) -> Computed:
        """Return the features of the images that could be read."""
        is_good = ~np.isin(self.rows, list(self.substitutes))
        return Computed(self.rows[is_good], self.features[is_good], self.num_kept, {})


@contextmanager
def head_features(head: Head, evaluator: Evaluator) -> Iterator[Compute]:
    """Within the block: what a head is given for images, by the model as it is evaluated."""
    with head.captured() as features_of, torch.no_grad():

        def compute(images: Tensor) -> Tensor:
            evaluator.logits(head.model, images)
            return features_of(len(images))

        yield compute


class Store:
    """Where features are kept: one cache on disk for each split, model and preprocessing. It may have no room."""

    def __init__(self, folder: Path, content: dict[str, Any], dataset: str, note: Callable[[str], None]) -> None:
        self.folder, self.content, self.dataset, self.note = folder, content, dataset, note
        self.limit: int | None = None  # bytes, of data.cache_gb

    def open(
        self, split: Split, preparation: dict[str, Any], num_values: int, *, makes_room: bool
    ) -> PixelCache | None:
        """Return the cache of a split's features, `num_values` for an image; None, with a note, if it can't be written.

        `preparation`: everything else that determines what the model is given.
        """
        num_rows = len(split.images)
        content = {"fingerprint": split.images.fingerprint, "num_rows": num_rows, **preparation, **self.content}
        own, needed = self.folder / cache_key(content), with_margin(4 * num_values * len(split))
        if not can_write(self.folder):
            self.note(f"features are not kept: {self.folder} can't be written")
            return None
        try:
            text = room_made(own, needed, self.dataset, split.images.fingerprint) if makes_room else None
            if text is not None:
                self.note(text)
            budget = kept_bytes(own) + min(needed, room_for(self.folder, own, free_disk_bytes(self.folder)))
            budget = budget if self.limit is None else min(budget, self.limit)
            return open_cache(own, num_rows, budget, {"dataset": self.dataset, "split": split.name, **content})
        except (DataError, OSError) as error:
            self.note(f"features are not kept: {error}")
            return None


def store_of(parts: Parts, model: dict[str, Any]) -> Store | None:
    """Return where what a model computes of images is kept; `model`: everything that determines the model.

    None if it is not kept: the code of a user's own model may change.
    """
    recipe, accelerator, pre = parts.recipe, parts.accelerator, parts.spec.preprocessing
    if recipe.data.cache == "none" or parts.custom.model is not None:
        return None
    content = {
        **model,
        "normalisation": [pre and (pre.mean, pre.std)],
        "precision": [accelerator.mixed_precision, accelerator.device.type, recipe.accelerate.matmul_precision],
        "libraries": [describe_versions().get(name) for name in ("torch", "timm", "transformers")],
    }
    store = Store(cache_folder(recipe), content, recipe.data.dataset, parts.settings.note)
    store.limit = None if recipe.data.cache_gb == "auto" else int(recipe.data.cache_gb * 1e9)
    return store


def described_backbone(parts: Parts, head: Head) -> dict[str, Any]:
    """Return everything that determines the features of a model."""
    spec = parts.spec
    return {
        "features": spec.name,
        "weights": backbone_digest(parts.model, head.names),
        "model": [spec.args, spec.small_image_stem, spec.image_size],
    }


class FeaturePass:
    """One pass over this process's share of a split, for `num_values` features of an image.

    `opened` returns the context in which they are computed; `prefetcher_of` the loader of the images, given a function
    for bad images and notes. `views` above 0: features of so many augmented views of each image; 0: those of one crop.
    With `whole_batches` they are a function of the split alone: its images are always in the same batches, whatever is
    kept and however many processes there are, so that the last bits don't depend on that.
    """

    def __init__(
        self,
        opened: Callable[[], AbstractContextManager[Compute]],
        num_values: int,
        processes: Processes,
        normalize: Normalize,
        batch_size: int,
        report: Callable[[Event, int], None],
        *,
        whole_batches: bool = False,
    ) -> None:
        self.opened, self.num_values, self.processes, self.normalize = opened, num_values, processes, normalize
        self.batch_size, self.report, self.whole_batches = batch_size, report, whole_batches

    def __call__(
        self,
        split: Split,
        prefetcher_of: Callable[[Callable[[Event, int], None]], Prefetcher],
        cache: PixelCache | None,
        *,
        views: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Computed:
        """Return the features of this process's images; those that are kept are read. It may end early."""
        share, vectors = self._share(len(split)), max(1, views)
        found: dict[int, np.ndarray] = {}
        if cache is not None:
            read = cache.read(split.rows_of(share), split.images.stamp)
            shape = (vectors, self.num_values)
            found = {
                int(index): kept
                for index, kept in zip(share, read, strict=True)
                if kept is not None and kept.shape == shape
            }
        missing = share[~np.isin(share, list(found))]
        if self.whole_batches:
            missing = share[np.isin(share // self.batch_size, missing // self.batch_size)]
        num_kept, substitutes = len(share) - len(missing), dict[int, int]()

        def report(event: Event, num_images: int) -> None:
            if isinstance(event, BadImage):
                substitutes[event.index] = event.substitute
            self.report(event, num_images)

        if len(missing):
            found |= self._compute(split, prefetcher_of(report), cache, missing, views, substitutes, should_stop)
        rows = np.array(sorted(found), dtype=np.int64)
        empty = np.zeros((0, vectors, self.num_values), np.float32)
        features = np.stack([found[row] for row in rows.tolist()]) if len(rows) else empty
        return Computed(rows, features, num_kept, substitutes)

    def _share(self, num_images: int) -> np.ndarray:
        """Return the indices of this process's images."""
        processes = self.processes
        if not self.whole_batches:
            return np.array(process_share(num_images, processes.number, processes.index), dtype=np.int64)
        batches = process_share(-(-num_images // self.batch_size), processes.number, processes.index)
        return np.arange(batches.start * self.batch_size, min(batches.stop * self.batch_size, num_images))

    def _compute(
        self,
        split: Split,
        prefetcher: Prefetcher,
        cache: PixelCache | None,
        missing: np.ndarray,
        views: int,
        bad: Collection[int],
        should_stop: Callable[[], bool],
    ) -> dict[int, np.ndarray]:
        vectors = max(1, views)
        size = max(1, self.batch_size // vectors)
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        keys = (MicroBatchKey(0, chunk).in_views(vectors) for chunk in chunks)
        found: dict[int, np.ndarray] = {}
        waiting: list[StoredFeatures] = []
        batches = prefetcher.open(keys, size * vectors)
        rows = dict(zip(missing.tolist(), split.rows_of(missing).tolist(), strict=True))
        stamps = {index: split.images.stamp(row) for index, row in rows.items()}  # before the images are read
        with self.opened() as compute, torch.no_grad():
            for chunk, (pixels, _) in zip(chunks, batches, strict=False):
                features = compute(self.normalize(pixels)).cpu().numpy().reshape(len(chunk), vectors, -1)
                for index, vector in zip(chunk.tolist(), features, strict=True):
                    found[index] = vector
                    if index not in bad:
                        waiting.append(StoredFeatures(rows[index], stamps[index], vector))
                if sum(item.features.nbytes for item in waiting) > WRITE_BYTES:
                    _keep(cache, waiting)
                if should_stop():
                    break
        _keep(cache, waiting)
        if cache is not None and cache.problem:
            self.report(f"features of split '{split.name}' are not all kept: {cache.problem}", len(split))
        return found


def _keep(cache: PixelCache | None, waiting: list[StoredFeatures]) -> None:
    if cache is not None:
        cache.add(waiting)
    waiting.clear()
