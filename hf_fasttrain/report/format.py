"""Metrics and settings as text, in the report. Durations, sizes and rates: utils/format.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hf_fasttrain.utils.format import format_count, format_number, is_finite

NAMES = {
    "f1_macro": "macro F1", "f1_micro": "micro F1", "top5_accuracy": "top-5 accuracy", "mcc": "MCC", "auroc": "AUROC",
    "cohen_kappa": "Cohen's kappa", "ece": "calibration error (ECE)", "map": "mean average precision",
    "brier": "Brier score", "precision_macro": "macro precision", "recall_macro": "macro recall",
    "f1_macro_tuned": "macro F1, tuned thresholds", "f1_micro_tuned": "micro F1, tuned thresholds",
}  # fmt: skip


def format_metric(name: str, value: Any) -> str:
    """Return a metric's value: accuracies in percent, others as a number."""
    if is_finite(value) and "accuracy" in name and 0 <= value <= 1:
        return f"{value:.2%}"
    return f"{value:.4f}" if is_finite(value) and abs(value) < 100 else format_number(value)


def format_ends(name: str, ends: Sequence[float]) -> str:
    """Return the ends of a metric's interval."""
    return " to ".join(format_metric(name, end) for end in ends)


def metric_title(name: str) -> str:
    """Return a metric's name as words."""
    return NAMES.get(name, name.replace("_", " "))


def describe_early_stop(stop: Any) -> str | None:
    """Return why early stopping ended a run, from result.json's `early_stopping`; None if it did not."""
    numbers = ("value", "step", "waited", "patience", "stopped_at", "num_steps")
    if not isinstance(stop, dict) or not all(is_finite(stop.get(name)) for name in numbers):
        return None
    watched, better = str(stop.get("metric")), "below" if stop.get("mode") == "min" else "above"
    if is_finite(delta := stop.get("min_delta")) and delta > 0:
        better = f"more than {delta:g} {better}"
    return (
        f"after step {stop['stopped_at']:,} of {stop['num_steps']:,}, since {metric_title(watched)} had not been "
        f"{better} {format_metric(watched, stop['value'])} (step {stop['step']:,}) for "
        f"{format_count(stop['waited'], 'step')}; early_stopping.patience was {stop['patience']:,}"
    )


def format_setting(value: Any) -> str:
    """Return a setting's value as one line of text."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
