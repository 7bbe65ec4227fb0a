"""Checks of the Trainer's arguments, made before anything is built: RULES has one rule per parameter."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset

from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.duration import Duration, MissingUnit
from hf_fasttrain.utils.errors import RunError, shown

Parameters = ParamSpec("Parameters")
ReturnType = TypeVar("ReturnType")
Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and a description of allowed values


def check_arguments(function: Callable[Parameters, ReturnType]) -> Callable[Parameters, ReturnType]:
    """Decorate a function to check its arguments by the rules of their names. Raises RunError."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> ReturnType:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        require_allowed(bound.arguments)
        return function(*args, **kwargs)

    return call


def require_allowed(arguments: Mapping[str, Any]) -> None:
    """Raise RunError, with all mistakes in one message, for arguments that RULES or COMBINATIONS do not allow."""
    errors = [
        f"{name}: must be {allowed}, got {_describe(arguments[name])}"
        for name, (is_allowed, allowed) in RULES.items()
        if name in arguments and not is_allowed(arguments[name])
    ]
    errors = errors or [text for is_wrong, text in COMBINATIONS if is_wrong(arguments)]
    if errors:
        raise RunError("\n".join(errors))


def parse_duration(name: str, value: Duration | str, *, minutes: bool = False) -> Duration:
    """Return the duration of a parameter. Raises RunError that names the parameter."""
    try:
        duration = Duration.parse(value, minutes=minutes)
    except MissingUnit as error:
        raise RunError(f"{name}: got {_describe(value)}; {error}") from None
    except ValueError as error:
        raise RunError(f"{name}: {error}, got {_describe(value)}") from None
    if not duration.count > 0:
        raise RunError(f"{name}: must be more than 0, got {_describe(value)}")
    if duration.unit not in ("epochs", "steps", "minutes" if minutes else "steps"):
        raise RunError(f"{name}: must be in epochs or steps{' or minutes' * minutes}, got '{duration}'")
    return duration


def _describe(value: Any) -> str:
    """Return the text of a plain value, and the type of any other."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    is_plain = value is None or isinstance(value, bool | int | float | str | os.PathLike | Duration)
    if is_plain or (isinstance(value, list | tuple | dict) and len(value) < 3):
        return shown(value)
    return f"a {type(value).__qualname__}"


def is_integer(value: Any, minimum: int) -> bool:
    """Return whether a value is an integer, not a bool, of at least `minimum`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _accepts_arguments(value: Any, number: int) -> bool:
    """Return whether a function or module accepts a number of arguments, judging by its signature."""
    if not _is_function(value):
        return False
    try:
        signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
    except ValueError:  # the function has no signature
        return True
    try:
        signature.bind(*range(number))
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class _Optional:
    """A rule that also allows None."""

    rule: Callable[[Any], bool]

    def __call__(self, value: Any) -> bool:
        return value is None or self.rule(value)


def _is_data_set(value: Any) -> bool:
    """Return whether a value yields single images, not batches."""
    is_torch_dataset = isinstance(value, Dataset) and not isinstance(value, IterableDataset)
    return is_torch_dataset or type(value).__module__.partition(".")[0] == "datasets"


def _yields_batches(value: Any) -> bool:
    is_text = isinstance(value, str | bytes | Mapping)
    is_iterable = isinstance(value, Iterable) or hasattr(value, "__getitem__") or hasattr(value, "steps")
    return is_iterable and not is_text and not _is_data_set(value) and not isinstance(value, type)


def _has_batches(value: Any) -> bool:
    """Return whether a value yields batches, and at least one if it has a length."""
    if not _yields_batches(value):
        return False
    try:
        return len(value) > 0
    except TypeError:
        return True


def _returns_factor(schedule: Any) -> bool:
    """Return whether a schedule returns a number for the first update."""
    if not _is_function(schedule):
        return False
    try:
        factor = float(schedule(0))
    except TypeError:  # it takes other arguments, or does not return a number
        return False
    return math.isfinite(factor)


def _has_learning_rates(optimizer: Any) -> bool:
    return isinstance(optimizer, Optimizer) and all(float(group["lr"]) > 0 for group in optimizer.param_groups)


def _is_list(callbacks: Any) -> bool:
    return isinstance(callbacks, Sequence) and not isinstance(callbacks, str)


def _are_functions(metrics: Any) -> bool:
    return isinstance(metrics, Mapping) and all(map(callable, metrics.values()))


POSITIVE_INTEGER = "a whole number of at least 1"
RULES: dict[str, Rule] = {
    "model": (lambda value: isinstance(value, nn.Module), "a torch.nn.Module"),
    "train_loader": (
        _yields_batches,
        "a loader that yields batches, such as DataLoader(dataset, batch_size=64, shuffle=True), or a list of batches",
    ),
    "optimizer": (
        _has_learning_rates,
        "a torch.optim.Optimizer with an lr above 0 in each group (to freeze parameters: requires_grad_(False))",
    ),
    "accelerator": (_Optional(lambda value: isinstance(value, Accelerator)), "an accelerate.Accelerator or None"),
    "accumulation_steps": (
        lambda value: is_integer(value, 1),
        f"{POSITIVE_INTEGER}, the number of micro-batches per batch",
    ),
    "loss": (_is_function, "a function or module that maps (logits, targets) to their mean loss"),
    "step_loss": (
        _Optional(lambda value: _accepts_arguments(value, 4)),
        "a function or module that maps (model, images, targets, at) to their mean loss, or None",
    ),
    "schedule": (
        _returns_factor,
        "a function of the update's number, counted from 0, that returns a factor on the optimizer's lr, like "
        "hf_fasttrain.build_schedule('cosine', num_steps=1000) or lambda update: 0.1 ** (update // 500)",
    ),
    "clip_norm": (_Optional(_is_positive), "a number above 0, the largest norm of all gradients together, or None"),
    "ema": (_Optional(lambda value: isinstance(value, Ema)), "Ema(model, decay=0.99) or None"),
    "eval_loader": (
        _Optional(_has_batches),
        "a loader with at least one batch, such as DataLoader(dataset, batch_size=256), or None",
    ),
    "num_classes": (
        _Optional(lambda value: is_integer(value, 2)),
        "a whole number of at least 2, the number of the model's outputs, or None",
    ),
    "metrics": (
        _Optional(_are_functions),
        "a dict of functions of all logits (N, K) and labels that return a number, like {'mAP': my_average_precision}",
    ),
    "predict": (_Optional(_is_function), "a function (model, images) -> logits (B, K), or None"),
    "best": (lambda value: isinstance(value, Watch), "a Watch, like Watch('loss')"),
    "early_stopping": (
        _Optional(lambda value: isinstance(value, Watch) and value.patience is not None),
        "a Watch with a patience in steps, like Watch('loss', patience=500), or None",
    ),
    "output_dir": (_Optional(lambda value: isinstance(value, str | os.PathLike)), "a path or None"),
    "report": (lambda value: isinstance(value, bool), "True or False"),
    "callbacks": (_Optional(_is_list), "a list of callbacks: callbacks=[...]"),
    "log": (_Optional(lambda value: isinstance(value, RunLog)), "a RunLog or None"),
    "log_every": (lambda value: is_integer(value, 1), f"{POSITIVE_INTEGER}, in steps"),
    "seed": (_Optional(lambda value: is_integer(value, 0)), "a whole number of at least 0, or None"),
    "overrides": (_is_list, 'a list of strings: overrides=["optimizer.lr=1e-4"]'),
}
# Rules on two parameters together.
COMBINATIONS: list[tuple[Callable[[Mapping[str, Any]], bool], str]] = [
    (
        lambda arguments: arguments.get("step_loss") is not None and arguments.get("loss") is not F.cross_entropy,
        "loss: has no effect with step_loss, which returns the loss itself; leave one of them out",
    ),
    (
        lambda arguments: arguments.get("early_stopping") is not None and arguments.get("eval_loader") is None,
        "early_stopping: watches the evaluations, and there are none; pass an eval_loader too",
    ),
]
