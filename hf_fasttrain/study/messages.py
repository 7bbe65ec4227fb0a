"""What is asked of a training that is run in turns, and what it reports: plain values between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_fasttrain.recipe.load import parse_recipe
from hf_fasttrain.recipe.schema import Recipe

NO_END = 10**12  # steps


@dataclass(frozen=True)
class ArmRequest:
    """A recipe's text and overrides, as another process can read them."""

    text: str
    where: str
    name: str
    overrides: tuple[str, ...] = ()

    def load(self) -> Recipe:
        """Return the checked recipe."""
        return parse_recipe(self.text, self.overrides, where=self.where, name=self.name)


def resolve_arm(recipe: Recipe) -> ArmRequest:
    """Return a recipe as arms are given it."""
    source = recipe.source
    return ArmRequest(source.text, source.name, source.name, source.overrides)


@dataclass(frozen=True)
class Turn:
    """So much of a training: until `seconds` are over, but at least `min_steps` and at most `max_steps`."""

    min_steps: int = 1
    seconds: float = 0.0
    max_steps: int = NO_END
    drain: bool = False  # after the first step, use up what the loader has made ahead, and a first pass over the data


@dataclass(frozen=True)
class Report:
    """What happened in a turn."""

    seconds: float
    images: int
    step_seconds: tuple[float, ...]
    wait_seconds: float
    losses: tuple[float, ...]
    device_bytes: int  # most allocated in this turn on a GPU, most resident in the process so far on a CPU
    host_bytes: int = 0  # most of the process so far, and what its loader processes have of their own
    fill_seconds: float | None = None  # of an image, in a first pass whose pixels were kept
    phases: dict[str, float] = field(default_factory=dict)  # seconds of a watched turn, by phase
    stages: dict[str, float] = field(default_factory=dict)  # worker-seconds of a watched turn, by stage
    stage_images: int = 0  # images that were made meanwhile


@dataclass(frozen=True)
class Ready:
    """A training that is built and has not begun."""

    device: str
    settings: dict[str, Any]  # every resolved value
    notes: tuple[str, ...]
    steps: int  # of the whole duration
    steps_per_epoch: int
    short_last_step: bool  # whether an epoch's last step has fewer images
    num_images: int
    period: int  # steps of a pass
    keeps_pixels: bool
    has_batch_norm: bool
    is_jpeg: bool  # whether any of a sample of the images is
    micro_batch_size: int


@dataclass(frozen=True)
class ArmOptions:
    """How a trial differs from the training itself."""

    full_lr: bool = False  # lr without its schedule
    without_dropout: bool = False
    watched: bool = False  # phases and loader stages are timed
    gradient_to: str | None = None  # file for the first step's gradient
    stored_tuning: bool = False  # `auto` is what a stored tuning says, as in training; else the fixed rules
