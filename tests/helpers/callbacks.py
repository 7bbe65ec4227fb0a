"""Callbacks that stop a run, and that record its gradients."""

from __future__ import annotations

import os
import signal

from hf_fasttrain import Callback, Trainer
from hf_fasttrain.train.callbacks import StepReport


class Stop(Callback):
    """Stops the run once, after the step that follows the given one."""

    takes_part = False

    def __init__(self, after: int) -> None:
        self.after = after

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if report.step == self.after and not trainer.state.resumed_at:
            os.kill(os.getpid(), signal.SIGTERM)


class Norms(Callback):
    """Records the norms of the gradients."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        assert report.grad_norm is not None
        self.norms.append(float(report.grad_norm))
