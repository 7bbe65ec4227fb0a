"""The watched metric of a training, and the result of a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from hf_fasttrain.utils.errors import RunError

MAIN_METRICS = ("loss", "accuracy", "top5_accuracy", "f1_macro")
MORE_METRICS = (
    "f1_micro", "balanced_accuracy", "precision_macro", "recall_macro", "mcc", "cohen_kappa", "ece", "brier",
)  # fmt: skip
SCORE_METRICS = ("auroc", "map")  # of all scores of a split
TUNED_METRICS = ("f1_macro_tuned", "f1_micro_tuned")  # multi-label, at the thresholds of evaluate.thresholds=tuned
BUILT_IN_METRICS = (*MAIN_METRICS, *MORE_METRICS, *SCORE_METRICS)
PER_CLASS = ("precision/", "recall/", "f1/")  # and a class's name
# Directions of well-known metrics: ours and those of the evaluate library.
DIRECTIONS = {
    "loss": "min", "brier_score": "min", "mae": "min", "mape": "min", "mase": "min", "mse": "min", "smape": "min",
    "accuracy": "max", "top5_accuracy": "max", "f1_macro": "max", "f1": "max", "precision": "max", "recall": "max",
    "auroc": "max", "map": "max", "mcc": "max", "ece": "min", "brier": "min",
    "roc_auc": "max", "matthews_correlation": "max", "cohen_kappa": "max", "exact_match": "max", "mean_iou": "max",
}  # fmt: skip
# Words in other names that give the direction; in "error_score", error decides.
LESS_IS_BETTER = {
    "loss", "error", "err", "mse", "rmse", "mae", "mape", "nll", "ece", "entropy", "crossentropy", "perplexity",
    "brier", "distance", "divergence", "cost", "deviation", "hamming",
}  # fmt: skip
MORE_IS_BETTER = {
    "accuracy", "acc", "top1", "top5", "f1", "fbeta", "precision", "recall", "auc", "auroc", "ap", "map", "iou",
    "jaccard", "dice", "kappa", "mcc", "matthews", "correlation", "sensitivity", "specificity", "score",
}  # fmt: skip


def metric_direction(metric: str) -> str | None:
    """Return whether a higher ("max") or lower ("min") value is better, by the metric's name; None if it is unclear."""
    if metric.startswith(PER_CLASS):  # whatever the class is called
        return "max"
    name = metric_name(metric).lower()
    words = set(re.split(r"[^a-z0-9]+", name))
    if name in DIRECTIONS:
        return DIRECTIONS[name]
    return "min" if words & LESS_IS_BETTER else "max" if words & MORE_IS_BETTER else None


def resolve_mode(metric: str, mode: str) -> str:
    """Return max or min for a watched metric's mode, which may be auto.

    Raises ValueError if the name does not say what auto means, and for a mode that would choose the worst value.
    """
    direction = metric_direction(metric)
    known = DIRECTIONS.get(metric_name(metric).lower())
    if mode not in ("auto", "max", "min"):
        raise ValueError(f"is '{mode}'; must be auto, max or min")
    if mode == "auto" and direction is None:
        raise ValueError(
            f"is auto, but the name '{metric}' does not say whether higher or lower is better; set it to max or min"
        )
    if known is not None and mode not in ("auto", known):
        better = "lower" if known == "min" else "higher"
        raise ValueError(f"is {mode}, but {better} {metric} is better; set it to {known} or omit it")
    return str(direction if mode == "auto" else mode)


@dataclass(frozen=True)
class Watch:
    """A metric of the evaluation, whether higher or lower is better, and early stopping's patience in steps.

    A value is better if it exceeds the best one by more than `min_delta`. `mode` is max, min or auto (by the metric's
    name). Raises RunError for a mode that contradicts the metric, for auto if the name does not say it, for a patience
    below 1 and a min_delta below 0.
    """

    metric: str = "accuracy"
    mode: str = "auto"
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        number = self.patience
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise RunError(
                f"Watch('{self.metric}'): patience must be a whole number of at least 1, in steps, got {number!r}"
            )
        if not self.min_delta >= 0:
            raise RunError(f"Watch('{self.metric}'): min_delta must be at least 0, got {self.min_delta!r}")
        try:
            object.__setattr__(self, "mode", resolve_mode(self.metric, self.mode))
        except ValueError as error:
            raise RunError(f"Watch('{self.metric}'): mode {error}") from None

    def is_better(self, value: float, than: float | None) -> bool:
        """Return whether `value` is better than an earlier one (`than`); NaN never is."""
        if than is None:
            return not math.isnan(value)
        return value - than > self.min_delta if self.mode == "max" else than - value > self.min_delta


@dataclass
class Result:
    """The result of a run, as in result.json."""

    metrics: dict[str, float]  # of the weights in RUN/model, on the evaluation split
    test_metrics: dict[str, float] | None  # of the weights in RUN/model
    model: dict[str, Any]  # of RUN/model: weights (best, last or average), step, steps of an average, ema
    best: dict[str, Any] | None  # metric, value, step, metrics, path of its checkpoint in the run folder or None
    last: dict[str, Any]  # step, metrics
    steps: int
    skipped_steps: int  # fp16 overflows
    micro_batch_size: int  # images per process and forward, at the end
    out_of_memory: list[dict[str, Any]]  # steps at which the micro-batch was reduced: step, before, after
    resumed_at: list[int]  # steps after which the run was resumed
    not_written: list[str]  # files that could not be written, with the reason; normally empty
    images: int
    train_seconds: float  # of training steps, without evaluation and saving
    images_per_second: float
    data_wait_fraction: float  # share of train_seconds lost by waiting for data
    bad_images: int  # replaced by other images; listed in bad_images.jsonl
    peak_memory_bytes: int
    stopped_early: bool
    early_stopping: dict[str, Any] | None  # how it stopped: metric, mode, best value and its step, patience, ...
    machine: dict[str, Any]
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)
    own_metrics: list[str] = field(default_factory=list)  # names of metrics that functions of the user's compute
    predict: str | None = None  # name of the user's function that gives the logits, if there is one
    intervals: dict[str, Any] | None = None  # of `metrics`, see `Intervals`; None: no predictions were kept
    test_intervals: dict[str, Any] | None = None  # of `test_metrics`
    probe: dict[str, Any] | None = None  # how the head was fitted before the first step, see `ProbeResult`


def is_built_in(metric: str) -> bool:
    """Return whether a metric is computed by this package."""
    return metric in (*BUILT_IN_METRICS, *TUNED_METRICS) or metric.startswith(PER_CLASS)


def metric_name(metric: str) -> str:
    """Return a metric's name in results: the last part of a Hub name or path."""
    if metric.startswith(PER_CLASS):
        return metric
    return metric.rstrip("/").split("/")[-1].removesuffix(".py")
