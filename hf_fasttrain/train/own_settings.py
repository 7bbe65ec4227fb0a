"""What decides the result of a run of own objects, by value or by name: another one is refused when it is restored."""

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

# Options of a group that only decide how fast it is updated, and what this package puts there.
NOT_OF_RESULT = {"params", "param_names", "lr_scale", "initial_lr", "fused", "foreach", "capturable", "differentiable"}
MAY_CHANGE = (
    "duration, evaluate_every, checkpoint_every, accumulation_steps, early_stopping and the number of processes "
    "may change"
)


def own_settings(
    trainer: Trainer, optimizer: torch.optim.Optimizer, loss: Callable[..., Any], clip_norm: float | None
) -> dict[str, Any]:
    """Return name -> plain value of what a user's objects make of a run; before the first step.

    How many images a step has is known if the user's loader has a `batch_size`.
    """
    ema, loader = trainer.ema, trainer.train_loader
    settings: dict[str, Any] = {"optimizer": name_of(type(optimizer)), "loss": name_of(loss)}
    settings |= {"schedule": name_of(trainer.schedule), "clip_norm": plain(clip_norm)}
    for option in sorted({key for group in optimizer.param_groups for key in group} - NOT_OF_RESULT):
        values = [plain(group.get(option)) for group in optimizer.param_groups]
        settings[f"optimizer.{option}"] = values[0] if all(value == values[0] for value in values) else values
    if isinstance(loss, nn.Module):  # what it was made with; a counter, say, changes while it trains
        made_with = inspect.signature(type(loss)).parameters
        numbers_of_loss = {key: value for key, value in vars(loss).items() if key in made_with and _is_number(value)}
        settings |= {f"loss.{key}": value for key, value in numbers_of_loss.items()}
    settings |= {"ema.decay": ema.decay, "ema.warmup": ema.warmup} if ema is not None else {}
    size = getattr(getattr(loader, "loader", None), "batch_size", None)
    settings |= {"images per step": size * trainer.processes.number} if isinstance(size, int) else {}
    return settings | {"steps per epoch": loader.steps_per_epoch}


def comparable(saved: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both settings without what only one of them can know.

    Those are options of an optimizer that another version of its library does not have, and the size of batches.
    """

    def in_both(key: str) -> bool:
        return (key in saved and key in current) or not key.startswith(("optimizer.", "images per step"))

    one, other = ({key: value for key, value in each.items() if in_both(key)} for each in (saved, current))
    return one, other


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back; the name of anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, numbers.Number) and not isinstance(value, bool | int | float):
        return float(value)  # type: ignore[arg-type]
    return value if value is None or isinstance(value, bool | int | float | str) else name_of(value)


def name_of(value: Any) -> str:
    """Return a function's or class's qualified name, and an object's by its class, with the functions in it."""
    if isinstance(value, functools.partial):
        return name_of(value.func)
    if hasattr(value, "__qualname__"):
        return f"{module_name(value)}.{value.__qualname__}"
    inner = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else []
    named = ", ".join(name_of(each).rpartition(".")[2] for each in inner if callable(each))
    return name_of(type(value)) + (f"({named})" if named else "")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
