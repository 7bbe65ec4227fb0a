"""An albumentations pipeline in the recipe's loader: reproducible with any processes, workers and resumes.

    pip install albumentations
    python examples/with_albumentations.py [KEY=VALUE ...]

KEY=VALUE are settings of the recipe, such as data.dataset=path/to/photos. Without albumentations nothing is trained.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from hf_fasttrain import Trainer

SIZE = 32


@cache
def pipeline() -> Any:
    """Return a pipeline that ends with the image size, without Normalize and ToTensorV2."""
    import albumentations

    return albumentations.Compose(
        [
            albumentations.RandomResizedCrop(size=(SIZE, SIZE), scale=(0.5, 1.0)),
            albumentations.Affine(rotate=(-15, 15), p=0.5),
            albumentations.RandomBrightnessContrast(p=0.5),
            albumentations.CoarseDropout(p=0.3),
        ]
    )


def augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply the pipeline to pixels (H, W, 3) uint8, with random numbers from `rng` only."""
    pipeline().set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return pipeline()(image=pixels)["image"]


def main(overrides: Sequence[str] = ()) -> None:
    """Train on digits with the pipeline instead of the recipe's crop and flip."""
    if importlib.util.find_spec("albumentations") is None:
        print("albumentations is not installed: pip install albumentations")
        return
    settings = [f"data.image_size={SIZE}", "output_dir=runs/albumentations", *overrides]
    result = Trainer.from_recipe("quickstart", settings, transform=augment).fit()
    print(f"accuracy {result.metrics['accuracy']:.3f} after {result.steps} steps")


if __name__ == "__main__":
    main(sys.argv[1:])
