"""Helpers for runs: a small recipe, the command line in this process, and the contents of run folders."""

from __future__ import annotations

import itertools
import json
import signal
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
from hf_fasttrain.utils.signals import SIGNALS


def num_kept(cache: PixelCache) -> int:
    """Return the number of rows in a cache."""
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
    """Make the loss rise with each evaluation; see the fixture `rising_loss`."""
    real, count = Metrics.compute, itertools.count(1)

    def compute(self: Metrics, *add: Any) -> dict[str, float]:
        values = real(self, *add)
        return {**values, "loss": float(next(count))} if add else values  # of all processes: an evaluation

    monkeypatch.setattr(Metrics, "compute", compute)


def exit_status(arguments: list[str]) -> int:
    """Run the command line in this process as in a new one; return its exit status."""
    reset_accelerate()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit) as error:
            main(arguments)
    finally:  # a stopped command ignores signals until its process ends
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return int(error.value.code or 0)


def result_of(run: Path) -> dict[str, Any]:
    """Return a run's result.json."""
    return dict(json.loads((run / "result.json").read_text()))


def checkpoint(run: Path, step: int, kind: str = "model") -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint."""
    return load_file(run / "checkpoints" / f"step_{step:08d}" / f"{kind}.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dicts are the same bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def photo_recipe(photos: Path, place: Path) -> str:
    """Return a recipe for a folder of photos, whose run and whose kept features are in `place`."""
    return f"""
output_dir: {place / "run"}
model: {{name: test_resnet}}
data: {{dataset: "{photos}", image_size: 32, workers: 0, cache_dir: {place / "cache"}}}
train: {{duration: 2 steps, batch_size: 8}}
log: {{report: false}}
"""
