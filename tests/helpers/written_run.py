"""The run folder of a finished training, written without training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hf_fasttrain.models.model import ModelSpec, Preprocessing, build_model
from hf_fasttrain.models.saved import save_model

CLASS_NAMES = ["/a/airfield", "/b/ballroom", "rose"]  # class names that look like paths are not changed


METRICS = {"loss": 0.5, "accuracy": 0.8125, "top5_accuracy": 1.0, "f1_macro": 0.7931}


RECIPE = """\
# overrides: data.dataset={photos} output_dir={run}
seed: 0
output_dir: {run}
model: {{name: test_resnet, pretrained: {weights}}}   # my own weights
data:
  dataset: {photos}
  image_size: 32
train: {{duration: 2 steps, batch_size: 16}}
"""


def write_run(run: Path, home: Path, name: str = "test_resnet", **options: object) -> Path:
    """Write the run folder of a finished training, with local paths wherever they may occur."""
    spec = ModelSpec(name, CLASS_NAMES, 32, preprocessing=Preprocessing(32), **options)
    torch.manual_seed(0)
    save_model(build_model(spec), spec, run / "model")
    photos = home / "my photos" / "flowers"
    photos.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(RECIPE.format(run=run, photos=photos, weights=home / "old" / "w.safetensors"))
    result = {
        "metrics": METRICS,
        "test_metrics": {"accuracy": 0.75},
        "best": {"metric": "accuracy", "value": 0.8125, "step": 2},
        "steps": 2,
        "images": 32,
        "train_seconds": 1.25,
        "images_per_second": 25.6,
        "machine": {"processor": "a processor", "device": "cpu", "system": "Linux-6.1"},
        "versions": {"python": "3.11.1"},
        "notes": [f"{photos}/rose/1.jpg: can't be decoded", f"read from '{home}/cache', 25 images/s"],
    }
    (run / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        {"kind": "train", "step": 1, "loss": float("nan")},
        {"kind": "evaluation", "step": 2, "split": "validation", **METRICS},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "state").write_text("not to be pushed")
    return run
