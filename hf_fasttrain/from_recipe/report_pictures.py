"""The pictures of a run's report: training images as the model saw them, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.loading.batch import Normalize
from hf_fasttrain.data.loading.loader import TrainLoader
from hf_fasttrain.data.loading.prefetch import ImageBatches, Prefetcher
from hf_fasttrain.data.loading.sampler import SamplingPlan
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import Source, Split
from hf_fasttrain.from_recipe.custom import NO_CUSTOM_PARTS, CustomParts
from hf_fasttrain.from_recipe.loaders import build_transform, eval_preparation, train_mixing, train_preparation
from hf_fasttrain.models.model import Preprocessing
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.run_folder.gallery import Gallery, Picture
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.utils.errors import UserError

NUM_TRAINING, NUM_MISTAKES = 16, 24  # pictures in a report
MIN_SHARE = 0.01  # of a class in a mixed target, to be listed


@dataclass(frozen=True)
class ReportPictures:
    """Makes the pictures of a run: training images as the model saw them, and its worst mistakes."""

    recipe: Recipe
    source: Source
    sampling_plan: SamplingPlan
    pre: Preprocessing
    custom: CustomParts = NO_CUSTOM_PARTS

    def write(self, run: Path, log: Callable[[str], None], num_steps: int, predictions: Predictions | None) -> None:
        """Write the gallery of a run that ended after `num_steps`; log images that can no longer be read.

        Raises OSError.
        """
        pixels: dict[str, np.ndarray] = {}
        gallery = Gallery(self.source.class_names)
        try:
            if num_steps:
                step, training = self.training(num_steps, pixels)
                gallery = replace(gallery, training=training, training_step=step)
        except UserError as error:
            log(f"note: the report has no training images: {error}")
        try:
            if predictions is not None:
                mistakes, step = self.mistakes(predictions, pixels), predictions.step
                gallery = replace(gallery, mistakes=mistakes, mistakes_step=step, mistakes_split=predictions.split)
        except UserError as error:
            log(f"note: the report does not show the worst mistakes: {error}")
        gallery.save(run, pixels)

    def training(self, num_steps: int, pixels: dict[str, np.ndarray]) -> tuple[int, list[Picture]]:
        """Return a step (counted from 1) and its first images as the model saw them: cropped, mixed, erased.

        It is the first step of the last epoch. The images are added to `pixels` by file name.
        """
        sampling_plan = replace(self.sampling_plan, num_processes=1, process_index=0, micro_batch_size=NUM_TRAINING)
        index = (num_steps - 1) // sampling_plan.steps_per_epoch * sampling_plan.steps_per_epoch
        step = next(self._loader(sampling_plan).steps(index, index + 1))
        images, targets = next(step.micro_batches)
        images = images if images.ndim == 4 else images[:, 0]  # the first view
        names = [
            picture_name(self.source.train, int(row)) for row in sampling_plan.plan(index).micro_batches[0].indices
        ]
        pictures = []
        for number, (image, target, name) in enumerate(zip(self._pixels(images), targets, names, strict=False)):
            pixels[f"training_{number:02d}.jpg"] = image
            pictures.append(Picture(f"training_{number:02d}.jpg", name, self._shares(target)))
        return index + 1, pictures[:NUM_TRAINING]

    def _loader(self, sampling_plan: SamplingPlan) -> TrainLoader:
        """Return a loader of the training images without cache and workers; its pixels are those of training."""
        split, steps_per_epoch = self.source.train, sampling_plan.steps_per_epoch
        transform = build_transform(self.recipe, self.pre, steps_per_epoch, self.custom, split)
        images = Images(split, train_preparation(self.recipe, self.pre))
        cpu = torch.device("cpu")
        prefetcher = Prefetcher(
            ImageBatches(images, transform), cpu, workers=0, pin_memory=False, report=lambda *_: None
        )
        normalize = Normalize(self.pre.mean, self.pre.std, cpu, channels_last=False)
        mixing = train_mixing(self.recipe, len(self.source.class_names), sampling_plan.steps_per_epoch)
        return TrainLoader(prefetcher, sampling_plan, normalize, mixing, transform.size_at, self.recipe.data.views)

    def _pixels(self, images: Tensor) -> np.ndarray:
        """Return normalised images (B, 3, H, W) as pixels (B, H, W, 3) uint8."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.pre.mean, self.pre.std))
        levels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return levels.permute(0, 2, 3, 1).numpy()

    def _shares(self, target: Tensor) -> dict[str, float]:
        names = self.source.class_names
        if target.ndim == 0:
            return {names[int(target)]: 1.0}
        shown = (target > MIN_SHARE).nonzero().flatten()
        shown = shown[target[shown].argsort(descending=True, stable=True)]
        return {names[i]: round(float(target[i]), 4) for i in shown.tolist()}

    def mistakes(self, predictions: Predictions, pixels: dict[str, np.ndarray]) -> list[Picture]:
        """Return the wrongly predicted images with the highest losses, as the model saw them."""
        split, pictures = self.source.evaluation, []
        preparation = eval_preparation(self.pre)
        for number, index in enumerate(predictions.worst(NUM_MISTAKES)):
            row = int(predictions.rows[index])
            if row < 0:
                continue
            file = f"mistake_{number:02d}.jpg"
            pixels[file], source_row = pixels_as_evaluated(split, preparation, row)
            truth = dict.fromkeys(self._class_names(predictions.classes_of(predictions.labels, index)), 1.0)
            name = picture_name(split, source_row)  # of the substitute if the image is bad
            loss = float(predictions.losses[index])
            pictures.append(Picture(file, name, truth, self._scores(predictions, index), loss))
        return pictures

    def _scores(self, predictions: Predictions, index: int) -> dict[str, float | None]:
        """Return the predicted classes with scores; multi-label: only the score of the worst class is known."""
        names = self._class_names(predictions.classes_of(predictions.predicted, index))
        confidence = float(predictions.confidence[index])
        if not predictions.is_multi_label:
            return dict.fromkeys(names, confidence)
        scores: dict[str, float | None] = dict.fromkeys(names)
        worst = self.source.class_names[int(predictions.worst_class[index])]
        if worst in scores:
            scores[worst] = confidence
        else:
            scores[f"{worst} missed:"] = 1 - confidence
        return scores

    def _class_names(self, classes: list[int]) -> list[str]:
        return [self.source.class_names[number] for number in classes]


def pixels_as_evaluated(split: Split, preparation: Preparation, index: int) -> tuple[np.ndarray, int]:
    """Return the pixels (H, W, 3) of an image as it is evaluated, and its index: another one if the image is bad."""
    source_rows = np.array([index])
    ((_, image),) = Images(split, preparation).pixels(np.array([index]), source_rows, [])
    return image, int(source_rows[0])


def picture_name(split: Split, index: int) -> str:
    """Return what an image of a split is called: class/file, or its row."""
    path: Any = split.records([index])[0]["path"]
    return "/".join(Path(path).parts[-2:]) if path else f"row {index}"
