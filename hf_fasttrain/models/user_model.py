"""Models of runs without a recipe: the user passes the model in Python, or names a function that returns it."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.models.model import USER_MODEL_PREFIX, ModelSpec, Preprocessing
from hf_fasttrain.models.weights import read_weights
from hf_fasttrain.run_folder.file_names import EMA_FILE, MODEL_FOLDER, SPEC_FILE, WEIGHTS_FILE
from hf_fasttrain.run_folder.finished import needs_user_model
from hf_fasttrain.run_folder.kept_weights import find_checkpoint
from hf_fasttrain.run_folder.schemas import SpecFile, read_if_sound
from hf_fasttrain.utils.errors import RunError, first_lines, shortened

PREPROCESSING_KEYS = tuple(field.name for field in fields(Preprocessing))
INFO_KEYS = (*PREPROCESSING_KEYS, "class_names", "multi_label")
EXAMPLE = 'dict(image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), class_names=["cat", "dog"])'
ModelArgument = nn.Module | tuple[nn.Module, Mapping[str, Any]] | str | Callable[[], Any]


@dataclass(frozen=True)
class UserModel:
    """A user's model with a run's weights; it maps images (B, 3, S, S) to logits (B, K)."""

    model: nn.Module
    spec: ModelSpec
    has_names: bool  # whether the user passed class names
    weights: Path  # the weights file


def load_user_model(run: Path, model: ModelArgument | None, weights: str | None) -> UserModel | None:
    """Return the user's model for a run that needs one, None if none is passed.

    Raises RunError if a model is missing, or passed for a run that can build its own.
    """
    return open_user_model(run, model, weights) if model is not None and needs_user_model(run, model) else None


def open_user_model(run: Path, argument: ModelArgument, weights: str | None) -> UserModel:
    """Return a user's model with a run's weights.

    `argument` is the model, a pair (model, info), a function that returns either, or the function's name as
    ``package.module:function``, which is imported from the working directory. `info` must contain `image_size`, `mean`
    and `std` unless the model is timm's; `class_names` are numbers by default. `weights` is last, best, average or
    step_N; None stands for those in RUN/model. Raises RunError if the weights do not fit the model.
    """
    checkpoint = find_checkpoint(run, weights)
    path = (checkpoint or run / MODEL_FOLDER) / WEIGHTS_FILE
    if checkpoint is not None and (checkpoint / EMA_FILE).exists():
        path = checkpoint / EMA_FILE
    model, info, name = _build(argument)
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise RunError(f"{name}: {path} has weights of another model: {first_lines(error)}") from None
    spec, has_names = _spec_of(model.eval(), {**_info_from_run(run), **info}, name)
    return UserModel(_with_logits(model), spec, has_names, path)


def _build(argument: ModelArgument) -> tuple[nn.Module, dict[str, Any], str]:
    """Return the model, its info, and its name in messages."""
    name, value = "model", copy.deepcopy(argument) if isinstance(argument, nn.Module | tuple) else argument
    if isinstance(argument, str):
        name, value = f"--model {argument}", _import_function(argument)
    if callable(value) and not isinstance(value, nn.Module):
        try:
            value = value()
        except Exception as error:
            raise RunError(f"{name}: the function failed: {type(error).__name__}: {first_lines(error)}") from error
    model, info = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if not isinstance(model, nn.Module) or not isinstance(info, Mapping):
        raise RunError(f"{name}: must be a torch.nn.Module or (module, {EXAMPLE}), got a {type(value).__name__}")
    unknown = sorted(set(info) - set(INFO_KEYS))
    if unknown:
        raise RunError(f"{name}: {shortened(unknown)} is unknown; allowed are {', '.join(INFO_KEYS)}")
    return model, dict(info), name


def _import_function(text: str) -> Callable[[], Any]:
    """Import ``package.module:function`` from the working directory and return the function."""
    module_name, _, name = text.partition(":")
    if not name or not module_name:
        raise RunError(f"--model {text}: write it as package.module:function, like mine:make_model")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise RunError(f"--model {text}: can't be imported from {folder}: {first_lines(error)}") from None
    finally:
        sys.path.remove(folder)
    if not callable(function):
        raise RunError(f"--model {text}: must be a function that returns the model, got a {type(function).__name__}")
    typed: Callable[[], Any] = function
    return typed


class _Logits(nn.Module):
    """Wraps a model that returns an object with `.logits`, like transformers' models, and returns the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits


def _with_logits(model: nn.Module) -> nn.Module:
    return _Logits(model) if hasattr(getattr(model, "config", None), "id2label") else model


def _spec_of(model: nn.Module, info: dict[str, Any], name: str) -> tuple[ModelSpec, bool]:
    """Return the spec of a model and whether its classes are named. Raises RunError if information is missing."""
    values = _info_from_timm(model) | {key: info[key] for key in PREPROCESSING_KEYS if key in info}
    missing = [key for key in ("image_size", "mean", "std") if key not in values]
    if missing:
        raise RunError(f"{name}: {', '.join(missing)} of its images is not known; pass (model, {EXAMPLE})")
    for key in ("mean", "std"):
        values[key] = tuple(map(float, values[key]))
    preprocessing = Preprocessing(**values)
    try:
        with torch.no_grad():
            logits = _with_logits(model)(torch.zeros(1, 3, preprocessing.image_size, preprocessing.image_size))
        num_classes = logits.shape[1] if logits.ndim == 2 else 0
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise RunError(f"{name}: can't take an image of {preprocessing.image_size} px: {first_lines(error)}") from None
    classes: Sequence[str] | None = info.get("class_names")
    if not num_classes or (classes is not None and len(classes) != num_classes):
        expected = f"(1, {len(classes)})" if classes is not None else "(1, number of classes)"
        raise RunError(f"{name}: returns {tuple(logits.shape)} for an image instead of {expected} logits")
    names = list(map(str, classes if classes is not None else range(num_classes)))
    options: dict[str, Any] = {"multi_label": bool(info.get("multi_label", False)), "preprocessing": preprocessing}
    spec = ModelSpec(f"{USER_MODEL_PREFIX}{name.removeprefix('--model ')}", names, preprocessing.image_size, **options)
    return spec, classes is not None


def _info_from_run(run: Path) -> dict[str, Any]:
    """Return the info that a recipe's run saved about the user's model, an empty dict for other runs."""
    values = read_if_sound(run / MODEL_FOLDER / SPEC_FILE, SpecFile)
    classes = {key: values[key] for key in ("class_names", "multi_label") if key in values}
    return {**(values.get("preprocessing") or {}), **classes}


def _info_from_timm(model: nn.Module) -> dict[str, Any]:
    """Return the preprocessing of a timm model, an empty dict for other models."""
    if not getattr(model, "pretrained_cfg", None):
        return {}
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    keys = ("mean", "std", "interpolation", "crop_pct")
    return {"image_size": config["input_size"][-1], **{key: config[key] for key in keys}}
