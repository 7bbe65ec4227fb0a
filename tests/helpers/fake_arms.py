"""Fake arms on a fake clock: the arithmetic of studies without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_fasttrain.study.bench import Arm, ArmFailed
from hf_fasttrain.study.messages import ArmOptions, Ready, Report, Turn

FACTS: dict[str, Any] = {
    "train.batch_size": 32,
    "accelerate.mixed_precision": "no",
    "accelerate.gradient_accumulation_steps": 1,
    "accelerate.channels_last": True,
    "accelerate.compile": False,
    "accelerate.matmul_precision": "high",
    "accelerate.conv_precision": "high",
    "accelerate.cpu_threads": "auto",
    "data.workers": 1,
    "data.cache": "none",
    "data.pin_memory": False,
    "data.decoder": "simplejpeg",
}


def ready(**changes: Any) -> Ready:
    """Return the ready message of a training of 100 epochs of 1,000 images, with some values changed."""
    values: dict[str, Any] = {
        "device": "cpu",
        "settings": dict(FACTS),
        "notes": (),
        "steps": 3200,
        "steps_per_epoch": 32,
        "short_last_step": True,
        "num_images": 1000,
        "period": 31,
        "keeps_pixels": False,
        "has_batch_norm": True,
        "is_jpeg": True,
        "micro_batch_size": 32,
    }
    return Ready(**{**values, **changes})


class Clock:
    """Returns the time that fake arms have spent."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


Speed = Callable[[dict[str, str]], float]  # settings -> seconds per image; may raise ArmFailed


@dataclass
class Fakes:
    """Starts fake arms: `speed` returns the seconds per image, `compiling` those of the first step."""

    speed: Speed
    clock: Clock = field(default_factory=Clock)
    ready: Ready = field(default_factory=ready)
    start_seconds: float = 2.0
    compiling: float = 60.0
    gradient: Callable[[dict[str, str]], np.ndarray] = lambda settings: np.ones(8, np.float32)
    losses: Callable[[dict[str, str]], float] = lambda settings: 2.0
    started: list[Arm] = field(default_factory=list)
    alive: int = 0
    before_turn: Callable[[Arm], None] = lambda arm: None

    def __call__(self, arm: Arm, options: ArmOptions, limit_seconds: float | None = None) -> FakeArm:
        self.started.append(arm)
        self.clock.now += self.start_seconds
        settings = dict(override.partition("=")[::2] for override in arm.overrides)
        self.speed(settings)  # may fail
        self.alive += 1
        return FakeArm(self, arm, settings, options)


@dataclass
class FakeArm:
    """A training that takes the time returned by `Fakes.speed`."""

    fakes: Fakes
    arm: Arm
    settings: dict[str, str]
    options: ArmOptions
    steps: int = 0

    @property
    def ready(self) -> Ready:
        compiled = self.settings.get("accelerate.compile") == "true"
        return replace(self.fakes.ready, settings={**self.fakes.ready.settings, "accelerate.compile": compiled})

    def turn(self, turn: Turn, limit_seconds: float | None = None) -> Report:
        self.fakes.before_turn(self.arm)
        step = self.fakes.speed(self.settings) * 32
        number = max(turn.min_steps, int(turn.seconds / step))
        seconds = [step] * number
        if self.steps == 0 and self.settings.get("accelerate.compile") == "true":
            seconds[0] += self.fakes.compiling
        self.steps += number
        if limit_seconds is not None and sum(seconds) > limit_seconds:
            self.fakes.clock.now += limit_seconds
            raise ArmFailed(f"not done after {limit_seconds:.0f} s, which is all the time it had")
        self.fakes.clock.now += sum(seconds)
        if self.options.gradient_to is not None:
            np.save(self.options.gradient_to, self.fakes.gradient(self.settings))
        losses = (self.fakes.losses(self.settings),) * number
        return Report(sum(seconds), 32 * number, tuple(seconds), 0.0, losses, 10, 20)

    def close(self) -> None:
        self.fakes.alive -= 1
