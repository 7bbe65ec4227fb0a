"""Runs of the tests: a small recipe, the command line called in this process, and what a run folder holds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import reset_accelerate
from safetensors.torch import load_file

from hf_fasttrain.cli import main
from hf_fasttrain.data.pixels.cache import ENTRY, HEADER_BYTES, PixelCache
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints
from hf_fasttrain.train.metrics import Metrics


def num_kept(cache: PixelCache) -> int:
    """Return for how many rows a cache has an entry."""
    entries = np.memmap(cache.index_path, ENTRY, "r", offset=HEADER_BYTES, shape=(cache.num_rows,))
    return int(np.count_nonzero(entries["length"]))


RECIPE = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 32, workers: 0}
train: {duration: 2 steps, batch_size: 16}
log: {report: false}
"""


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's model folder."""
    return load_file(run / "model" / "model.safetensors")


def steps_of(run: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints."""
    return [int(path.name.split("_")[1]) for path in complete_checkpoints(run / "checkpoints")]


def raise_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what `rising_loss` says."""
    real, count = Metrics.compute, itertools.count(1)

    def compute(self: Metrics, *add: Any) -> dict[str, float]:
        return {**real(self, *add), "loss": float(next(count))}

    monkeypatch.setattr(Metrics, "compute", compute)


def exit_status(arguments: list[str]) -> int:
    """Run the command line in this process, as if it were the first to; return its exit status."""
    reset_accelerate()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)
