"""The mean of a run's last evaluated weights (Izmailov et al. 2018, SWA; Kaddour 2022, LAWA), for final="average".

The states are folders beside the checkpoints, in their format: each holds the weights that are evaluated and saved (the
moving average, if there is one). They survive kills, and a resumed run finds those of the steps before its checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_fasttrain.run_folder.checkpoint import (
    MARKER,
    Snapshot,
    checkpoint_path,
    checkpoint_step,
    complete_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from hf_fasttrain.run_folder.file_names import AVERAGED_FOLDER
from hf_fasttrain.train.callbacks import Callback, StepReport
from hf_fasttrain.train.distributed import on_main
from hf_fasttrain.utils.environment import one_thread
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import reason, try_to_write

if TYPE_CHECKING:
    from hf_fasttrain.train.checkpointing import Checkpoints
    from hf_fasttrain.train.trainer import Trainer


class WeightMean:
    """The mean of floating-point tensors over several states, in float64; other tensors are those of the last one."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._types: dict[str, dict[str, torch.dtype]] = {}

    @torch.no_grad()
    def add(self, step: int, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add the state after `step`: kind -> name -> tensor. Raises ValueError if it is of another model."""
        if self.steps and _shapes(weights) != _shapes(self._sums):
            raise ValueError("it has other tensors than the states before it")
        for kind, tensors in weights.items():
            sums = self._sums.setdefault(kind, {})
            self._types[kind] = {name: tensor.dtype for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                is_averaged = tensor.is_floating_point() or tensor.is_complex()
                wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) if is_averaged else tensor
                sums[name] = sums[name] + wide if is_averaged and name in sums else wide
        self.steps.append(step)

    @torch.no_grad()
    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return the mean, rounded once to the type of each tensor."""
        return {
            kind: {
                name: (total / len(self.steps)).to(self._types[kind][name])
                if total.is_floating_point() or total.is_complex()
                else total
                for name, total in sums.items()
            }
            for kind, sums in self._sums.items()
        }


def _shapes(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[str, str], torch.Size]:
    return {(kind, name): tensor.shape for kind, tensors in weights.items() for name, tensor in tensors.items()}


class StateKeeper(Callback):
    """Keeps the weights after each step that is evaluated, and removes those that no mean needs any more."""

    takes_part = False  # it only observes

    def __init__(self) -> None:
        self._is_first = True

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Keep the weights, if this step is evaluated."""
        if self._is_first and trainer.processes.is_main:
            _remove(trainer, [step for step in kept_steps(trainer) if not _belongs(trainer, step, report.step)])
        self._is_first = False
        if report.step == trainer.num_steps or (
            report.step % trainer.evaluate_every == 0 and trainer.evaluation.has_started
        ):
            keep_state(trainer)


def _belongs(trainer: Trainer, step: int, first: int) -> bool:
    """Return whether a kept state is one of this training: before its `first` step here, at a step it evaluates."""
    return step < first and step % trainer.evaluate_every == 0


def keep_state(trainer: Trainer) -> None:
    """Write the current weights into the folder of states; called by all processes, which wait for it.

    What can't be written is reported, and missing in the mean.
    """
    step, checkpoints = trainer.state.step, trainer.checkpoints
    assert checkpoints is not None
    with trainer.throughput.stopped():
        weights = trainer.stateful.final_weights()  # a collective operation
        if not trainer.processes.is_main:
            return
        with one_thread():
            snapshot = Snapshot(step, {}, weights, {}).to_host(copy=False)
        if not snapshot.is_finite():  # the run ends with an error, or recovers
            trainer.log.note(f"step {step:,}: NaN or inf in the weights, which are not averaged")
            return

        def failed(error: BaseException) -> None:
            trainer.log.note(f"the weights of step {step:,} could not be kept for averaging: {reason(error)}")

        if try_to_write(lambda: save_checkpoint(_folder(checkpoints), snapshot), failed):
            _prune(trainer, step)


def _folder(checkpoints: Checkpoints) -> Path:
    return checkpoints.folder / AVERAGED_FOLDER


def kept_steps(trainer: Trainer) -> list[int]:
    """Return the steps whose weights are kept for averaging, in ascending order."""
    if trainer.checkpoints is None:
        return []
    return [checkpoint_step(path) for path in complete_checkpoints(_folder(trainer.checkpoints))]


def _prune(trainer: Trainer, step: int) -> None:
    """Keep the last `num_averaged` states up to `step`, and up to each checkpoint from which training may resume."""
    assert trainer.checkpoints is not None
    resumable = complete_checkpoints(trainer.checkpoints.folder)[-trainer.checkpoints.keep :]
    steps = kept_steps(trainer)
    needed = {
        kept
        for end in (step, *map(checkpoint_step, resumable))
        for kept in [each for each in steps if each <= end][-trainer.num_averaged :]
    }
    _remove(trainer, [each for each in steps if each not in needed])


def _remove(trainer: Trainer, steps: Iterable[int]) -> None:
    assert trainer.checkpoints is not None
    for path in (checkpoint_path(_folder(trainer.checkpoints), step) for step in steps):
        try_to_write(lambda path=path: os.unlink(path / MARKER), lambda error: None)  # type: ignore[misc]
        shutil.rmtree(path, ignore_errors=True)


def load_average(trainer: Trainer) -> tuple[int, ...]:
    """Load the mean of the last states, the current one included, into the model; return their steps.

    Called by all processes. With fewer than two states the model does not change, and a note says why.
    """
    if trainer.state.step not in on_main(lambda: kept_steps(trainer)):
        keep_state(trainer)  # after a break, or trained without final="average"
    mean: WeightMean | None = None

    def read_on_main() -> list[int]:
        nonlocal mean
        mean = _read_mean(trainer)
        return mean.steps

    steps = on_main(read_on_main)
    if len(steps) < trainer.num_averaged:
        trainer.log.note(_few_states(trainer, steps))
    if len(steps) < 2:
        return ()
    if mean is None:
        mean = _read_same(trainer, steps)
    trainer.stateful.load_final_weights(mean.compute())
    return tuple(steps)


def _few_states(trainer: Trainer, steps: list[int]) -> str:
    kept = f"only {len(steps)} of the last {trainer.num_averaged} evaluated states " + (
        "is kept" if len(steps) == 1 else "are kept"
    )
    ends = "the run ends with the mean of these" if len(steps) > 1 else "the run ends with the last weights"
    why = "the others were not reached, could not be read, or the run was trained without final=average"
    return f"average of the weights: {kept}; {ends} ({why})"


def averaged_steps(trainer: Trainer) -> list[int]:
    """Return the steps that a finished run's mean is taken over."""
    steps = [step for step in kept_steps(trainer) if step <= trainer.state.step]
    return steps[-trainer.num_averaged :]


def _weights_of(trainer: Trainer, step: int) -> dict[str, dict[str, Tensor]]:
    """Return the kept weights of a step. Raises RunError or ValueError if they can't be read."""
    assert trainer.checkpoints is not None
    return load_checkpoint(checkpoint_path(_folder(trainer.checkpoints), step)).weights


def _read_mean(trainer: Trainer) -> WeightMean:
    """Return the mean of the states that can be read; the others are reported."""
    mean = WeightMean()
    for step in averaged_steps(trainer):
        try:
            mean.add(step, _weights_of(trainer, step))
        except (RunError, ValueError) as error:
            trainer.log.note(f"the weights of step {step:,} are not averaged: {error}")
    return mean


def _read_same(trainer: Trainer, steps: list[int]) -> WeightMean:
    """Return the mean that the main process has read, on another process."""
    mean = WeightMean()
    try:
        for step in steps:
            mean.add(step, _weights_of(trainer, step))
    except RunError as error:
        local_error = RunError(
            f"can't average the weights: {error} for process {trainer.processes.index}; share the disk of "
            f"{trainer.output_dir}"
        )
        local_error.on_every_process = False
        raise local_error from None
    return mean
