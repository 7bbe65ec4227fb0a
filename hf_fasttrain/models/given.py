"""The model of a run that no recipe has made, as its user gives it: in Python, or by the name of a function."""

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

from hf_fasttrain.models.model import ModelSpec, Preprocessing
from hf_fasttrain.models.weights import read_weights
from hf_fasttrain.run_folder.file_names import EMA_FILE, MODEL_FOLDER, SPEC_FILE, WEIGHTS_FILE
from hf_fasttrain.run_folder.finished import is_own_run
from hf_fasttrain.run_folder.kept_weights import find_checkpoint
from hf_fasttrain.utils.errors import RunError, first_lines, shortened
from hf_fasttrain.utils.files import read_json

OF_IMAGES = tuple(field.name for field in fields(Preprocessing))
ABOUT = (*OF_IMAGES, "class_names", "multi_label")
EXAMPLE = 'dict(image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), class_names=["cat", "dog"])'
Given = nn.Module | tuple[nn.Module, Mapping[str, Any]] | str | Callable[[], Any]


@dataclass(frozen=True)
class OpenedModel:
    """A user's model with a run's weights, ready to give the logits (B, K) of images (B, 3, S, S)."""

    model: nn.Module
    spec: ModelSpec
    has_names: bool  # whether the user has named its classes
    weights: Path  # the file of its weights


def given_model(run: Path, given: Given | None, weights: str | None) -> OpenedModel | None:
    """Return `open_given`'s model of a run that needs one; None without a model given.

    Raises RunError for a model beside a run that has its own.
    """
    return open_given(run, given, weights) if given is not None and is_own_run(run, given) else None


def open_given(run: Path, given: Given, weights: str | None) -> OpenedModel:
    """Return a user's model with a run's weights.

    `given`: the model, (model, what is known of its images and classes), a function that returns one of them, or the
    function's name as ``package.module:function``, which is imported from the working directory. What must be known is
    `image_size`, `mean` and `std` (timm's models bring them); `class_names` are their numbers by default. `weights`:
    last, best or step_N; None: those in RUN/model. Raises RunError for a model that the weights do not fit.
    """
    checkpoint = find_checkpoint(run, weights)
    path = (checkpoint or run / MODEL_FOLDER) / WEIGHTS_FILE
    if checkpoint is not None and (checkpoint / EMA_FILE).exists():
        path = checkpoint / EMA_FILE
    model, about, name = _build(given)
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise RunError(f"{name}: {path} has weights of another model: {first_lines(error)}") from None
    spec, has_names = _spec_of(model.eval(), {**_of_run(run), **about}, name)
    return OpenedModel(_with_logits(model), spec, has_names, path)


def _build(given: Given) -> tuple[nn.Module, dict[str, Any], str]:
    """Return the model, what is known of it, and what messages call it."""
    name, made = "model", copy.deepcopy(given) if isinstance(given, nn.Module | tuple) else given
    if isinstance(given, str):
        name, made = f"--model {given}", _function_of(given)
    if callable(made) and not isinstance(made, nn.Module):
        try:
            made = made()
        except Exception as error:
            raise RunError(f"{name}: the function failed: {type(error).__name__}: {first_lines(error)}") from error
    model, about = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(model, nn.Module) or not isinstance(about, Mapping):
        raise RunError(f"{name}: must be a torch.nn.Module or (module, {EXAMPLE}), got a {type(made).__name__}")
    unknown = sorted(set(about) - set(ABOUT))
    if unknown:
        raise RunError(f"{name}: {shortened(unknown)} is unknown; allowed are {', '.join(ABOUT)}")
    return model, dict(about), name


def _function_of(text: str) -> Callable[[], Any]:
    """Return the function of ``package.module:function``, imported from the working directory."""
    module_name, _, name = text.partition(":")
    if not name or not module_name:
        raise RunError(f"--model {text}: write it as package.module:function, like mine:make_model")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise RunError(f"--model {text}: can't be imported from {here}: {first_lines(error)}") from None
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise RunError(f"--model {text}: must be a function that returns the model, got a {type(function).__name__}")
    made: Callable[[], Any] = function
    return made


class _Logits(nn.Module):
    """The logits of a model that returns them within an object, as transformers' models do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits


def _with_logits(model: nn.Module) -> nn.Module:
    return _Logits(model) if hasattr(getattr(model, "config", None), "id2label") else model


def _spec_of(model: nn.Module, about: dict[str, Any], name: str) -> tuple[ModelSpec, bool]:
    """Return the spec of a model and whether its classes are named. Raises RunError for what is not known."""
    known = {**_of_timm(model), **{key: value for key, value in about.items() if key in OF_IMAGES}}
    missing = [key for key in ("image_size", "mean", "std") if key not in known]
    if missing:
        raise RunError(f"{name}: {', '.join(missing)} of its images is not known; give (model, {EXAMPLE})")
    for key in ("mean", "std"):
        known[key] = tuple(map(float, known[key]))
    pre = Preprocessing(**known)
    try:
        with torch.no_grad():
            logits = _with_logits(model)(torch.zeros(1, 3, pre.image_size, pre.image_size))
        number = logits.shape[1] if logits.ndim == 2 else 0
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise RunError(f"{name}: can't take an image of {pre.image_size} px: {first_lines(error)}") from None
    classes: Sequence[str] | None = about.get("class_names")
    if not number or (classes is not None and len(classes) != number):
        wanted = f"(1, {len(classes)})" if classes is not None else "(1, number of classes)"
        raise RunError(f"{name}: gives {tuple(logits.shape)} for an image, not {wanted} logits")
    names = list(map(str, classes if classes is not None else range(number)))
    options: dict[str, Any] = {"multi_label": bool(about.get("multi_label", False)), "preprocessing": pre}
    spec = ModelSpec(f"own:{name.removeprefix('--model ')}", names, pre.image_size, **options)
    return spec, classes is not None


def _of_run(run: Path) -> dict[str, Any]:
    """Return what a recipe's run knows of a model that was passed to it, an empty dict for another run."""
    values = read_json(run / MODEL_FOLDER / SPEC_FILE)
    known = {key: values[key] for key in ("class_names", "multi_label") if key in values}
    return {**(values.get("preprocessing") or {}), **known}


def _of_timm(model: nn.Module) -> dict[str, Any]:
    """Return what a timm model knows of its images, an empty dict for another one."""
    if not getattr(model, "pretrained_cfg", None):
        return {}
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    keys = ("mean", "std", "interpolation", "crop_pct")
    return {"image_size": config["input_size"][-1], **{key: config[key] for key in keys}}
