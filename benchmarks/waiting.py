"""How long training waits for images: a tiny, fast model on a folder of photos, with three loaders.

    python benchmarks/waiting.py DIR [--rounds 3] [--epochs 3] [--workers 2] [--json FILE]

example   as in transformers' example: datasets, torchvision's transforms and a DataLoader, passed to our Trainer
uncached  `hf_fasttrain`, each image decoded every time
cached    `hf_fasttrain`, short side 256, pixels cached on disk by an earlier run

DIR is an image folder with the splits train and validation. All three train the same model (a convolution that cuts the
image into patches, and a linear head: thousands of images/s even on one core) for the same steps with the same loop;
only the loader differs. The sides take turns, each run in its own process.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARMS = ("example", "uncached", "cached")
SIZE, BATCH = 224, 64
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def write_recipe(args: argparse.Namespace, scratch: Path) -> Path:
    """Return the recipe of all arms."""
    path = scratch / "waiting.yaml"
    path.write_text(
        "model: {name: test_resnet}  # only its data are used\n"
        f"data: {{dataset: {args.folder.resolve()}, image_size: {SIZE}, workers: {args.workers}, cache: none, "
        f"mean: {MEAN}, std: {STD}, interpolation: bilinear, cache_dir: {scratch / 'pixels'}}}\n"
        f"train: {{duration: {args.epochs} epochs, batch_size: {BATCH}, drop_last: true}}\n"
        f"evaluate: {{every: {args.epochs} epochs}}\n",
        encoding="utf-8",
    )
    return path


def example_loader(folder: Path, workers: int) -> Any:
    """Return the training loader of transformers' example."""
    import datasets
    import torch
    from torchvision import transforms

    datasets.disable_progress_bars()
    dataset = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [transform(image.convert("RGB")) for image in rows["image"]], "label": rows["label"]}

    def collate(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
        return torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["label"] for row in rows])

    return torch.utils.data.DataLoader(
        dataset.with_transform(transformed),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
    )


def train_arm(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Train once and return images/s and the share of the time spent waiting."""
    import torch
    from torch import nn

    from hf_fasttrain import Trainer
    from hf_fasttrain.from_recipe.parts import build_parts
    from hf_fasttrain.from_recipe.trainer import build_train_loader

    overrides = ["data.cache=disk", "data.short_side=256"] if name == "cached" else []
    parts = build_parts(args.scratch / "waiting.yaml", overrides)
    torch.set_num_threads(1)  # the loader's processes need the other cores
    patches = nn.Conv2d(3, 32, 16, stride=16)
    model = nn.Sequential(patches, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    loader = example_loader(args.folder, args.workers) if name == "example" else build_train_loader(parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    result = Trainer(model, loader, optimizer, duration=f"{args.epochs} epochs").fit()
    return {"images_per_second": result.images_per_second, "data_wait_fraction": result.data_wait_fraction}


def run_arm(name: str) -> dict[str, float]:
    """Return the figures of a run in a separate process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", name]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(train_arm(args.arm, args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv += ["--scratch", scratch]
        write_recipe(args, Path(scratch))
        run_arm("cached")  # fills the cache
        rounds = [{name: run_arm(name) for name in ARMS} for _ in range(args.rounds)]
    figures = {
        name: {key: statistics.median(round_[name][key] for round_ in rounds) for key in rounds[0][name]}
        for name in ARMS
    }
    for name, values in figures.items():
        print(f"{name:<10} {values['images_per_second']:8.0f} images/s  {values['data_wait_fraction']:6.1%} waiting")
    if args.json:
        args.json.write_text(json.dumps({**figures, "rounds": rounds}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
