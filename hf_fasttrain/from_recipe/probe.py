"""A head that is fitted to features before the first step: `hf-fasttrain probe` and train.probe_first."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.data.source.multi_label import MultiLabels, class_counts, dense_labels
from hf_fasttrain.from_recipe.features import (
    Computed,
    FeaturePass,
    Store,
    described_backbone,
    head_features,
    store_of,
)
from hf_fasttrain.from_recipe.loaders import Loaders, eval_preparation, train_preparation
from hf_fasttrain.from_recipe.parts import Parts
from hf_fasttrain.models.features import Head, LinearHead
from hf_fasttrain.models.model import batch_norms, uses_batch_statistics
from hf_fasttrain.recipe.load import with_values
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.train.distributed import on_main
from hf_fasttrain.train.ending import result_of
from hf_fasttrain.train.linear_probe import Neighbors, Regression, Vectors, as_logits, fit_regression
from hf_fasttrain.train.loss import resolve_class_weights
from hf_fasttrain.train.metrics import Metrics, built_in_metrics
from hf_fasttrain.train.stop import signal_name, stopped
from hf_fasttrain.utils.environment import free_memory_bytes
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.format import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer

COPIES = 3  # of the features in float64 that fitting needs
CHECKED = 4  # images whose logits show that the model holds the head


def probe_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe with train.probe_first."""
    return with_values(recipe, {"train.probe_first": True})


def require_memory(features: np.ndarray, key: str) -> None:
    """Raise RunError if there is no memory to fit a regression to features (N, V, C); `key` names what wants it."""
    required, free = COPIES * 8 * features.size, free_memory_bytes()
    if required > free:
        raise RunError(
            f"{key}: fitting {format_count(len(features), 'image')} with {features[0].size:,} features needs about "
            f"{format_bytes(required)} of memory, {format_bytes(free)} are free; lower train.max_images or probe.views"
        )


@dataclass(frozen=True)
class ProbeResult:
    """What fitting the head has found, as in result.json."""

    features: int  # of an image
    images: int  # of the training split
    views: int
    strength: float
    chosen_on: int  # images on which strength and number of neighbours were chosen; 0: they were given
    neighbors: int | None  # None: no image to evaluate
    neighbors_metrics: dict[str, float]  # of the nearest neighbours, on the evaluation split
    kept: int  # images of all splits whose features were read from the disk
    feature_seconds: float
    fit_seconds: float


class HeadProbe:
    """Fits the head of a trainer's model to the features of its training images; called by all processes."""

    def __init__(self, parts: Parts, loaders: Loaders, batch_size: int) -> None:
        self.parts, self.loaders, self.batch_size = parts, loaders, batch_size
        self.result: ProbeResult | None = None
        custom = parts.custom
        if custom.predict is not None:
            raise RunError("train.probe_first: fits the model's own head, which predict= does not use; leave one out")
        self.head = Head(parts.model, parts.spec.num_classes)

    def __call__(self, trainer: Trainer) -> None:
        """Compute the features, fit, and set the head of the model and of its moving average.

        Raises Stopped after a signal.
        """
        start, parts, source = time.perf_counter(), self.parts, self.parts.source
        parts.model.eval()
        views, num_kept = parts.recipe.probe.views, 0
        found: list[tuple[Split, Tensor | None, Tensor | None]] = []
        passes = [(source.train, 0), *([(source.train, views)] if views else []), (source.evaluation, 0)]
        for split, number in passes:
            rows, features, kept = self.features_on_main(trainer, split, number)
            num_kept += kept
            found.append((split, rows, features))
        feature_seconds = time.perf_counter() - start
        fitted = on_main(partial(self._fit, found))
        regression, neighbors, neighbor_metrics, num_images = fitted
        self._set(trainer, regression.head)
        fit_seconds = time.perf_counter() - start - feature_seconds
        self.result = ProbeResult(
            self.head.num_features,
            num_images,
            views,
            regression.strength,
            regression.chosen_on,
            neighbors,
            neighbor_metrics,
            num_kept,
            feature_seconds,
            fit_seconds,
        )
        for text in self._notes(regression):
            trainer.log.note(text)
        trainer.log.print(self._summary())
        trainer.step.accumulation.set_train_mode()

    def _stop(self, trainer: Trainer, number: int) -> None:
        message = f"stopped by {signal_name(number)} before the first step, while features were computed"
        message += "; those computed are kept on disk" if self._store is not None else ""
        trainer.log.print(f"{message}: the same command begins again")
        raise stopped(number, message, 0, result_of(trainer), saved=True)

    @cached_property
    def _store(self) -> Store | None:
        """Where features are kept; None if they are not."""
        return store_of(self.parts, described_backbone(self.parts, self.head))

    def features_on_main(
        self, trainer: Trainer, split: Split, views: int = 0
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """Return indices (N,) and features (N, V, C) of the images that could be read, on the main process, else None.

        Called by all processes. The last number is how many features were kept from before. Raises Stopped.
        """
        with trainer.log.activity(f"features: {split.name}"):
            computed = self._features(trainer, split, views)
        if stop := trainer.stop.now():
            self._stop(trainer, stop)
        rows, features = (torch.from_numpy(part) for part in (computed.rows, computed.features))
        num_kept = trainer.processes.sum(computed.num_kept)
        return trainer.processes.rows_on_main(rows), trainer.processes.rows_on_main(features), num_kept

    def _features(self, trainer: Trainer, split: Split, views: int) -> Computed:
        parts, loaders = self.parts, self.loaders
        preparation = eval_preparation(loaders.pre, parts.recipe.data.decoder)
        augmentation: dict[str, Any] = {}
        if views:
            preparation = train_preparation(parts.recipe, loaders.pre)
            augmentation = {"augment": parts.recipe.augment.model_dump(), "seed": parts.recipe.seed}
            augmentation["size"] = parts.recipe.data.size_in_training
        store = self._store if not (views and parts.custom.transform) else None
        cache = None
        if store is not None:
            prepared = {**preparation.key(), **augmentation, "views": views}
            is_main = trainer.processes.is_local_main
            cache = store.open(split, prepared, max(1, views) * self.head.num_features, makes_room=is_main)
        run = FeaturePass(
            partial(head_features, self.head, trainer.evaluation.evaluator),
            self.head.num_features,
            trainer.processes,
            loaders.normalize,
            self.batch_size,
            loaders.bad_images.report,
        )
        steps = parts.sampling_plan.steps_per_epoch
        prefetcher_of = partial(loaders.pass_over, split, augmented=bool(views), steps_per_epoch=steps)
        return run(split, prefetcher_of, cache, views=views, should_stop=trainer.stop.pending).without_bad()

    def _fit(
        self, found: list[tuple[Split, Tensor | None, Tensor | None]]
    ) -> tuple[Regression, int | None, dict[str, float], int]:
        """Return the regression, and number and metrics of the nearest neighbours; on the main process."""
        recipe, seed = self.parts.recipe, self.parts.recipe.seed
        train, evaluated = self._vectors(found[:-1]), self._vectors(found[-1:])
        if not len(train):
            raise RunError("train.probe_first: no training image could be read")
        strength = None if recipe.probe.strength == "auto" else recipe.probe.strength
        regression = fit_regression(train, strength=strength, has_bias=self.head.has_bias, seed=seed)
        if not len(evaluated):
            return regression, None, {}, len(train)
        neighbors = Neighbors(train, None if recipe.probe.neighbors == "auto" else recipe.probe.neighbors, seed)
        multi_label = train.is_multi_label
        shares = neighbors.shares(evaluated.features[:, 0], train.labels)
        counts = Metrics(train.num_classes, torch.device("cpu"), multi_label=multi_label)
        counts.update(torch.from_numpy(as_logits(shares, multi_label=multi_label)), torch.from_numpy(evaluated.labels))
        names = built_in_metrics(train.num_classes, multi_label=multi_label)
        metrics = {name: value for name, value in counts.compute().items() if name in names and name != "loss"}
        return regression, neighbors.number, metrics, len(train)

    def _vectors(self, found: list[tuple[Split, Tensor | None, Tensor | None]]) -> Vectors:
        """Return features and labels of the images of a split that all passes over it could read."""
        split, rows, features = found[0]
        assert rows is not None
        assert features is not None
        parts = [(rows.numpy(), features.numpy())]
        parts += [(r.numpy(), f.numpy()) for _, r, f in found[1:] if r is not None and f is not None]
        common = parts[0][0]
        for other, _ in parts[1:]:
            common = np.intersect1d(common, other)
        joined = np.concatenate([each[np.isin(indices, common)] for indices, each in parts], axis=1)
        require_memory(joined, "train.probe_first")
        weights = self.parts.sampling_plan.weights if split is self.parts.source.train else None
        counts = class_counts(self.parts.source.train.labels, self.parts.spec.num_classes)
        class_weights = resolve_class_weights(
            self.parts.recipe.train.class_weights, counts, self.parts.spec.class_names
        )
        return Vectors(
            joined,
            dense_labels(split.labels, common),
            self.parts.spec.num_classes,
            None if weights is None else weights.values[common] / weights.values[common].mean(),
            None if class_weights is None else class_weights.numpy().astype(np.float64),
        )

    def _set(self, trainer: Trainer, head: LinearHead) -> None:
        """Set the head of the model and of its moving average, which a few images check."""
        model, size = trainer.raw_model, self.parts.spec.image_size
        images = torch.rand(CHECKED, 3, size, size, generator=torch.Generator().manual_seed(0))
        images = self.loaders.normalize((255 * images).byte().permute(0, 2, 3, 1).contiguous().to(trainer.device))
        Head(model, self.head.num_classes).set_exactly(head, images)
        if trainer.ema is not None:
            average = Head(trainer.ema.module, self.head.num_classes)
            for target, source in zip(average.layers, self.head.layers, strict=True):
                target.load_state_dict(source.state_dict())

    def _notes(self, regression: Regression) -> list[str]:
        notes = []
        if not self.parts.recipe.model.pretrained and self.parts.custom.model is None:
            notes.append("model.pretrained=false: these are features of random weights; set it to published ones")
        if not regression.has_converged:
            notes.append(
                "the logistic regression has not converged to the end; probe.strength regularises more if lower"
            )
        if any(map(uses_batch_statistics, batch_norms(self.parts.model))):
            notes.append(
                "the head is fitted to features with the pretrained statistics of the batch norms; training from it "
                "changes them, which model.batch_norm=frozen avoids (docs/recipes.md)"
            )
        labels = self.parts.source.train.labels
        if isinstance(labels, MultiLabels):
            notes.append("several labels per image: one logistic regression for each class")
        return notes

    def _summary(self) -> str:
        result = self.result
        assert result is not None
        kept = f", {format_count(result.kept, 'image')} of them kept from before" if result.kept else ""
        chosen = f", chosen on {format_count(result.chosen_on, 'image')}" if result.chosen_on else ""
        text = (
            f"features: {result.features:,} of each of {format_count(result.images, 'training image')} in "
            f"{format_duration(result.feature_seconds)}{kept}\n"
            f"head: logistic regression of strength {result.strength:.3g}{chosen}, fitted in "
            f"{format_duration(result.fit_seconds)}"
        )
        if result.neighbors is None:
            return text
        values = "".join(f"  {name} {value:.4f}" for name, value in result.neighbors_metrics.items())
        return f"{text}\n{format_count(result.neighbors, 'nearest neighbour')}:{values}"
