"""Callbacks: your own code during training, without a subclass or a custom loop.

    python examples/callbacks.py [section.key=value ...]

Three callbacks on the quickstart: one cycles Adam's beta1 against the lr, one records the largest gradient norm across
resumes, and one writes each evaluation to a CSV file. The first changes training, so `resume=True` needs it again. The
others only observe.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fasttrain import Callback, Result, Trainer

if TYPE_CHECKING:
    from hf_fasttrain.train.callbacks import StepReport
    from hf_fasttrain.train.step_loss import At


class CycleMomentum(Callback):
    """Decreases Adam's beta1 from `high` to `low` in the first 30 % of the steps, then increases it again."""

    def __init__(self, high: float = 0.95, low: float = 0.85) -> None:
        self.high, self.low = high, low

    def before_step(self, trainer: Trainer, at: At) -> None:
        done = at.step / at.num_steps  # a function of the step: no state to save
        share = done / 0.3 if done < 0.3 else (1 - done) / 0.7
        for group in trainer.optimizer.param_groups:
            group["betas"] = (self.high - share * (self.high - self.low), group["betas"][1])


class LargestGradient(Callback):
    """Records the largest gradient norm, also in checkpoints."""

    takes_part = False  # it only observes: the run can be resumed without it

    def __init__(self, every: int = 10) -> None:
        self.every, self.norm, self.step = every, 0.0, 0

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if report.step % self.every or report.grad_norm is None:
            return  # reading a tensor makes training wait for the device
        norm = float(report.grad_norm)
        if norm > self.norm:
            self.norm, self.step = norm, report.step

    def finished(self, trainer: Trainer, result: Result) -> None:
        if trainer.accelerator.is_main_process:  # callbacks are called on every process
            print(f"largest gradient norm {self.norm:.2f} at step {self.step}")

    def state_dict(self) -> dict[str, Any]:
        return {"norm": self.norm, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norm, self.step = state["norm"], state["step"]


class EvaluationTable(Callback):
    """Appends each evaluation to a CSV file."""

    takes_part = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if not trainer.accelerator.is_main_process:
            return
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["step", *metrics])
            if is_new:
                writer.writeheader()
            writer.writerow({"step": trainer.state.step, **metrics})


def main(overrides: Sequence[str]) -> Result:
    """Train the quickstart with all three callbacks."""
    callbacks = [CycleMomentum(), LargestGradient(), EvaluationTable(Path("evaluations.csv"))]
    return Trainer.from_recipe("quickstart", overrides, callbacks=callbacks).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
