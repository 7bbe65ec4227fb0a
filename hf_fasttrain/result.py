"""What is watched while training, and how a run ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

BUILT_IN_METRICS = ("loss", "accuracy", "top5_accuracy", "f1_macro")


@dataclass(frozen=True)
class Watch:
    """A metric of the evaluation, whether more or less of it is better, and early stopping's patience in steps."""

    metric: str = "accuracy"
    mode: str = "max"
    patience: int | None = None

    def is_better(self, value: float, than: float | None) -> bool:
        """Return whether `value` is better than an earlier one; nan never is."""
        if than is None:
            return not math.isnan(value)
        return value > than if self.mode == "max" else value < than


@dataclass
class Result:
    """How a run ended; result.json holds the same."""

    metrics: dict[str, float]  # of the last evaluation
    test_metrics: dict[str, float] | None
    best: dict[str, Any] | None  # metric, value, step
    steps: int
    skipped_steps: int  # fp16 overflows
    micro_batch_size: int  # images per process and forward, at the end
    out_of_memory: list[dict[str, Any]]  # steps at which it was made smaller: step, before, after
    resumed_at: list[int]  # steps after which the run was resumed
    not_written: list[str]  # results that the disk did not take, with the reason; empty if all is well
    images: int
    train_seconds: float  # of training steps, without evaluation and saving
    images_per_second: float
    data_wait_fraction: float  # share of train_seconds lost by waiting for data
    bad_images: int  # replaced by others; bad_images.jsonl lists them
    peak_memory_bytes: int
    stopped_early: bool
    machine: dict[str, Any]
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)


def metric_name(metric: str) -> str:
    """Return the name that results have for a metric: of a Hub name or path, its last part."""
    return metric.rstrip("/").split("/")[-1].removesuffix(".py")
