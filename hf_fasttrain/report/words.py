"""Figures as people read them."""

from __future__ import annotations

import json
from typing import Any

from hf_fasttrain.utils.format import format_count, format_number, is_finite


def metric(name: str, value: Any) -> str:
    """Return a metric's value: shares of images in per cent, all else as a number."""
    if is_finite(value) and "accuracy" in name and 0 <= value <= 1:
        return f"{value:.2%}"
    return f"{value:.4f}" if is_finite(value) and abs(value) < 100 else format_number(value)


def metric_title(name: str) -> str:
    """Return a metric's name as words."""
    return {"f1_macro": "macro F1", "top5_accuracy": "top-5 accuracy"}.get(name, name.replace("_", " "))


def early_stop(told: Any) -> str | None:
    """Return how early stopping ended a run, of result.json's `early_stopping`; None if it tells nothing."""
    numbers = ("value", "step", "waited", "patience", "stopped_at", "num_steps")
    if not isinstance(told, dict) or not all(is_finite(told.get(name)) for name in numbers):
        return None
    watched, better = str(told.get("metric")), "below" if told.get("mode") == "min" else "above"
    return (
        f"after step {told['stopped_at']:,} of {told['num_steps']:,}, since {metric_title(watched)} had not been "
        f"{better} {metric(watched, told['value'])} (step {told['step']:,}) for "
        f"{format_count(told['waited'], 'step')}; early_stopping.patience was {told['patience']:,}"
    )


def setting(value: Any) -> str:
    """Return a recipe's value as it would be written in one line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
