"""Iterates over the steps of a training; the current step can be retried in smaller micro-batches."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.run_folder.schemas import MicroBatchFile, read_if_sound
from hf_fasttrain.utils.files import try_to_write, write_json

CUT_FILE = "micro_batch.json"


class Steps:
    """Iterates over the steps of a loader from `start` to before `stop`."""

    def __init__(self, loader: Any, start: int, stop: int) -> None:
        self.loader, self.stop = loader, stop
        self._steps: Iterator[Step] = iter(loader.steps(start, stop))
        self._current: Step | None = None

    def __iter__(self) -> Iterator[Step]:
        while (step := next(self._steps, None)) is not None:
            self._current = step
            yield step

    def close(self) -> None:
        """Release the current step and prefetched batches, and stop the loader's workers.

        Explicitly, because a traceback, which notebooks keep, may keep the step and the loop alive.
        """
        if self._current is not None:
            self._current.micro_batches.close()
        if isinstance(self._steps, Generator):
            self._steps.close()
        self._current, self._steps = None, iter(())

    def skip(self, number: int) -> int:
        """Discard the batches of `number` steps; return how many images they have."""
        images = 0
        for _ in range(number):
            step = next(self._steps)
            for _ in step.micro_batches:
                pass
            images += step.num_images
        return images

    def retry(self, index: int, micro_batch_size: int) -> Step:
        """Return a step once more, the same images in smaller micro-batches, and continue from there."""
        self.loader.cut_to(micro_batch_size)
        self._steps = iter(self.loader.retry(index, self.stop))
        self._current = next(self._steps)
        return self._current


def smaller(micro_batch_size: int, *, with_batch_norm: bool) -> int | None:
    """Return the next smaller micro-batch: even, since mixup pairs neighbours, or finally 1; None if there is none.

    Batch norm needs two images.
    """
    if micro_batch_size > 2:
        return 2 * (micro_batch_size // 4) or 2
    return 1 if micro_batch_size == 2 and not with_batch_norm else None


def remember_cut(run: Path | None, size_setting: str, micro_batch_size: int) -> None:
    """Store for `--resume` the micro-batch size that fits, where the loader's `size_setting` did not."""
    if run is not None:
        record = {"wished": size_setting, "micro_batch_size": micro_batch_size}
        try_to_write(lambda: write_json(run / CUT_FILE, record), lambda error: None)


def remembered_cut(run: Path | None, size_setting: str) -> int | None:
    """Return the micro-batch size that `remember_cut` stored for the same setting, None if there is none."""
    record = read_if_sound(run / CUT_FILE, MicroBatchFile) if run is not None else {}
    size = record.get("micro_batch_size")
    return size if record.get("wished") == size_setting and isinstance(size, int) and size > 0 else None
