"""What is logged of training between evaluations; a loss or gradient that is NaN or inf stops the run here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_fasttrain.train.loss import first_loss_note
from hf_fasttrain.utils.environment import peak_memory_bytes
from hf_fasttrain.utils.errors import RunError, shortened

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer


class Progress:
    """Logs loss, lr, speed and the time that is left; waits for the device."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._knows_first_loss = False

    def log_rest(self) -> None:
        """Log the steps since the last time, if there are any: after a `break`, which may come between two lines."""
        if self.trainer.throughput.has_steps:
            self.log_training()

    def log_training(self) -> None:
        """Log the steps since the last time. Raises RunError if a loss, or a gradient's norm, is NaN or inf."""
        trainer = self.trainer
        add_up, throughput = trainer.processes.add_up, trainer.throughput
        first = None if self._knows_first_loss else throughput.first_loss(add_up)
        named = throughput.means(trainer.processes.gather) if trainer.step.returns_values else {}
        values = throughput.lap(add_up)
        if not math.isfinite(values["loss"]):
            raise self._not_finite()
        if first is not None:
            self._compare_with_uniform(max(first, values["loss"]))
        left = trainer.num_steps - trainer.state.step
        pace = throughput.recent_seconds_per_step
        evaluating = math.ceil(left / trainer.evaluate_every) * trainer.evaluation.seconds
        line = {
            **values,
            "epoch": trainer.state.step / trainer.train_loader.steps_per_epoch,
            "lr": trainer.state.lr,
            "eta_seconds": left * pace + evaluating,
            "peak_memory_bytes": peak_memory_bytes(trainer.device),
        }
        if taken := sorted(named.keys() & (line.keys() | {"kind", "step"})):
            raise RunError(f"step_loss returned values named {', '.join(taken)}, as the log's own; call them otherwise")
        trainer.log.train_line(trainer.state.step, trainer.num_steps, {**line, **named}, pace)

    def _compare_with_uniform(self, first: float) -> None:
        """Say so if a run begins far above the loss of a model that finds all classes equally likely."""
        self._knows_first_loss, uniform = True, self.trainer.step.uniform_loss
        note = first_loss_note(first, float(uniform)) if uniform is not None else None
        if note and not self.trainer.state.resumed_at:
            self.trainer.log.note(note)

    def _not_finite(self) -> RunError:
        """Return the error that names the step where the loss or a gradient was no number, its lr and its images."""
        trainer = self.trainer
        found = trainer.throughput.first_not_finite(trainer.processes.add_up)
        ago = found.steps_ago if found else 0
        step = trainer.state.step - ago
        lr = trainer.lr * trainer.schedule(max(0, trainer.state.updates - 1 - ago))
        images = trainer.train_loader.image_indices(step - 1)
        listed = "" if images is None else f"\ntraining images of this step, by row: {shortened(images, 64)}"
        remedy = "lower optimizer.lr, set optimizer.clip_norm or use another accelerate.mixed_precision"
        if not trainer.recipe_text:
            remedy = "look at the loss (a division by 0, a logarithm of it), lower the lr, or set clip_norm"
        return RunError(
            f"{found or 'the loss is nan'} at step {step}, lr {lr:.3g}: {remedy}; the checkpoints are as they were"
            f"{listed}"
        )
