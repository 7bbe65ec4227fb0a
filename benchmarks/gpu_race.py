"""The race to a goal on CIFAR-10: the study's ResNet-50, trained from a recipe until enough test images are right."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.utils.environment import peak_memory_bytes

GOAL = 0.92  # of the test images
CIFAR10_RECIPE = Path(__file__).parent.parent / "recipes/study/resnet50_cifar10.yaml"
# The study's 30 epochs of Adam do not fit beside the other rows; SGD's one-cycle gets there in half of them.
CIFAR10_OVERRIDES = (
    "data.eval_split=test",
    "data.test_split=null",
    "train.duration=15 epochs",
    "accelerate.gradient_accumulation_steps=1",
    "optimizer.name=sgd",
    "optimizer.lr=0.1",
    "optimizer.weight_decay=5e-4",
    "evaluate.every=1 epoch",
    "evaluate.batch_size=1000",
)


class RaceOver(Exception):
    """The goal is reached, or the time is up."""


class RaceTrainer(Trainer):
    """Trains until `goal` is reached or the time is up, and keeps nothing; its clock stands while it evaluates."""

    goal = GOAL
    deadline = float("inf")  # of time.monotonic
    evaluations: list[dict[str, Any]]
    reached: dict[str, Any] | None = None  # the evaluation that reached the goal
    is_late = False

    def train_step(self, step: Step) -> Tensor:
        """Make a step, unless the time is up."""
        if time.monotonic() > self.deadline:
            self.is_late = True
            raise RaceOver
        return super().train_step(step)

    def evaluate(self, loader: Any = None) -> dict[str, float]:
        """Note the accuracy and the seconds of training that it took; the race is over when it is the goal."""
        metrics = super().evaluate(loader)
        if not metrics:  # a signal has broken it off
            return metrics
        seen = {"step": self.state.step, "train_seconds": self.pace.train_seconds, "accuracy": metrics["accuracy"]}
        self.evaluations.append(seen)
        if metrics["accuracy"] >= self.goal:
            self.reached = seen
            raise RaceOver
        return metrics

    def save(self) -> None:
        """Save nothing."""


def race(folder: Path | str, overrides: list[str], goal: float, most_seconds: float, row: dict[str, Any]) -> None:
    """Add the seconds of training until `goal` to a row, or what accuracy was got in `most_seconds`.

    `folder`: the data set; `most_seconds` count building the trainer and evaluating too.
    """
    deadline = time.monotonic() + most_seconds  # building counts
    row |= {"goal": goal, "seconds_to_goal": None, "evaluations": [], "most_seconds": most_seconds}
    row["overrides"] = [*CIFAR10_OVERRIDES, *overrides]
    with tempfile.TemporaryDirectory() as place:
        asked = [f"data.dataset={folder}", *row["overrides"], f"output_dir={place}/run"]
        trainer = RaceTrainer.from_recipe(CIFAR10_RECIPE, asked)
        assert isinstance(trainer, RaceTrainer)
        trainer.goal, trainer.deadline, trainer.evaluations = goal, deadline, row["evaluations"]
        try:
            with suppress(RaceOver):
                trainer.fit()
        finally:  # whatever ends it
            row |= facts_of(trainer)
    if trainer.reached is None:
        row["status"] = f"{goal:.0%} not reached: {'the time was up' if trainer.is_late else 'trained to the end'}"


def facts_of(trainer: RaceTrainer) -> dict[str, Any]:
    """Return how far the race has come."""
    pace, seconds = trainer.pace, max(trainer.pace.train_seconds, 1e-9)
    reached, last = trainer.reached, trainer.evaluations[-1] if trainer.evaluations else None
    return {
        "seconds_to_goal": reached["train_seconds"] if reached else None,
        "accuracy": last["accuracy"] if last else None,
        "steps": trainer.state.step,
        "of_steps": trainer.num_steps,
        "train_seconds": pace.train_seconds,
        "images_per_second": pace.images / seconds,
        "data_wait_fraction": min(1.0, pace.wait_seconds / seconds),
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
    }
