"""The time to a target accuracy on CIFAR-10 of the study's ResNet-50, trained from a recipe."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from hf_fasttrain import Callback, Trainer
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


class Race(Callback):
    """Records the accuracy of each evaluation with the training seconds so far, and stops at the goal."""

    def __init__(self, goal: float, evaluations: list[dict[str, Any]]) -> None:
        self.goal, self.evaluations = goal, evaluations
        self.reached: dict[str, Any] | None = None  # the evaluation that reached the goal

    def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Record an evaluation; the training clock is stopped meanwhile."""
        seconds = trainer.throughput.train_seconds
        seen = {"step": trainer.state.step, "train_seconds": seconds, "accuracy": metrics["accuracy"]}
        self.evaluations.append(seen)
        if metrics["accuracy"] >= self.goal and self.reached is None:
            self.reached = seen


class RaceTrainer(Trainer):
    """A trainer that saves nothing."""

    def save(self) -> None:
        """Save nothing."""


def race(folder: Path | str, overrides: list[str], goal: float, most_seconds: float, row: dict[str, Any]) -> None:
    """Add the training seconds until `goal` to a row, or the accuracy reached in `most_seconds`.

    `folder`: the dataset; `most_seconds` include building the trainer and evaluating.
    """
    deadline = time.monotonic() + most_seconds  # building counts
    row |= {"goal": goal, "seconds_to_goal": None, "evaluations": [], "most_seconds": most_seconds}
    row["overrides"] = [*CIFAR10_OVERRIDES, *overrides]
    runner = Race(goal, row["evaluations"])
    with tempfile.TemporaryDirectory() as scratch:
        settings = [f"data.dataset={folder}", *row["overrides"], f"output_dir={scratch}/run"]
        trainer = RaceTrainer.from_recipe(CIFAR10_RECIPE, settings, callbacks=[runner])
        try:
            is_late = run_until(trainer, runner, deadline)
        finally:  # whatever ends it
            row |= facts_of(trainer, runner)
    if runner.reached is None:
        row["status"] = f"{goal:.0%} not reached: {'out of time' if is_late else 'training ended'}"


def run_until(trainer: Trainer, runner: Race, deadline: float) -> bool:
    """Train until the goal is reached or training ends; return whether the time (of time.monotonic) was up before."""
    if time.monotonic() > deadline:
        return True
    with trainer.running():
        for step in trainer.iterate():
            if runner.reached is not None or step.step == trainer.num_steps:
                return False
            if time.monotonic() > deadline:
                return True
    return False


def facts_of(trainer: Trainer, runner: Race) -> dict[str, Any]:
    """Return how far the race has come."""
    pace, seconds = trainer.throughput, max(trainer.throughput.train_seconds, 1e-9)
    reached, last = runner.reached, runner.evaluations[-1] if runner.evaluations else None
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
