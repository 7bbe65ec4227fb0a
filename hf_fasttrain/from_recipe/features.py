"""Features of a split's images by a model without its head: computed once by the fast loader, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_fasttrain.data.loading.batch import Normalize
from hf_fasttrain.data.loading.prefetch import Prefetcher
from hf_fasttrain.data.loading.sampler import MicroBatchKey, process_share
from hf_fasttrain.data.pixels.bad_images import BadImage, Event
from hf_fasttrain.data.pixels.cache import PixelCache, StoredFeatures, cache_key, open_cache
from hf_fasttrain.data.pixels.cache_limits import free_disk_bytes, room_for
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.from_recipe.cache_plan import can_write, kept_bytes, room_made, with_margin
from hf_fasttrain.models.features import Head
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.utils.errors import DataError

WRITE_BYTES = 1 << 20  # features that are collected before they are written


class Computed(NamedTuple):
    """This process's share of the features of a split's images."""

    rows: np.ndarray  # (N,) indices in the split, without bad images
    features: np.ndarray  # (N, V, C) float32
    num_kept: int  # images whose features were read from the disk


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


class FeaturePass:
    """One pass of a model over this process's share of a split.

    `prefetcher_of` returns the loader of its images, given a function for bad images and notes. `views` above 0:
    features of so many augmented views of each image; 0: those of the evaluation crop.
    """

    def __init__(
        self,
        head: Head,
        evaluator: Evaluator,
        normalize: Normalize,
        batch_size: int,
        report: Callable[[Event, int], None],
    ) -> None:
        self.head, self.evaluator, self.normalize = head, evaluator, normalize
        self.batch_size, self.report = batch_size, report

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
        processes, vectors = self.evaluator.processes, max(1, views)
        share = np.array(process_share(len(split), processes.number, processes.index), dtype=np.int64)
        found: dict[int, np.ndarray] = {}
        if cache is not None:
            read = cache.read(split.rows_of(share), split.images.stamp)
            shape = (vectors, self.head.num_features)
            found = {
                int(index): kept
                for index, kept in zip(share, read, strict=True)
                if kept is not None and kept.shape == shape
            }
        missing = np.array([index for index in share.tolist() if index not in found], dtype=np.int64)
        num_kept, bad = len(found), set()

        def report(event: Event, num_images: int) -> None:
            if isinstance(event, BadImage):
                bad.add(event.index)
            self.report(event, num_images)

        if len(missing):
            computed = self._compute(split, prefetcher_of(report), cache, missing, views, bad, should_stop)
            found |= computed
        rows = np.array(sorted(set(found) - bad), dtype=np.int64)
        empty = np.zeros((0, vectors, self.head.num_features), np.float32)
        return Computed(rows, np.stack([found[row] for row in rows.tolist()]) if len(rows) else empty, num_kept)

    def _compute(
        self,
        split: Split,
        prefetcher: Prefetcher,
        cache: PixelCache | None,
        missing: np.ndarray,
        views: int,
        bad: set[int],
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
        model = self.head.model
        with self.head.captured() as features_of, torch.no_grad():
            for chunk, (pixels, _) in zip(chunks, batches, strict=False):
                self.evaluator.logits(model, self.normalize(pixels))
                features = features_of(len(pixels)).cpu().numpy().reshape(len(chunk), vectors, -1)
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
