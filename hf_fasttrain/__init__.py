"""Train an image classifier as fast as the machine allows, with gradients, resume and numbers to be trusted."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_fasttrain.callbacks import Callback, CallbackError
    from hf_fasttrain.duration import Duration
    from hf_fasttrain.ema import Ema
    from hf_fasttrain.errors import RunError, Stopped, UserError
    from hf_fasttrain.evaluation import Evaluator
    from hf_fasttrain.recipe import Recipe
    from hf_fasttrain.recipe_file import load_recipe
    from hf_fasttrain.result import Result, Watch
    from hf_fasttrain.schedule import build_schedule
    from hf_fasttrain.trainer import Trainer

__all__ = [
    "Callback",
    "CallbackError",
    "Duration",
    "Ema",
    "Evaluator",
    "Recipe",
    "Result",
    "RunError",
    "Stopped",
    "Trainer",
    "UserError",
    "Watch",
    "build_schedule",
    "load_recipe",
]
__version__ = "0.1.0"

_HOMES = {
    "Callback": "callbacks",
    "CallbackError": "callbacks",
    "Duration": "duration",
    "Ema": "ema",
    "Evaluator": "evaluation",
    "Recipe": "recipe",
    "Result": "result",
    "RunError": "errors",
    "Stopped": "errors",
    "Trainer": "trainer",
    "UserError": "errors",
    "Watch": "result",
    "build_schedule": "schedule",
    "load_recipe": "recipe_file",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import hf_fasttrain` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_fasttrain' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hf_fasttrain.{_HOMES[name]}"), name)
