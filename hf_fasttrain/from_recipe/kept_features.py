"""model.keep_features: while the head alone is trained, its inputs are computed once per image and kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from hf_fasttrain.data.loading.features import EvalFeatures, FeatureLoader, Features
from hf_fasttrain.data.loading.loader import EvalLoader, TrainLoader
from hf_fasttrain.from_recipe.accelerator import local_processes
from hf_fasttrain.from_recipe.auto import cache_gb, decide
from hf_fasttrain.from_recipe.features import (
    Compute,
    Computed,
    FeaturePass,
    Store,
    described_backbone,
    head_features,
    store_of,
)
from hf_fasttrain.from_recipe.loaders import Loaders, train_preparation
from hf_fasttrain.from_recipe.parts import Parts
from hf_fasttrain.models.features import Head, OutputLayer, constant_features
from hf_fasttrain.models.layers import trained_names
from hf_fasttrain.recipe.fixed_pixels import without_kept_features
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.ending import stop_run
from hf_fasttrain.train.feature_loss import LossOfFeatures
from hf_fasttrain.train.loss import Loss
from hf_fasttrain.utils.environment import free_memory_bytes
from hf_fasttrain.utils.errors import ModelError, RunError
from hf_fasttrain.utils.format import format_bytes, format_count

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer

KEY = "model.keep_features"
TRIED = 2  # images that show whether a model's features are constant
COPIES = 3  # of all features in memory while they are collected
ROWS = 1 << 16  # that the processes exchange at once


@dataclass
class KeptFeatures:
    """Keeps the inputs of the head in the steps before step `until`, in which nothing else is trained."""

    parts: Parts
    loaders: Loaders
    head: Head
    layer: OutputLayer
    until: int
    trainer: Trainer | None = None

    def train_loader(self, images: TrainLoader) -> FeatureLoader:
        """Return the loader that yields features, which are computed before the first step."""
        return FeatureLoader(images, self.until, self._compute)

    def loss(self, loss: Loss) -> LossOfFeatures:
        """Return the step loss of features."""
        return LossOfFeatures(loss, self.layer, self.parts.accelerator.autocast)

    def attach(self, trainer: Trainer) -> None:
        """Use features in the trainer's evaluations too."""
        self.trainer, loader = trainer, trainer.evaluation.eval_loader
        trainer.evaluation.evaluator.of_features = self.layer
        if isinstance(loader, EvalLoader):
            head = Head(trainer.trained_model, self.parts.spec.num_classes)
            loader.replaced = EvalFeatures(head.captured, lambda: trainer.state.step <= self.until).batches

    def _compute(self) -> Features:
        trainer, parts = self.trainer, self.parts
        assert trainer is not None
        opened = partial(head_features, self.head, trainer.evaluation.evaluator)
        store = store_of(parts, described_backbone(parts, self.head))
        parts.model.eval()
        features = kept_values(trainer, parts, self.loaders, store, opened, self.head.num_features, KEY)
        trainer.step.accumulation.set_train_mode()
        return features


def kept_values(
    trainer: Trainer,
    parts: Parts,
    loaders: Loaders,
    store: Store | None,
    opened: Callable[[], AbstractContextManager[Compute]],
    num_values: int,
    key: str,
) -> Features:
    """Return what a frozen model computes of all training images, which it notes for the setting `key`.

    The processes share the work. Raises Stopped after a signal; what was computed is in the store then.
    """
    split, micro_batch, processes = parts.source.train, parts.sampling_plan.micro_batch_size, trainer.processes
    cache = None
    if store is not None:
        prepared = {**_preparation(parts, loaders), "batch": micro_batch, "views": "training"}
        cache = store.open(split, prepared, num_values, makes_room=processes.is_local_main)
    report = loaders.bad_images.report
    run = FeaturePass(opened, num_values, processes, loaders.normalize, micro_batch, report, whole_batches=True)
    steps = parts.sampling_plan.steps_per_epoch
    prefetcher_of = partial(loaders.pass_over, split, augmented=True, steps_per_epoch=steps)
    with trainer.log.activity(f"features: {split.name}"):
        computed = run(split, prefetcher_of, cache, should_stop=trainer.stop.pending)
    if stop := trainer.stop.now():
        stop_run(trainer, stop)
    earlier = processes.sum(computed.num_kept)
    features = _joined(computed, len(split), num_values, processes, trainer.device)
    places = ["in memory", *(["on disk"] if cache is not None and cache.problem is None else [])]
    trainer.log.note(
        f"{key}: {format_count(num_values, 'value')} of each of {format_count(len(split), 'training image')} kept "
        f"{' and '.join(places)} instead of computing them anew in each epoch, {format_bytes(features.values.nbytes)}"
        + (f"; {format_count(earlier, 'image')} kept from before" if earlier else "")
    )
    return features


def _preparation(parts: Parts, loaders: Loaders) -> dict[str, Any]:
    """Return everything that determines the pixels of the training images, and in which batches they are."""
    recipe, split = parts.recipe, parts.source.train
    rows = xxhash.xxh3_64_hexdigest(split.rows_of(np.arange(len(split))).astype(np.int64).tobytes())
    own = {"augment": recipe.augment.model_dump(), "size": recipe.data.size_in_training, "rows": rows}
    return {**train_preparation(recipe, loaders.pre).key(), **own}


def _joined(
    computed: Computed, num_images: int, num_values: int, processes: Processes, device: torch.device
) -> Features:
    """Return the features of all processes on each of them."""
    values, used = torch.zeros(num_images, num_values), np.arange(num_images)
    values[torch.from_numpy(computed.rows)] = torch.from_numpy(computed.features[:, 0])
    if processes.is_distributed:
        for part in values.split(ROWS):
            part.copy_(processes.reduce_sum(part.to(device)))
    for substitutes in processes.gather([computed.substitutes]):
        for index, substitute in substitutes.items():
            used[index] = substitute
    return Features(values, used)


def kept_features_of(
    parts: Parts, loaders: Loaders, num_steps: int, hindrance: str | None, *, is_run: bool
) -> KeptFeatures | None:
    """Return what keeps the features of a recipe's first steps, None if they are not kept; recorded with the reason.

    `hindrance`: what else needs images, None if nothing does. Without a run a recipe is only checked, or its steps are
    measured. Raises RunError if the recipe wants what can't be.
    """
    recipe, steps_per_epoch = parts.recipe, parts.sampling_plan.steps_per_epoch
    wanted, phase = recipe.model.keep_features, recipe.model.trained.phases[0]
    if not is_run and wanted is not True:
        return None
    until = min(num_steps, phase.duration.to_steps(steps_per_epoch) if phase.duration else num_steps)
    hindrance, head, layer = without_kept_features(recipe) or _own_parts(parts) or hindrance, None, None
    if hindrance is None and (wanted is True or (wanted == "auto" and until > steps_per_epoch)):
        head, layer = _constant_head(parts)
        hindrance = (
            None if layer else f"a part of {parts.spec.name} that is random, or not frozen, before its last layer"
        )
    needed, memory = _bytes(parts, head, loaders)
    if wanted is True:
        _require_possible(hindrance, needed, memory)
    inputs: dict[str, Any] = {"hindrance": hindrance, "passes": until / steps_per_epoch}
    is_kept = decide(parts.settings, KEY, **inputs, needed=needed, memory=memory) and is_run
    return KeptFeatures(parts, loaders, head, layer, until) if is_kept and head is not None and layer else None


def _require_possible(hindrance: str | None, needed: int, memory: int) -> None:
    """Raise RunError if features that are wanted can't be kept."""
    if hindrance is not None:
        raise RunError(
            f"{KEY}: true needs the same features in every epoch, which {hindrance} rules out; leave it at auto"
        )
    if needed > memory:
        raise RunError(
            f"{KEY}: {format_bytes(needed)} of features, and {format_bytes(memory)} may be used; leave it at auto"
        )


def _own_parts(parts: Parts) -> str | None:
    """Return the part that a user has passed in Python which needs images, None if there is none."""
    names = [name for name in ("step_loss", "predict", "transform") if getattr(parts.custom, name) is not None]
    return f"{names[0]}={parts.custom.names[names[0]]}" if names else None


def _constant_head(parts: Parts) -> tuple[Head | None, OutputLayer | None]:
    """Return the model's head, and its layer if its inputs are constant while the first phase's part is trained."""
    model, size = parts.model, parts.recipe.data.size_in_training
    device = next(model.parameters()).device
    images = torch.rand(TRIED, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        head = Head(model, parts.spec.num_classes)
        part = parts.recipe.model.trained.phases[0].part
        return head, constant_features(head, trained_names(model, part, parts.spec.num_classes), images)
    except ModelError:
        return None, None


def _bytes(parts: Parts, head: Head | None, loaders: Loaders) -> tuple[int, int]:
    """Return the bytes of all features, and how many this machine's memory has for them, on all processes alike."""
    if head is None:
        return 0, 0
    source, limit = parts.source, parts.recipe.data.cache_gb
    needed = 4 * head.num_features * (len(source.train) + len(source.evaluation)) * local_processes()
    free = cache_gb(free=free_memory_bytes(), needed_elsewhere=loaders.planner.needed_memory).value // COPIES
    memory = max(0, free if limit == "auto" else min(free, int(limit * 1e9)))
    return needed, -Processes(parts.accelerator).largest(-memory)[0]
