"""Checks that a lower precision trains like fp32: by the first gradient, and the loss of some steps at full lr."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_fasttrain.study.bench import Arm, Start
from hf_fasttrain.study.messages import ArmOptions, Turn
from hf_fasttrain.utils.format import format_percent

MIN_COSINE = 0.99
MAX_LOSS_DIFFERENCE = 0.05  # of the mean loss over the steps
NUM_STEPS = 20
IMAGES = 16  # per step, or fewer if the recipe's batch is smaller


@dataclass(frozen=True)
class LossCurve:
    """The start of a training: its first gradient (P,), and the loss of each step."""

    gradient: np.ndarray
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """How a precision's loss curve differs from fp32's."""

    cosine: float  # of the first gradients
    loss_difference: float  # of the mean losses, as a share of fp32's

    @property
    def is_good(self) -> bool:
        """Whether the precision may be used; False for NaN."""
        return self.cosine >= MIN_COSINE and self.loss_difference <= MAX_LOSS_DIFFERENCE

    def __str__(self) -> str:
        return (
            f"gradient cosine {self.cosine:.4f} (at least {MIN_COSINE}), loss over {NUM_STEPS} steps at full lr "
            f"{format_percent(self.loss_difference)} from fp32's (at most {format_percent(MAX_LOSS_DIFFERENCE, 0)})"
        )


def loss_curve(start: Start, overrides: tuple[str, ...], images: int, limit_seconds: float | None) -> LossCurve:
    """Train a recipe for NUM_STEPS steps of `images` images; ArmFailed if that fails.

    With constant full lr, and without dropout and drop-path, whose masks depend on the precision.
    """
    with tempfile.TemporaryDirectory(prefix="hf_fasttrain-guard-") as folder:
        path = Path(folder) / "gradient.npy"
        smaller = (
            f"train.batch_size={images}",
            "accelerate.micro_batch_size=null",
            "augment.repeats=1",
            "schedule.warmup=0",  # the schedule is not used, and its warmup need not fit
        )
        options = ArmOptions(full_lr=True, without_dropout=True, gradient_to=str(path))
        running = start(Arm("guard", (*overrides, *smaller)), options, limit_seconds)
        try:
            report = running.turn(Turn(min_steps=NUM_STEPS, max_steps=NUM_STEPS), limit_seconds)
        finally:
            running.close()
        return LossCurve(np.load(path), report.losses)


def compare(other: LossCurve, fp32: LossCurve) -> Verdict:
    """Return how a loss curve differs from fp32's."""
    a, b = other.gradient.astype(np.float64), fp32.gradient.astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    expected, mean = np.mean(fp32.losses), np.mean(other.losses)
    cosine = float(a @ b) / norms if norms > 0 else math.nan
    return Verdict(cosine, float(abs(mean - expected) / abs(expected)) if expected else math.nan)
