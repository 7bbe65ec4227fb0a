"""Images/s of a user's transform in a recipe's loader, compared with bare processes that only decode and transform.

    python benchmarks/transform.py DIR [--rounds 5] [--workers 2] [--size 224] [--json FILE]

DIR is an image folder (DIR/train/<class>/*.jpg). The transform is albumentations' if it is installed, else plain numpy
of about the same cost.

bare    processes that read, decode (Pillow) and transform their share of the files, and send nothing
torch   torch's DataLoader over a Dataset that does the same and normalises, to batches in this process
loader  the training loader of `Trainer.from_recipe(transform=...)`, to normalised batches in this process, uncached
kept    the same with decoded pixels cached in memory

The arms take turns in one process, each round starting with another one, after an untimed first pass of each. Batches
that a loader has prefetched during other turns are consumed before its clock starts. Figures are medians over rounds,
ratios medians of the rounds' ratios to `bare`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

SIZE, BATCH = 224, 64
EPOCHS = 4  # of a pass of the loader, which goes on without a break: a batch of one worker more is a small part then
REFILL_SECONDS = 2.0  # between turns: loaders fill their queues
Pass = Callable[[], float]  # goes through the images once, and returns images/s


@cache
def pipeline() -> Any:
    """Return an albumentations pipeline that ends with SIZE, None without albumentations."""
    if importlib.util.find_spec("albumentations") is None:
        return None
    import albumentations

    return albumentations.Compose(
        [
            albumentations.RandomResizedCrop(size=(SIZE, SIZE)),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.RandomBrightnessContrast(p=0.5),
            albumentations.HueSaturationValue(p=0.5),
        ]
    )


def transform(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random square crop of an image, possibly flipped, with random brightness."""
    if pipeline() is not None:
        pipeline().set_random_state(rng, random.Random(int(rng.integers(2**63))))
        return np.asarray(pipeline()(image=pixels)["image"])
    side = int(min(pixels.shape[:2]) * rng.uniform(0.3, 1))
    top, left = (int(rng.integers(0, length - side + 1)) for length in pixels.shape[:2])
    square = Image.fromarray(pixels[top : top + side, left : left + side]).resize(
        (SIZE, SIZE), Image.Resampling.BILINEAR
    )
    image = np.clip(np.asarray(square, np.float32) * rng.uniform(0.7, 1.3), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image[:, ::-1]) if rng.random() < 0.5 else image


def work(files: list[Path], start: Any, done: Any) -> None:
    """Read, decode and transform files, once for each item in `start`."""
    torch.set_num_threads(1)
    _one_opencv_thread(0)
    while (number := start.get()) is not None:
        for index, file in enumerate(files):
            transform(np.asarray(Image.open(file).convert("RGB")), np.random.default_rng([number, index]))
        done.put(None)


def bare_arm(files: list[Path], workers: int) -> Pass:
    """Return a pass over all files by processes that share them."""
    context = multiprocessing.get_context("fork")
    done, starts = context.Queue(), [context.Queue() for _ in range(workers)]
    for index, start in enumerate(starts):
        context.Process(target=work, args=(files[index::workers], start, done), daemon=True).start()

    def one_pass() -> float:
        start_time = time.perf_counter()
        for start in starts:
            start.put(0)
        for _ in starts:
            done.get()
        return len(files) / (time.perf_counter() - start_time)

    return one_pass


class Photos(Dataset):
    """Decoded, transformed and normalised images, as they are usually written for a DataLoader."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.mean, self.std = (torch.full((3, 1, 1), 0.5) for _ in range(2))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = transform(np.asarray(Image.open(self.files[index]).convert("RGB")), np.random.default_rng(index))
        return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255).sub_(self.mean).div_(self.std)


def torch_arm(files: list[Path], workers: int) -> Pass:
    """Return a pass over all files by torch's DataLoader, whose processes persist between passes."""
    loader = DataLoader(
        Photos(files),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        worker_init_fn=_one_opencv_thread,
    )

    def one_pass() -> float:
        start_time = time.perf_counter()
        return sum(len(images) for images in loader) / (time.perf_counter() - start_time)

    return one_pass


def _one_opencv_thread(worker: int) -> None:
    if (opencv := sys.modules.get("cv2")) is not None:
        opencv.setNumThreads(0)


def loader_arm(args: argparse.Namespace, cache_mode: str, folder: Path) -> Pass:
    """Return a pass over the training images by a recipe's loader, whose processes persist between passes."""
    from hf_fasttrain import load_recipe
    from hf_fasttrain.data.loading.prefetch import num_slots
    from hf_fasttrain.from_recipe.custom import CustomParts
    from hf_fasttrain.from_recipe.parts import build_parts
    from hf_fasttrain.from_recipe.trainer import build_train_loader

    recipe = folder / "transform.yaml"
    recipe.write_text(
        f"model: {{name: test_resnet}}\ndata: {{dataset: {args.folder}, image_size: {SIZE}, workers: {args.workers}, "
        f"cache: {cache_mode}}}\ntrain: {{duration: 1000 epochs, batch_size: {BATCH}, drop_last: true}}\n"
    )
    loader = build_train_loader(build_parts(load_recipe(recipe), custom=CustomParts(transform=transform)))
    steps = loader.steps(0, 1000 * loader.steps_per_epoch)

    def images_of(number: int) -> int:
        return sum(len(images) for _ in range(number) for images, _ in next(steps).micro_batches)

    def one_pass() -> float:
        images_of(num_slots(args.workers, BATCH))
        start_time = time.perf_counter()
        return images_of(EPOCHS * loader.steps_per_epoch) / (time.perf_counter() - start_time)

    return one_pass


def rates(arms: dict[str, Pass], rounds: int) -> dict[str, list[float]]:
    """Return images/s of each arm in each round."""
    rates_by_arm: dict[str, list[float]] = {name: [] for name in arms}
    for name in arms:
        arms[name]()
    names = list(arms)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(REFILL_SECONDS)
            rates_by_arm[name].append(arms[name]())
    return rates_by_arm


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted((args.folder / "train").glob("*/*"))
    if not files:
        parser.error(f"{args.folder}/train: no images in class folders")
    pipeline()  # before any process is forked
    with tempfile.TemporaryDirectory() as scratch:
        arms: dict[str, Pass] = {"bare": bare_arm(files, args.workers), "torch": torch_arm(files, args.workers)}
        for name, mode in (("loader", "none"), ("kept", "memory")):
            arms[name] = loader_arm(args, mode, Path(scratch))
        rates_by_arm = rates(arms, args.rounds)
    print(f"{args.folder.name}: {len(files):,} images, {args.workers} workers, {args.rounds} rounds")
    for name, values in rates_by_arm.items():
        ratio = statistics.median(mine / bare for mine, bare in zip(values, rates_by_arm["bare"], strict=True))
        spread = f"({min(values):.0f} - {max(values):.0f})"
        print(f"{name:<8} {statistics.median(values):8.0f} images/s {spread:>16}  {ratio:5.2f} of bare")
    if args.json:
        args.json.write_text(
            json.dumps({"rates": rates_by_arm, "albumentations": pipeline() is not None}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
