"""Images/s of JPEG decoders and of resized crops on one core, and how far their pixels differ from Pillow's.

    python benchmarks/decoders.py DIR [--images 500] [--rounds 5] [--size 224] [--short-side 256]

DIR is a folder with JPEGs in it or in subfolders. The sides take turns; figures are medians over rounds, differences
the largest over all images. Libraries that are not installed are skipped (OpenCV is not a dependency). `reduced` is
`data.reduced_decode` followed by the resize to --short-side, `resized` the same with a full decode.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from hf_fasttrain.data.loading.sampler import CROP_STREAM, keyed_uniforms
from hf_fasttrain.data.pixels.augment import BOX_TRIES, random_box
from hf_fasttrain.data.pixels.decode import decode
from hf_fasttrain.data.pixels.resize import resize, resize_short_side

try:
    import cv2
except ImportError:
    cv2 = None

Side = Callable[[Any], np.ndarray]


def pillow(data: bytes) -> np.ndarray:
    """Decode with Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoders() -> dict[str, Side]:
    """Return the decoders that are installed, each from bytes to RGB pixels."""

    def torchvision(data: bytes) -> np.ndarray:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()

    sides: dict[str, Side] = {"Pillow": pillow, "torchvision": torchvision, "simplejpeg": simplejpeg.decode_jpeg}
    if cv2 is not None:
        cv2.setNumThreads(1)
        sides["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    sides["ours"] = decode
    return sides


def resizers(size: int) -> dict[str, Side]:
    """Return the functions from (pixels, box) to a square of `size` pixels."""
    out = np.empty((size, size, 3), np.uint8)

    def cut(job: Any) -> np.ndarray:
        left, top, right, bottom = job[1]
        return np.ascontiguousarray(job[0][top:bottom, left:right])

    sides: dict[str, Side] = {
        "Pillow": lambda job: np.asarray(Image.fromarray(cut(job)).resize((size, size), Image.Resampling.BILINEAR)),
        "ours (bilinear)": lambda job: resize(job[0], (size, size), "bilinear", job[1], out),
    }
    if cv2 is not None:
        sides["OpenCV (aliased)"] = lambda job: cv2.resize(cut(job), (size, size), interpolation=cv2.INTER_LINEAR)
    return sides


def measure(title: str, sides: dict[str, Side], jobs: list[Any], rounds: int, reference: str | None) -> None:
    """Print each side's images/s, its ratio to the first side, and its largest difference from `reference`."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            for job in jobs:
                side(job)
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(sides))
    print(title)
    for name, side in sides.items():
        rate = len(jobs) / statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
        difference = ""
        if reference is not None:
            differences = (abs(side(job).astype(int) - sides[reference](job).astype(int)).max() for job in jobs)
            difference = f"  at most {max(differences)} of 255 levels from {reference}"
        print(f"  {name:<18} {rate:8.0f} images/s  {ratio:5.2f}{difference}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--large", action="store_true", help="only images above 100 kB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(file for file in args.folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    data = [file.read_bytes() for file in files if not args.large or file.stat().st_size > 100_000][: args.images]
    decoded = [decode(one) for one in data]
    draws = keyed_uniforms(0, CROP_STREAM, 0, np.arange(len(data)), 0, 4 * BOX_TRIES)
    boxes = [
        random_box(p.shape[1::-1], (0.08, 1.0), (3 / 4, 4 / 3), row) for p, row in zip(decoded, draws, strict=True)
    ]
    short = args.short_side
    resized: dict[str, Side] = {
        "whole": lambda one: resize_short_side(decode(one), short, "bilinear"),
        "reduced": lambda one: resize_short_side(decode(one, at_least=short), short, "bilinear"),
    }
    measure(f"{len(data)} JPEGs decoded", decoders(), data, args.rounds, "Pillow")
    measure(
        f"random crops to {args.size} px",
        resizers(args.size),
        list(zip(decoded, boxes, strict=True)),
        args.rounds,
        "Pillow",
    )
    measure(f"decoded and resized to a short side of {short}", resized, data, args.rounds, None)


if __name__ == "__main__":
    main()
