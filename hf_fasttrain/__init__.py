"""Train an image classifier as fast as the machine allows, with gradients, resume and numbers to be trusted."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_fasttrain.recipe.load import load_recipe
    from hf_fasttrain.recipe.schema import Recipe
    from hf_fasttrain.run_folder.result import Result, Watch
    from hf_fasttrain.train.callbacks import Callback, CallbackError, StepReport
    from hf_fasttrain.train.ema import Ema
    from hf_fasttrain.train.evaluation import Evaluator
    from hf_fasttrain.train.plateau import ReduceLROnPlateau
    from hf_fasttrain.train.schedule import build_schedule
    from hf_fasttrain.train.trainer import Trainer
    from hf_fasttrain.utils.duration import Duration
    from hf_fasttrain.utils.errors import RunError, Stopped, UserError

__all__ = [
    "Callback",
    "CallbackError",
    "Duration",
    "Ema",
    "Evaluator",
    "Recipe",
    "ReduceLROnPlateau",
    "Result",
    "RunError",
    "StepReport",
    "Stopped",
    "Trainer",
    "UserError",
    "Watch",
    "build_schedule",
    "load_recipe",
]
__version__ = "0.1.0"

_HOMES = {
    "Callback": "train.callbacks",
    "CallbackError": "train.callbacks",
    "Duration": "utils.duration",
    "Ema": "train.ema",
    "Evaluator": "train.evaluation",
    "Recipe": "recipe.schema",
    "ReduceLROnPlateau": "train.plateau",
    "Result": "run_folder.result",
    "RunError": "utils.errors",
    "StepReport": "train.callbacks",
    "Stopped": "utils.errors",
    "Trainer": "train.trainer",
    "UserError": "utils.errors",
    "Watch": "run_folder.result",
    "build_schedule": "train.schedule",
    "load_recipe": "recipe.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import hf_fasttrain` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_fasttrain' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hf_fasttrain.{_HOMES[name]}"), name)
