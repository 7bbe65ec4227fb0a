"""Learning-rate schedules: the factor on lr as a function of the number of updates."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_fasttrain.utils.duration import Duration

Schedule = Callable[[int], float]  # step, counted from 0 -> factor on lr


def constant(step: int) -> float:
    """Return 1: lr is constant."""
    return 1.0


@dataclass(frozen=True)
class Warmup:
    """A linear rise over `warmup_steps`, then `after` (called with the step counted from the start).

    It starts at `start_ratio` and reaches 1 at step `warmup_steps`, like timm's warmup and torch's LinearLR. Without
    `start_ratio` it starts at 1 / `warmup_steps` and reaches 1 one step earlier.
    """

    warmup_steps: int
    after: Schedule
    start_ratio: float | None = None

    def __call__(self, step: int) -> float:
        if step >= self.warmup_steps:
            return self.after(step)
        if self.start_ratio is None:
            return (step + 1) / self.warmup_steps
        return self.start_ratio + (1 - self.start_ratio) * (step / self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 at `start_step` to `min_ratio` at the end (Loshchilov and Hutter, arXiv 1608.03983).

    With `cycles` above 1 it restarts from 1 after cycles of equal length (warm restarts).
    """

    num_steps: int
    start_step: int = 0
    min_ratio: float = 0.0
    cycles: int = 1

    def __call__(self, step: int) -> float:
        after, length = step - self.start_step, max(1, self.num_steps - self.start_step)
        # integers up to the division, so that rounding can't move a restart
        done = after * self.cycles % length / length if after < length else 1.0
        return self.min_ratio + (1 - self.min_ratio) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Polynomial:
    """From 1 at `start_step` to `min_ratio` at the end: (remaining share) ** `power`; linear with power 1."""

    num_steps: int
    start_step: int = 0
    min_ratio: float = 0.0
    power: float = 1.0

    def __call__(self, step: int) -> float:
        left = max(0, self.num_steps - step) / max(1, self.num_steps - self.start_step)
        return self.min_ratio + (1 - self.min_ratio) * min(left, 1.0) ** self.power


@dataclass(frozen=True)
class OneCycle:
    """Cosine rise from 1 / `div` to 1, cosine fall to 1 / `div` / `final_div`: torch's OneCycleLR (arXiv 1708.07120).

    With `rise_steps` 0 it starts at 1.
    """

    num_steps: int
    rise_steps: int
    div: float = 25.0
    final_div: float = 1e4

    def __call__(self, step: int) -> float:
        low, lowest = 1 / self.div, 1 / self.div / self.final_div
        peak = max(1, self.rise_steps) - 1  # torch's OneCycleLR has its peak one step before rise_steps
        if step < peak:
            return _cosine_between(low, 1.0, step / peak)
        return _cosine_between(1.0, lowest, min(1.0, (step - peak) / max(1, self.num_steps - 1 - peak)))


@dataclass(frozen=True)
class Exponential:
    """gamma ** (step / every_steps): a smooth fall."""

    gamma: float
    every_steps: int

    def __call__(self, step: int) -> float:
        return self.gamma ** (step / self.every_steps)


@dataclass(frozen=True)
class Staircase:
    """gamma ** floor(step / every_steps): falls at once, then stays."""

    gamma: float
    every_steps: int

    def __call__(self, step: int) -> float:
        return self.gamma ** (step // self.every_steps)


@dataclass(frozen=True)
class MultiStep:
    """gamma to the power of how many `milestones` (steps, ascending) are reached: torch's MultiStepLR."""

    gamma: float
    milestones: Sequence[int]

    def __call__(self, step: int) -> float:
        return self.gamma ** bisect_right(self.milestones, step)


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class WarmupSteps:
    """The length of a warmup, the reason for it, and a note for the user."""

    steps: int
    reason: str
    note: str | None = None


def default_warmup_steps(name: str, num_steps: int) -> int:
    """Return the default warmup of a schedule: 30 % for onecycle (as torch's pct_start), none for others."""
    return round(0.3 * num_steps) if name == "onecycle" else 0


def resolve_warmup(
    warmup: Literal["auto"] | Duration, name: str, *, num_steps: int, steps_per_epoch: int
) -> WarmupSteps:
    """Return the warmup steps of a schedule; a warmup as long as the training is cut to 10 % of it."""
    if warmup == "auto":
        reason = "30% of the training" if name == "onecycle" else f"{name} has none by default"
        return WarmupSteps(default_warmup_steps(name, num_steps), reason)
    steps = warmup.to_steps(steps_per_epoch, num_steps)
    if steps < num_steps:
        return WarmupSteps(steps, f"{warmup} of {num_steps:,} steps" if warmup.unit == "percent" else "")
    cut = num_steps // 10
    text = f"10% of it, {cut:,} step{'s' * (cut != 1)}" if cut else "none, as 10% of it is less than a step"
    return WarmupSteps(
        cut,
        f"{warmup} does not fit into {num_steps:,} steps, cut to {'10%' if cut else 'none'}",
        f"schedule.warmup={warmup} is {steps:,} step{'s' * (steps != 1)}, not shorter than the training of "
        f"{num_steps:,}: cut to {text}; to choose another: schedule.warmup=5%, or 0",
    )


def build_schedule(
    name: str,
    *,
    num_steps: int,
    warmup_steps: int | None = None,
    start_ratio: float | None = None,
    min_lr_ratio: float = 0.0,
    gamma: float = 0.1,
    every_steps: int = 1,
    milestones: Sequence[int] = (),
    power: float = 1.0,
    cycles: int = 1,
    div: float = 25.0,
    final_div: float = 1e4,
) -> Schedule:
    """Return the schedule of a name: cosine, linear, polynomial, onecycle, exponential, step, multistep or constant.

    `warmup_steps`: 0 for none; None for the schedule's default. `start_ratio`: first factor of the warmup, by default
    1 / warmup_steps, and 0 for linear and polynomial, as in transformers. `milestones`: steps, for multistep.
    """
    if warmup_steps is None:
        warmup_steps = default_warmup_steps(name, num_steps)
    if name == "onecycle":
        return OneCycle(num_steps, warmup_steps, div, final_div)
    after: dict[str, Schedule] = {
        "cosine": Cosine(num_steps, warmup_steps, min_lr_ratio, cycles),
        "linear": Polynomial(num_steps, warmup_steps, min_lr_ratio),
        "polynomial": Polynomial(num_steps, warmup_steps, min_lr_ratio, power),
        "exponential": Exponential(gamma, every_steps),
        "step": Staircase(gamma, every_steps),
        "multistep": MultiStep(gamma, sorted(milestones)),
        "constant": constant,
    }
    if start_ratio is None and name in ("linear", "polynomial"):
        start_ratio = 0.0
    return Warmup(warmup_steps, after[name], start_ratio) if warmup_steps else after[name]
