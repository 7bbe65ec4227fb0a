"""Custom parts: objects that a user passes to `Trainer.from_recipe` instead of what the recipe would build."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
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

LOSS_SECTIONS = ("train.bce", "train.focal", "train.asymmetric")
# Prefixes of the keys that a custom part replaces, and of those that keep their effect.
REPLACED: dict[str, tuple[str, ...]] = {
    "model": ("model.",),
    "step_loss": ("train.class_weights", "train.loss", *LOSS_SECTIONS, "augment.label_smoothing"),
    "optimizer": ("optimizer.name", "optimizer.momentum", "optimizer.args"),
    "schedule": ("schedule.",),
    "transform": ("augment.",),
    "sample_weights": ("train.sampling",),
}
EXCEPTIONS = (
    "model.train",
    "model.freeze_backbone",
    "model.keep_features",
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
    """The custom parts of a training, described at `Trainer.from_recipe`; None: the recipe's part."""

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
            _as_numbers(self.sample_weights)

    @cached_property
    def names(self) -> dict[str, str]:
        """Part -> name under which a run records it, for the parts that were passed.

        They are kept: a model is changed in place before it is trained, by adapters (LoRA) for instance.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {part: name_of(value) for part, value in values.items() if value is not None}

    @property
    def settings(self) -> dict[str, str]:
        """The names by the keys under which a run stores them, among the settings that change the result."""
        return {f"{CUSTOM}{part}": name for part, name in self.names.items()}

    def notes(self, recipe: Recipe) -> list[str]:
        """Return a note for each part that makes settings of the recipe's author ineffective."""
        notes = []
        for part, name in self.names.items():
            unused = [key for key in recipe.source.origins if is_replaced(key, part)]
            if recipe.augment.crop != "random_resized":  # images are cropped before the transform
                unused = [key for key in unused if key != "augment.crop"]
            if part == "transform":
                notes.append(f"transform={name} replaces the recipe's crop, flip and colour operations")
            if unused:
                notes.append(f"no effect with {part}={name}: {shortened(sorted(unused))}")
        return notes

    def build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Return the user's optimizer for the recipe's parameter groups. Raises RunError if it is not an Optimizer."""
        assert self.optimizer is not None
        optimizer = self.optimizer(groups)
        if not isinstance(optimizer, Optimizer):
            raise RunError(
                f"optimizer={qualified_name(self.optimizer)} returned a {type(optimizer).__name__}; pass a function "
                "that returns a torch.optim.Optimizer for the parameter groups it is called with"
            )
        return optimizer

    def build_schedule(self, num_steps: int) -> Schedule:
        """Return the schedule for a training of `num_steps`. Raises RunError if it does not return factors."""
        assert self.schedule is not None
        name = qualified_name(self.schedule)
        try:
            schedule = self.schedule(num_steps)
            factors = [float(schedule(update)) for update in (0, num_steps - 1)]
        except (TypeError, ValueError, AttributeError) as error:
            raise RunError(f"schedule={name}: {first_line(error)}; {HINTS['schedule']}") from None
        if not all(map(math.isfinite, factors)):
            raise RunError(
                f"schedule={name} returns {factors[0]} for the first and {factors[1]} for the last update; "
                f"{HINTS['schedule']}"
            )
        return schedule

    def build_sample_weights(self, split: Split) -> SampleWeights | None:
        """Return the weights of a split's images, None without any. Raises RunError for invalid weights."""
        if self.sample_weights is None:
            return None
        weights = self.sample_weights(np.array(split.labels)) if callable(self.sample_weights) else self.sample_weights
        values = _as_numbers(weights)
        if split.rows is not None and values.shape == (len(split.images),):
            values = values[split.rows]  # they are for all rows; some are held out
        if values.shape != (len(split),):
            raise RunError(
                f"sample_weights: shape {values.shape}, but split '{split.name}' has {len(split):,} images; pass one "
                "number per image, in their order, or a function of their labels"
            )
        if not np.isfinite(values).all() or values.min() < 0 or not values.sum() > 0:
            raise RunError("sample_weights: must be finite, at least 0, and not all 0")
        return SampleWeights(values)

    def require_picklable(self, workers: int) -> None:
        """Raise RunError for a transform that can't be sent to loader processes."""
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
    "optimizer": "pass a function of the parameter groups: optimizer=lambda groups: torch.optim.SGD(groups)",
    "schedule": "pass a function of the number of steps that returns a function from the update, counted from 0, to a "
    "factor on lr: schedule=lambda num_steps: lambda update: 1 - update / num_steps",
    "transform": "pass a function (pixels, rng) -> pixels",
    "step_loss": "pass a function (model, images, targets, at) -> loss",
    "predict": "pass a function (model, images) -> logits",
}


def is_replaced(key: str, part: str) -> bool:
    """Return whether a custom part makes a key of a recipe ineffective."""
    is_still_used = key.startswith(EXCEPTIONS) and part in ("model", "transform")
    return key.startswith(REPLACED.get(part, ("-",))) and not is_still_used


def name_of(part: Any) -> str:
    """Return the name of a part: a function's qualified name; for a model or numbers, a digest is added."""
    if isinstance(part, Mapping):
        return ", ".join(f"{name}: {qualified_name(value)}" for name, value in part.items())
    if isinstance(part, nn.Module):
        modules = [(name, type(module).__qualname__) for name, module in part.named_modules()]
        tensors = [(name, tuple(tensor.shape)) for name, tensor in part.state_dict().items()]
        return f"{qualified_name(part)} ({len(tensors)} tensors, {_digest(repr((modules, tensors)).encode())})"
    if callable(part):
        return qualified_name(part)
    values = _as_numbers(part)
    return f"{values.size:,} numbers ({_digest(values.tobytes())})"


def _as_numbers(weights: Any) -> np.ndarray:
    try:
        return np.ascontiguousarray(weights, np.float64)
    except (TypeError, ValueError):
        raise RunError(
            f"sample_weights: must be numbers or a function of labels, got a {type(weights).__name__}"
        ) from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
