"""Parts that a user passes beside a recipe, each in the place of what a section of the recipe makes."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from hf_fasttrain.data.loading.sampler import SampleWeights
from hf_fasttrain.data.pixels.custom_transform import PixelTransform
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.run_folder.file_names import CUSTOM
from hf_fasttrain.train.schedule import Schedule
from hf_fasttrain.train.step_loss import StepLoss
from hf_fasttrain.utils.errors import RunError, first_line, shortened
from hf_fasttrain.utils.qualified_name import qualified_name

# The keys, by their beginnings, that have no effect beside a part; and those of them that have nevertheless.
REPLACED: dict[str, tuple[str, ...]] = {
    "model": ("model.",),
    "step_loss": ("train.class_weights", "train.bce", "augment.label_smoothing"),
    "optimizer": ("optimizer.name", "optimizer.momentum", "optimizer.args"),
    "schedule": ("schedule.",),
    "transform": ("augment.",),
    "sample_weights": ("train.sampling",),
}
STILL_USED = (
    "model.freeze_backbone",
    "model.gradient_checkpointing",
    "augment.repeats",
    "augment.progressive",
    "augment.mixup",
    "augment.cutmix",
    "augment.label_smoothing",
)


class RecipeOptions(TypedDict, total=False):
    """The options of `Trainer.from_recipe`; those after the first three are the fields of `CustomParts`."""

    dataset: Any
    resume: bool
    callbacks: Sequence[Any] | None
    model: nn.Module
    step_loss: StepLoss
    optimizer: Callable[[list[dict[str, Any]]], Optimizer]
    schedule: Callable[[int], Schedule]
    metrics: Mapping[str, Callable[..., float]]
    predict: Callable[..., torch.Tensor]
    transform: PixelTransform
    sample_weights: Any


@dataclass(frozen=True)
class CustomParts:
    """What `Trainer.from_recipe` was given in the place of what the recipe's sections make; see there."""

    model: nn.Module | None = None
    step_loss: StepLoss | None = None
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None
    schedule: Callable[[int], Schedule] | None = None
    metrics: Mapping[str, Callable[..., float]] | None = None
    predict: Callable[..., torch.Tensor] | None = None
    transform: PixelTransform | None = None
    sample_weights: Any = None  # (N,) numbers, or a function of labels that returns them

    def __post_init__(self) -> None:
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise RunError(f"model: must be a torch.nn.Module, got a {type(self.model).__name__}")
        for name in ("step_loss", "optimizer", "schedule", "predict", "transform"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise RunError(f"{name}: must be a function, got a {type(value).__name__}; {HINTS[name]}")
        if self.metrics is not None and not (
            isinstance(self.metrics, Mapping) and all(map(callable, self.metrics.values()))
        ):
            raise RunError(
                "metrics: must be a dict of functions by name: metrics={'mAP': f}, f(logits, labels) -> number"
            )
        if self.sample_weights is not None and not callable(self.sample_weights):
            _numbers(self.sample_weights)

    @property
    def names(self) -> dict[str, str]:
        """Part -> the name by which a run knows it again, of the parts that were given."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {part: name_of(value) for part, value in given.items() if value is not None}

    @property
    def settings(self) -> dict[str, str]:
        """The names under the keys that a run stores them by, among the settings that change the result."""
        return {f"{CUSTOM}{part}": name for part, name in self.names.items()}

    def notes(self, recipe: Recipe) -> list[str]:
        """Return a note for each part that makes settings of the recipe's author ineffective."""
        notes = []
        for part, name in self.names.items():
            unused = [key for key in recipe.source.origins if is_replaced(key, part)]
            if recipe.augment.crop != "random_resized":  # pixels are brought to the image size before
                unused = [key for key in unused if key != "augment.crop"]
            if part == "transform":
                notes.append(f"transform={name} stands in the place of the recipe's crop, flip and colour operations")
            if unused:
                notes.append(f"without effect beside {part}={name}: {shortened(sorted(unused))}")
        return notes

    def build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Return what `optimizer` makes of the recipe's parameter groups. Raises RunError for anything else."""
        assert self.optimizer is not None
        optimizer = self.optimizer(groups)
        if not isinstance(optimizer, Optimizer):
            raise RunError(
                f"optimizer={qualified_name(self.optimizer)} returned a {type(optimizer).__name__}; give a function "
                "that makes a torch.optim.Optimizer of the parameter groups it is called with"
            )
        return optimizer

    def build_schedule(self, num_steps: int) -> Schedule:
        """Return the schedule for a training of `num_steps`. Raises RunError for what gives no factors."""
        assert self.schedule is not None
        name = qualified_name(self.schedule)
        try:
            schedule = self.schedule(num_steps)
            factors = [float(schedule(update)) for update in (0, num_steps - 1)]
        except (TypeError, ValueError, AttributeError) as error:
            raise RunError(f"schedule={name}: {first_line(error)}; {HINTS['schedule']}") from None
        if not all(map(math.isfinite, factors)):
            raise RunError(
                f"schedule={name} returns {factors[0]} at first and {factors[1]} at last; {HINTS['schedule']}"
            )
        return schedule

    def build_sample_weights(self, split: Split) -> SampleWeights | None:
        """Return the weights of a split's images, None without any. Raises RunError for what can't be drawn by."""
        if self.sample_weights is None:
            return None
        given = self.sample_weights(split.labels.copy()) if callable(self.sample_weights) else self.sample_weights
        values = _numbers(given)
        if split.rows is not None and values.shape == (len(split.images),):
            values = values[split.rows]  # of the whole data set, a part of which is held out
        if values.shape != (len(split),):
            raise RunError(
                f"sample_weights: shape {values.shape}, but split '{split.name}' has {len(split):,} images; give one "
                "number for each, in their order, or a function of their labels"
            )
        if not np.isfinite(values).all() or values.min() < 0 or not values.sum() > 0:
            raise RunError("sample_weights: must be finite, at least 0, and not all 0")
        return SampleWeights(values)

    def require_sendable(self, workers: int) -> None:
        """Raise RunError for a transform that loader processes could not be given."""
        method = torch.multiprocessing.get_start_method()
        if self.transform is None or not workers or method == "fork":
            return
        try:
            pickle.dumps(self.transform)
        except Exception as error:  # noqa: BLE001 - whatever the user's objects raise
            raise RunError(
                f"transform={qualified_name(self.transform)} can't be sent to loader processes, which are started by "
                f"'{method}' here ({first_line(error)}); define it at the top level of a module, or set data.workers=0"
            ) from None


NO_CUSTOM_PARTS = CustomParts()
HINTS = {
    "optimizer": "give a function of the parameter groups: optimizer=lambda groups: torch.optim.SGD(groups)",
    "schedule": "give a function of the number of steps that returns a function of the update, counted from 0, whose "
    "value is a factor on lr: schedule=lambda num_steps: lambda update: 1 - update / num_steps",
    "transform": "give a function (pixels, rng) -> pixels",
    "step_loss": "give a function (model, images, targets, at) -> loss",
    "predict": "give a function (model, images) -> logits",
}


def is_replaced(key: str, part: str) -> bool:
    """Return whether a key of a recipe has no effect beside a part."""
    used = key.startswith(STILL_USED) and part in ("model", "transform")
    return key.startswith(REPLACED.get(part, ("-",))) and not used


def name_of(part: Any) -> str:
    """Return the name of a part: of a function its qualified name, of a model or numbers a digest beside it."""
    if isinstance(part, Mapping):
        return ", ".join(f"{name}: {qualified_name(value)}" for name, value in part.items())
    if isinstance(part, nn.Module):
        modules = [(name, type(module).__qualname__) for name, module in part.named_modules()]
        tensors = [(name, tuple(tensor.shape)) for name, tensor in part.state_dict().items()]
        return f"{qualified_name(part)} ({len(tensors)} tensors, {_digest(repr((modules, tensors)).encode())})"
    if callable(part):
        return qualified_name(part)
    values = _numbers(part)
    return f"{values.size:,} numbers ({_digest(values.tobytes())})"


def _numbers(weights: Any) -> np.ndarray:
    try:
        return np.ascontiguousarray(weights, np.float64)
    except (TypeError, ValueError):
        raise RunError(
            f"sample_weights: must be numbers or a function of labels, got a {type(weights).__name__}"
        ) from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
