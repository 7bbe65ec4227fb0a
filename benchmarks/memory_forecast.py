"""The memory forecast of `hf-fasttrain check` compared with the peak of the training, for models and micro-batches.

    python benchmarks/memory_forecast.py FLOWERS [--models resnet50 ...] [--sizes 8 32]

Each training runs in its own process: two micro-batches, an evaluation, and everything that a run writes. The peak is
the resident memory of the training process, from result.json. Exits with 1 if a forecast is more than 25 % off. Other
programs may run at the same time, since only memory is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hf_fasttrain.recipe.resolved import read_settings

MODELS = ("resnet50", "tf_efficientnet_lite0", "vit_small_patch16_224", "convnext_atto")
SIZES = (8, 32)
MOST_DIFFERENCE = 0.25
GB = 1e9
COLUMNS = ("model", "images per forward", "forecast, GB", "peak, GB", "forecast / peak")


def train(dataset: str, model: str, size: int, overrides: list[str], folder: Path) -> tuple[float, float]:
    """Return the forecast and the peak of a training with micro-batches of `size`, in bytes."""
    settings = {
        "data.dataset": dataset,
        "model.name": model,
        "model.pretrained": "false",
        "train.batch_size": 2 * size,
        "accelerate.micro_batch_size": size,
        "train.duration": "1 steps",
        "schedule.warmup": "0",
        "output_dir": folder,
    }
    command = [sys.executable, "-m", "hf_fasttrain", "resnet50", *(f"{k}={v}" for k, v in settings.items()), *overrides]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{process.stdout}{process.stderr}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    if result["out_of_memory"]:
        raise SystemExit(f"{model}, {size} images: memory ran out; choose smaller --sizes")
    return read_settings(folder)["memory_forecast_bytes"].value, result["peak_memory_bytes"]


def main() -> None:
    """Print a table with a row for each training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, e.g. ema={decay: 0.99}")
    arguments = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}")
    worst = 0.0
    for model in arguments.models:
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory() as folder:
                forecast, peak = train(arguments.dataset, model, size, arguments.set, Path(folder) / "run")
            worst = max(worst, abs(forecast / peak - 1))
            print(f"| {model} | {size} | {forecast / GB:.2f} | {peak / GB:.2f} | {forecast / peak:.2f} |", flush=True)
    sys.exit(worst > MOST_DIFFERENCE)


if __name__ == "__main__":
    main()
