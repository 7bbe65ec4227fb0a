"""Lowers the learning rate when a metric has stopped improving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.callbacks import Callback
from hf_fasttrain.utils.errors import RunError

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer


class ReduceLROnPlateau(Callback):
    """Multiplies `trainer.lr` by `factor` when `watch.patience` steps have passed without a better value.

    It looks after each evaluation, and then waits as long again. `trainer.lr` does not fall below `min_lr_ratio` times
    its first value. The schedule's factor is still applied. Raises RunError for a watch without a patience, a factor
    or a ratio that is not between 0 and 1, and a metric that is not evaluated.
    """

    def __init__(self, watch: Watch, factor: float = 0.1, min_lr_ratio: float = 0.0) -> None:
        if not isinstance(watch, Watch) or watch.patience is None:
            raise RunError("ReduceLROnPlateau: give a Watch with a patience in steps, like Watch('loss', patience=500)")
        if not 0 < factor < 1:
            raise RunError(f"ReduceLROnPlateau: factor must be above 0 and below 1, got {factor!r}")
        if not 0 <= min_lr_ratio < 1:
            raise RunError(f"ReduceLROnPlateau: min_lr_ratio must be at least 0 and below 1, got {min_lr_ratio!r}")
        self.watch, self.factor, self.min_lr_ratio = watch, factor, min_lr_ratio
        self.best: float | None = None
        self.since = 0  # step of the best value, or of the last reduction after it
        self.first_lr: float | None = None

    def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Record a better value, or lower `trainer.lr` if the last one is `watch.patience` steps old."""
        name, step = self.watch.metric, trainer.state.step
        if name not in metrics:
            if trainer.evaluation.evaluator.may_be_missing(name):  # in this evaluation
                return
            raise RunError(f"'{name}' is not among the metrics of the evaluation: {', '.join(metrics)}")
        if self.watch.is_better(metrics[name], self.best):
            self.best, self.since = metrics[name], step
        elif step - self.since >= (self.watch.patience or 0):
            self._reduce(trainer)

    def _reduce(self, trainer: Trainer) -> None:
        before, step = trainer.lr, trainer.state.step
        self.first_lr = before if self.first_lr is None else self.first_lr
        trainer.lr = max(before * self.factor, self.first_lr * self.min_lr_ratio)
        if trainer.lr < before:
            trainer.log.print(
                f"step {step:,}: lr {before:.3g} is lowered to {trainer.lr:.3g}, {self.watch.metric} has not improved "
                f"since step {self.since:,}"
            )
        self.since = step

    def state_dict(self) -> dict[str, Any]:
        """Return the watched metric's best value and step, and the first lr."""
        return {"best": self.best, "since": self.since, "first_lr": self.first_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best, self.since, self.first_lr = state["best"], state["since"], state["first_lr"]
