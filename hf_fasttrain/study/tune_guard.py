"""Whether a cheaper arithmetic trains as fp32 does: the first gradient, and the loss of some steps at full lr."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_fasttrain.study.bench import Arm, Start
from hf_fasttrain.study.messages import ArmOptions, Turn
from hf_fasttrain.utils.format import format_percent

LEAST_COSINE = 0.99
MOST_LOSS_DIFFERENCE = 0.05  # of the mean loss over the steps
NUM_STEPS = 20
IMAGES = 16  # of a step, or as many as the recipe's have


@dataclass(frozen=True)
class LossCurve:
    """How a training begins: its first gradient (P,), and the loss of each step."""

    gradient: np.ndarray
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """How a precision's course compares with fp32's."""

    cosine: float  # of the first gradients
    loss_difference: float  # of the mean losses, as a share of fp32's

    @property
    def is_good(self) -> bool:
        """Whether it may be used; nan never may."""
        return self.cosine >= LEAST_COSINE and self.loss_difference <= MOST_LOSS_DIFFERENCE

    def __str__(self) -> str:
        return (
            f"gradient cosine {self.cosine:.4f} (at least {LEAST_COSINE}), loss over {NUM_STEPS} steps at full lr "
            f"{format_percent(self.loss_difference)} from fp32's (at most {format_percent(MOST_LOSS_DIFFERENCE, 0)})"
        )


def course(start: Start, overrides: tuple[str, ...], images: int, limit_seconds: float | None) -> LossCurve:
    """Return how a recipe with these overrides begins to train, with steps of `images`; ArmFailed if it can't.

    At full lr without its schedule, and without dropout and drop-path, whose masks another precision draws otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="hf_fasttrain-guard-") as folder:
        path = Path(folder) / "gradient.npy"
        smaller = (
            f"train.batch_size={images}",
            "accelerate.micro_batch_size=null",
            "augment.repeats=1",
            "schedule.warmup=0",  # the schedule is not used, and its rise need not fit
        )
        options = ArmOptions(full_lr=True, without_dropout=True, gradient_to=str(path))
        running = start(Arm("guard", (*overrides, *smaller)), options, limit_seconds)
        try:
            report = running.turn(Turn(min_steps=NUM_STEPS, max_steps=NUM_STEPS), limit_seconds)
        finally:
            running.close()
        return LossCurve(np.load(path), report.losses)


def compare(other: LossCurve, fp32: LossCurve) -> Verdict:
    """Return how a course differs from fp32's."""
    a, b = other.gradient.astype(np.float64), fp32.gradient.astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    mean, own = np.mean(fp32.losses), np.mean(other.losses)
    cosine = float(a @ b) / norms if norms > 0 else math.nan
    return Verdict(cosine, float(abs(own - mean) / abs(mean)) if mean else math.nan)
