"""What stops a run, and what records its gradients."""

from __future__ import annotations

import os
import signal

import pytest
from torch import Tensor

from hf_fasttrain import Callback, Trainer
from hf_fasttrain.data.loading.loader import Step
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


def stop_before(trainer: Trainer, index: int) -> None:
    """Train until the step with an index (from 0) would begin."""
    make_step = trainer.train_step

    def train_step(step: Step) -> Tensor:
        if step.index == index:
            raise KeyboardInterrupt
        return make_step(step)

    trainer.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
