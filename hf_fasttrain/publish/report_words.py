"""Figures as people read them."""

from __future__ import annotations

import json
from typing import Any

from hf_fasttrain.publish.report_data import is_finite

NOTHING = "–"


def number(value: Any, digits: int = 4) -> str:
    """Return a number with so many significant digits, thousands separated."""
    if not is_finite(value):
        return NOTHING if value is None else str(value)
    if float(value).is_integer() or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:,.{digits}g}"


def metric(name: str, value: Any) -> str:
    """Return a metric's value: shares of images in per cent, all else as a number."""
    if is_finite(value) and "accuracy" in name and 0 <= value <= 1:
        return f"{value:.2%}"
    return f"{value:.4f}" if is_finite(value) and abs(value) < 100 else number(value)


def metric_title(name: str) -> str:
    """Return a metric's name as words."""
    return {"f1_macro": "macro F1", "top5_accuracy": "top-5 accuracy"}.get(name, name.replace("_", " "))


def percent(value: Any) -> str:
    """Return a share in per cent."""
    if not is_finite(value):
        return NOTHING
    if value in (0, 1):
        return f"{value:.0%}"
    return f"{value:.1%}" if value < 0.9995 else f"{min(value, 0.9999):.2%}" if value < 1 else f"{value:.0%}"


def early_stop(told: Any) -> str | None:
    """Return how early stopping ended a run, of result.json's `early_stopping`; None if it tells nothing."""
    numbers = ("value", "step", "waited", "patience", "stopped_at", "num_steps")
    if not isinstance(told, dict) or not all(is_finite(told.get(name)) for name in numbers):
        return None
    watched, better = str(told.get("metric")), "below" if told.get("mode") == "min" else "above"
    return (
        f"after step {told['stopped_at']:,} of {told['num_steps']:,}, since {metric_title(watched)} had not been "
        f"{better} {metric(watched, told['value'])} (step {told['step']:,}) for {count(told['waited'], 'step')}; "
        f"early_stopping.patience was {told['patience']:,}"
    )


def seconds(value: Any) -> str:
    """Return a time as people say it."""
    if not is_finite(value):
        return NOTHING
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(value: Any) -> str:
    """Return a number of bytes."""
    if not is_finite(value):
        return NOTHING
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def setting(value: Any) -> str:
    """Return a recipe's value as it would be written in one line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def count(number_of: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun."""
    return f"{number_of:,} {one if number_of == 1 else many or one + 's'}"
