"""Retries steps that ran out of memory: the same images in smaller micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hf_fasttrain.data.loading.loader import EvalLoader, Step
from hf_fasttrain.data.loading.waiting import WaitCutShort
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.train.step import TrainStep
from hf_fasttrain.train.steps import Steps, remember_cut, remembered_cut, smaller
from hf_fasttrain.utils.errors import (
    PEER_GONE,
    GradientsNotExchanged,
    NotEnoughMemory,
    RunError,
    StepOutOfMemory,
    first_line,
    how_to_resume,
)
from hf_fasttrain.utils.library_errors import is_out_of_memory, is_peer_gone

Outcome = TypeVar("Outcome")


class Retry:
    """Runs steps; when memory runs out, drops cached evaluation images from the device, then halves micro-batches.

    `loaders` returns the evaluation loaders. With `is_on` False, running out of memory ends training.
    """

    is_on = True

    def __init__(
        self,
        step: TrainStep,
        loader: Any,
        loaders: Callable[[], Sequence[Any]],
        state: State,
        log: RunLog,
        run: Path | None,
    ) -> None:
        self.step, self.loader, self.loaders, self.state, self.log, self.run = step, loader, loaders, state, log, run
        self.processes = step.processes
        self._first_size = f"{loader.size_setting}, {self.processes.number} processes"

    def __call__(self, step: Step, steps: Steps, make: Callable[[Step], Tensor]) -> Tensor:
        """Return `make(step)`; called again with a smaller step when memory runs out."""
        step, loss = self._run(step, steps, make)
        self.step.memory.fits(step)
        return loss

    def settle(self, step: Step, steps: Steps) -> Step:
        """Freeze unused parameters, with a note; return the first step, which may have become smaller."""
        step, notes = self._run(step, steps, self.step.settle)
        for note in notes:
            self.log.note(note)
        return step

    def _run(self, step: Step, steps: Steps, make: Callable[[Step], Outcome]) -> tuple[Step, Outcome]:
        while True:
            self.step.memory.keep()
            try:
                if not self.processes.is_distributed:  # with several processes `settle` has compared them
                    for note in self.step.split_notes(step):
                        self.log.note(note)
                return step, make(step)
            except WaitCutShort:
                self.step.undo()  # the state before it is saved
                raise
            except (RuntimeError, MemoryError) as error:
                undoable = self.processes.is_distributed and self.step.memory.failed_in() == "gradients"
                if undoable and is_peer_gone(error):
                    self.step.undo()
                    raise GradientsNotExchanged(PEER_GONE) from None
                if not is_out_of_memory(error):
                    raise
                what, agreed = first_line(error), isinstance(error, StepOutOfMemory)
            step = self._make_smaller(step, steps, what, agreed)  # outside of the handler, which keeps tensors alive

    def restore(self) -> None:
        """Start with the micro-batch size that was found before the run was resumed."""
        size = remembered_cut(self.run, self._first_size)
        if size is not None:
            self.loader.cut_to(size)
            self.log.note(f"memory ran out earlier in this run: micro-batches of {size} images")

    def _make_smaller(self, step: Step, steps: Steps, what: str, agreed: bool) -> Step:
        """Undo a step that ran out of memory, and return it in smaller micro-batches; `agreed` by all processes."""
        before = self.loader.micro_batch_size
        if not self.is_on:
            raise NotEnoughMemory(f"out of memory with micro-batches of {before} images ({what})")
        if agreed:
            before = self.processes.largest(before)[0]
        if self._released_images(agreed):
            return self._redo(step, steps, before)
        size = smaller(before, with_batch_norm=bool(self.step.norms))
        if size is None:
            least = "two images, which batch norm needs, do" if self.step.norms else "a single image does"
            raise RunError(f"out of memory: {least} not fit ({what}); lower data.image_size or take a smaller model")
        if self.processes.is_main or not agreed:
            remember_cut(self.run, self._first_size, size)
        if self.step.memory.failed_in() == "update" or (self.processes.is_distributed and not agreed):
            raise NotEnoughMemory(
                f"out of memory at step {step.index + 1} with micro-batches of {before} images, when gradients were "
                f"being exchanged or applied ({what}); nothing of it is saved: {how_to_resume()} continues from the "
                f"newest checkpoint with micro-batches of {size}"
            )
        self.state.out_of_memory.append({"step": step.index + 1, "before": before, "after": size})
        self.log.note(f"out of memory with micro-batches of {before} images: {size} from step {step.index + 1} on")
        return self._redo(step, steps, size)

    def _redo(self, step: Step, steps: Steps, micro_batch_size: int) -> Step:
        """Undo a step, and return it in micro-batches of `micro_batch_size`."""
        self.step.undo()
        steps.close()
        free_cached_memory(self.step.device)
        return steps.retry(step.index, micro_batch_size)

    def _released_images(self, agreed: bool) -> bool:
        """Drop evaluation images that are cached on the device, and return whether there were any.

        Not after a failed update, which can't be undone, and with several processes only if all of them agree.
        """
        undoable = self.step.memory.failed_in() != "update"
        if not undoable or (self.processes.is_distributed and not agreed):
            return False
        freed = sum(loader.release_memory() for loader in self.loaders() if isinstance(loader, EvalLoader))
        freed = self.processes.largest(freed)[0]
        if freed:
            self.log.note(
                f"out of memory: {freed / 1e9:.2f} GB of evaluation images are no longer kept on "
                f"{self.step.device}, and the step is made again"
            )
        return bool(freed)
