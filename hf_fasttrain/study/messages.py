"""Messages between a study and its arms: what to train and measure, and what was measured. Plain values only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hf_fasttrain.recipe.load import parse_recipe
from hf_fasttrain.recipe.schema import Recipe

NO_END = 10**12  # steps


@dataclass(frozen=True)
class ArmRequest:
    """A recipe as text and overrides, which another process can load."""

    text: str
    where: str
    name: str
    overrides: tuple[str, ...] = ()

    def load(self) -> Recipe:
        """Return the validated recipe."""
        return parse_recipe(self.text, self.overrides, where=self.where, name=self.name)


def to_arm_request(recipe: Recipe) -> ArmRequest:
    """Return a recipe in the form in which it is sent to arms."""
    source = recipe.source
    return ArmRequest(source.text, source.name, source.name, source.overrides)


@dataclass(frozen=True)
class Turn:
    """A part of a training: `seconds` long, but at least `min_steps` and at most `max_steps`.

    After `enough` seconds it ends with any number of steps.
    """

    min_steps: int = 1
    seconds: float = 0.0
    max_steps: int = NO_END
    enough: float = math.inf
    drain: bool = (
        False  # after the first step, discard prefetched batches, and a first pass over the data if pixels are cached
    )


@dataclass(frozen=True)
class Report:
    """The measurements of a turn."""

    seconds: float
    images: int
    step_seconds: tuple[float, ...]
    wait_seconds: float
    losses: tuple[float, ...]
    device_bytes: int  # peak: allocated in this turn on a GPU, resident in the process so far on a CPU
    host_bytes: int = 0  # peak of the process so far, and what its loader processes don't share
    fill_seconds: float | None = None  # per image, in a first pass that fills the cache
    phases: dict[str, float] = field(default_factory=dict)  # seconds of a profiled turn, by phase
    stages: dict[str, float] = field(default_factory=dict)  # worker-seconds of a profiled turn, by stage
    stage_images: int = 0  # images loaded in this turn


@dataclass(frozen=True)
class Ready:
    """What an arm reports once its training is built."""

    device: str
    settings: dict[str, Any]  # resolved, by dotted key
    notes: tuple[str, ...]
    steps: int  # of the whole training
    steps_per_epoch: int
    short_last_step: bool  # whether an epoch's last step has fewer images
    num_images: int
    period: int  # steps of a pass over the data
    keeps_pixels: bool
    has_batch_norm: bool
    is_jpeg: bool  # whether a sample of the images has any
    micro_batch_size: int


@dataclass(frozen=True)
class ArmOptions:
    """How an arm differs from ordinary training."""

    full_lr: bool = False  # constant lr, without the schedule
    without_dropout: bool = False
    profiled: bool = False  # phases and loader stages are timed
    gradient_to: str | None = None  # file for the first step's gradient
    stored_tuning: bool = False  # resolve `auto` by a stored tuning, as training does; else by the fixed rules
