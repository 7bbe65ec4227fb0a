"""The steps of a training one after the other; the present one can be had again in smaller micro-batches."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.utils.files import read_json, try_to_write, write_json

CUT_FILE = "micro_batch.json"


class Steps:
    """Iterates over the steps of a loader from `start` to before `stop`."""

    def __init__(self, loader: Any, start: int, stop: int) -> None:
        self.loader, self.stop = loader, stop
        self._steps: Iterator[Step] = iter(loader.steps(start, stop))
        self._present: Step | None = None

    def __iter__(self) -> Iterator[Step]:
        while (step := next(self._steps, None)) is not None:
            self._present = step
            yield step

    def close(self) -> None:
        """Let go of the present step and of what is loaded ahead, and end the loader's workers.

        A traceback, which notebooks keep, may hold the step and the loop: nothing is left to their deletion.
        """
        if self._present is not None:
            self._present.micro_batches.close()
        if isinstance(self._steps, Generator):
            self._steps.close()
        self._present, self._steps = None, iter(())

    def skip(self, number: int) -> int:
        """Use up so many steps' batches without training on them; return how many images they have."""
        images = 0
        for _ in range(number):
            step = next(self._steps)
            for _ in step.micro_batches:
                pass
            images += step.num_images
        return images

    def retry(self, index: int, micro_batch_size: int) -> Step:
        """Return a step once more, the same images in smaller micro-batches, and go on from there."""
        self.loader.cut_to(micro_batch_size)
        self._steps = iter(self.loader.retry(index, self.stop))
        self._present = next(self._steps)
        return self._present


def smaller(micro_batch_size: int, *, with_batch_norm: bool) -> int | None:
    """Return the next smaller micro-batch: even, since mixup pairs neighbours, or at last 1; None if there is none.

    Batch norm needs two images.
    """
    if micro_batch_size > 2:
        return 2 * (micro_batch_size // 4) or 2
    return 1 if micro_batch_size == 2 and not with_batch_norm else None


def remember_cut(run: Path | None, wish: str, micro_batch_size: int) -> None:
    """Write down for `--resume` which micro-batch fits where `wish` (as the loader has it) did not."""
    if run is not None:
        record = {"wished": wish, "micro_batch_size": micro_batch_size}
        try_to_write(lambda: write_json(run / CUT_FILE, record), lambda error: None)


def remembered_cut(run: Path | None, wish: str) -> int | None:
    """Return the micro-batch that an earlier part of the run found to fit, None if it had no need to look."""
    record = read_json(run / CUT_FILE) if run is not None else {}
    size = record.get("micro_batch_size")
    return size if record.get("wished") == wish and isinstance(size, int) and size > 0 else None
