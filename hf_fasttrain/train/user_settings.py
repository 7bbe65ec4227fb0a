"""The settings of a Trainer with user objects that determine the result; `restore` refuses to change them."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_fasttrain.utils.qualified_name import module_name

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer

# Options of a parameter group that only affect speed, and those that this package adds.
IGNORED_OPTIONS = {
    "params",
    "param_names",
    "lr_scale",
    "initial_lr",
    "fused",
    "foreach",
    "capturable",
    "differentiable",
}
MAY_CHANGE = (
    "duration, evaluate_every, checkpoint_every, accumulation_steps, early_stopping and the number of processes "
    "may change"
)


def user_settings(
    trainer: Trainer, optimizer: torch.optim.Optimizer, loss: Callable[..., Any], clip_norm: float | None
) -> dict[str, Any]:
    """Return name -> plain value of the settings in a user's objects; call it before the first step.

    The number of images per step is included if the user's loader has a `batch_size`.
    """
    ema, loader = trainer.ema, trainer.train_loader
    settings: dict[str, Any] = {"optimizer": name_of(type(optimizer)), "loss": name_of(loss)}
    settings |= {"schedule": name_of(trainer.schedule), "clip_norm": plain_value(clip_norm)}
    for option in sorted({key for group in optimizer.param_groups for key in group} - IGNORED_OPTIONS):
        values = [plain_value(group.get(option)) for group in optimizer.param_groups]
        settings[f"optimizer.{option}"] = values[0] if all(value == values[0] for value in values) else values
    if isinstance(loss, nn.Module):  # only constructor arguments: other attributes may change during training
        parameters = inspect.signature(type(loss)).parameters
        loss_numbers = {key: value for key, value in vars(loss).items() if key in parameters and _is_number(value)}
        settings |= {f"loss.{key}": value for key, value in loss_numbers.items()}
    settings |= {"ema.decay": ema.decay, "ema.warmup": ema.warmup} if ema is not None else {}
    size = getattr(getattr(loader, "loader", None), "batch_size", None)
    settings |= {"images per step": size * trainer.processes.number} if isinstance(size, int) else {}
    return settings | {"steps per epoch": loader.steps_per_epoch}


def comparable_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both settings without optimizer options and the batch size if only one of them has these.

    Another version of the optimizer's library may have other options.
    """

    def in_both(key: str) -> bool:
        return (key in saved and key in current) or not key.startswith(("optimizer.", "images per step"))

    left, right = ({key: value for key, value in settings.items() if in_both(key)} for settings in (saved, current))
    return left, right


def plain_value(value: Any) -> Any:
    """Return a value in a form that JSON preserves; the name of any other object."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [plain_value(v) for v in value]
    if isinstance(value, numbers.Number) and not isinstance(value, bool | int | float):
        return float(value)  # type: ignore[arg-type]
    return value if value is None or isinstance(value, bool | int | float | str) else name_of(value)


def name_of(value: Any) -> str:
    """Return the qualified name of a function, a class or an object's class, with the functions in its fields."""
    if isinstance(value, functools.partial):
        return name_of(value.func)
    if hasattr(value, "__qualname__"):
        return f"{module_name(value)}.{value.__qualname__}"
    members = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else []
    names = ", ".join(name_of(v).rpartition(".")[2] for v in members if callable(v))
    return name_of(type(value)) + (f"({names})" if names else "")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
