"""The log lines of training between evaluations, and the check that stops a run with NaN or inf."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_fasttrain.train.loss import first_loss_note
from hf_fasttrain.utils.environment import peak_memory_bytes
from hf_fasttrain.utils.errors import RunError, shortened

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer


class Progress:
    """Logs loss, lr, speed and the time left; waits for the device."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._knows_first_loss = False

    def log_remaining(self) -> None:
        """Log the steps since the last log line, if there are any, as after a `break`."""
        if self.trainer.throughput.has_steps:
            self.log_training()

    def log_training(self) -> None:
        """Log the steps since the last log line. Raises RunError if a loss or gradient norm is NaN or inf."""
        trainer = self.trainer
        reduce_sum, throughput = trainer.processes.reduce_sum, trainer.throughput
        first_loss = None if self._knows_first_loss else throughput.first_loss(reduce_sum)
        user_values = throughput.means(trainer.processes.gather) if trainer.step.returns_values else {}
        values = throughput.lap(reduce_sum)
        if not math.isfinite(values["loss"]):
            raise self._not_finite_error()
        if first_loss is not None:
            self._compare_with_uniform(max(first_loss, values["loss"]))
        steps_left = trainer.num_steps - trainer.state.step
        pace = throughput.recent_seconds_per_step
        evaluation_seconds = math.ceil(steps_left / trainer.evaluate_every) * trainer.evaluation.seconds
        line = {
            **values,
            "epoch": trainer.state.step / trainer.train_loader.steps_per_epoch,
            "lr": trainer.state.lr,
            "eta_seconds": steps_left * pace + evaluation_seconds,
            "peak_memory_bytes": peak_memory_bytes(trainer.device),
        }
        if reserved := sorted(user_values.keys() & (line.keys() | {"kind", "step"})):
            raise RunError(f"step_loss returned values named {', '.join(reserved)}, which the log uses; rename them")
        trainer.log.train_line(trainer.state.step, trainer.num_steps, {**line, **user_values}, pace)

    def _compare_with_uniform(self, first: float) -> None:
        """Add a note if the first loss of a run is far above that of uniform logits."""
        self._knows_first_loss, uniform = True, self.trainer.step.uniform_loss
        note = first_loss_note(first, float(uniform)) if uniform is not None else None
        if note and not self.trainer.state.resumed_at:
            self.trainer.log.note(note)

    def _not_finite_error(self) -> RunError:
        """Return the error for the step with NaN or inf, with its lr and images."""
        trainer = self.trainer
        not_finite = trainer.throughput.first_not_finite(trainer.processes.reduce_sum)
        steps_ago = not_finite.steps_ago if not_finite else 0
        step = trainer.state.step - steps_ago
        lr = trainer.lr * trainer.schedule(max(0, trainer.state.updates - 1 - steps_ago))
        images = trainer.train_loader.image_indices(step - 1)
        image_text = "" if images is None else f"\ntraining images of this step, by row: {shortened(images, 64)}"
        remedy = "lower optimizer.lr, set optimizer.clip_norm or use another accelerate.mixed_precision"
        if not trainer.recipe_text:
            remedy = "check the loss (a division by 0, a logarithm of 0), lower the lr, or set clip_norm"
        return RunError(
            f"{not_finite or 'the loss is nan'} at step {step}, lr {lr:.3g}: {remedy}; the checkpoints have not changed"
            f"{image_text}"
        )
