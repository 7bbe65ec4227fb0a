"""A transform of the user's in the place of the recipe's augmentation, exact over processes, workers and resuming."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_fasttrain.data.loading.sampler import TRANSFORM_STREAM, MicroBatchKey, keyed_rng
from hf_fasttrain.data.pixels.augment import Growth
from hf_fasttrain.data.pixels.decode import Pixels
from hf_fasttrain.data.pixels.operations import seeded_globals
from hf_fasttrain.data.pixels.resize import resize
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.utils.errors import RunError, first_line
from hf_fasttrain.utils.library_errors import is_out_of_memory

PixelTransform = Callable[[Pixels, np.random.Generator], Pixels]  # pixels (H, W, 3) uint8, rng -> the same kind


@dataclass(frozen=True)
class CustomTransform:
    """Writes batches as `TrainTransform` does, of what a function returns for each prepared image.

    `function(pixels, rng)` gets its own copy of the pixels (H, W, 3) uint8 and a generator that depends on (seed,
    epoch, index, repeat) only. Python's, numpy's and torch's global generators are seeded from it, so that functions
    that draw from those give the same pixels too. Square pixels of another size than the epoch's are resized to it.
    """

    function: PixelTransform
    name: str  # for messages
    split: Split  # for messages
    image_size: int
    seed: int = 0
    interpolation: str = "bilinear"
    growth: Growth | None = None

    def size_at(self, epoch: int) -> int:
        """Return the image size of an epoch."""
        return self.growth.size(epoch, self.image_size) if self.growth else self.image_size

    def write(self, images: Iterable[tuple[int, Pixels]], key: MicroBatchKey, out: np.ndarray) -> None:
        """Write the batch of a key to `out` (B, S, S, 3).

        `images` are (row of the batch, pixels) in any order. Raises RunError that names the function and the image.
        """
        repeats, size = np.broadcast_to(key.repeats, key.indices.shape), out.shape[1]
        for row, pixels in images:
            index = int(key.indices[row])
            rng = keyed_rng(self.seed, TRANSFORM_STREAM, key.epoch, index, int(repeats[row]))
            with seeded_globals(int(rng.integers(2**32))):
                result = self._call(pixels.copy(), rng, index)  # a copy: the same pixels may be used and kept elsewhere
            resize(result, (size, size), self.interpolation, out=out[row])

    def _call(self, pixels: Pixels, rng: np.random.Generator, index: int) -> Pixels:
        try:
            result: Any = self.function(pixels, rng)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RunError(
                f"transform={self.name} failed for {self._image(index)}: {type(error).__name__}: {first_line(error)} "
                f"({frame.filename}, line {frame.lineno})"
            ) from None
        is_square = isinstance(result, np.ndarray) and result.ndim == 3 and result.shape[0] == result.shape[1] > 0
        if not is_square or result.dtype != np.uint8 or result.shape[2] != 3:
            kind = f"{result.dtype} {result.shape}" if isinstance(result, np.ndarray) else f"a {type(result).__name__}"
            raise RunError(
                f"transform={self.name} returned {kind} for {self._image(index)}; return pixels as a numpy array, "
                f"uint8 (S, S, 3): end with a crop or resize to {self.image_size} x {self.image_size}, and leave out "
                "normalisation and conversion to a tensor, which follow"
            )
        return result

    def _image(self, index: int) -> str:
        path = self.split.records([index])[0]["path"]
        return f"row {index} of split '{self.split.name}'" + (f" ({path})" if path else "")
