"""Steps that memory was too short for, made once more: the same images in smaller micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hf_fasttrain.data.loading.loader import EvalLoader, Step
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.train.step import TrainStep
from hf_fasttrain.train.steps import Steps, remember_cut, remembered_cut, smaller
from hf_fasttrain.utils.errors import NotEnoughMemory, RunError, StepOutOfMemory, first_line, how_to_resume
from hf_fasttrain.utils.library_errors import is_out_of_memory

Made = TypeVar("Made")


class Retry:
    """Makes steps; where memory runs out, evaluation images on the device are given up, then micro-batches halved.

    `loaders` gives those of the evaluation. With `is_on` False a step that memory is too short for ends training.
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
        """Return what `make` gives for a step of `steps`; called again where memory runs out."""
        step, loss = self._made(step, steps, make)
        self.step.memory.fits(step)
        return loss

    def settle(self, step: Step, steps: Steps) -> Step:
        """Find out which parameters are trained, and say which are not; return the first step, which may be smaller."""
        step, notes = self._made(step, steps, self.step.settle)
        for note in notes:
            self.log.note(note)
        return step

    def _made(self, step: Step, steps: Steps, make: Callable[[Step], Made]) -> tuple[Step, Made]:
        while True:
            self.step.memory.keep()
            try:
                return step, make(step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                what, agreed = first_line(error), isinstance(error, StepOutOfMemory)
            step = self._make_smaller(step, steps, what, agreed)  # outside of the handler, which holds what failed

    def restore(self) -> None:
        """Begin with the micro-batches that an earlier part of the run found to fit."""
        size = remembered_cut(self.run, self._first_size)
        if size is not None:
            self.loader.cut_to(size)
            self.log.note(f"memory ran out earlier in this run: micro-batches of {size} images")

    def _make_smaller(self, step: Step, steps: Steps, what: str, agreed: bool) -> Step:
        """Undo a step that memory was too short for, and return it cut smaller; `agreed` by all processes."""
        before = self.loader.micro_batch_size
        if not self.is_on:
            raise NotEnoughMemory(f"out of memory with micro-batches of {before} images ({what})")
        if agreed:
            before = self.processes.largest(before)[0]
        if self._released_images(agreed):
            return self._again(step, steps, before)
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
        return self._again(step, steps, size)

    def _again(self, step: Step, steps: Steps, micro_batch_size: int) -> Step:
        """Go back to before a step, and return it in such micro-batches."""
        self.step.undo()
        steps.close()
        free_cached_memory(self.step.device)
        return steps.retry(step.index, micro_batch_size)

    def _released_images(self, agreed: bool) -> bool:
        """Give up evaluation images that are kept on the device, and return whether there were any.

        Not after a failed update, which can't be undone, and among several processes only where all of them agree.
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
