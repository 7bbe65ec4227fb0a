"""Makes JPEGs of many megapixels, for loader.py: photos of an image folder, side by side in their own size.

    python benchmarks/large_photos.py DIR OUT [--number 40] [--megapixels 24] [--quality 90]

DIR is an image folder with train/<class>/*.jpg, and so is OUT. The photos of one image are of one class. They are not
enlarged, so that the JPEGs have as much detail for each pixel, and as many bytes, as real photos.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def joined(photos: list[Path], width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Return photos drawn at random in rows, as many as fill the size."""
    canvas, top = Image.new("RGB", (width, height)), 0
    while top < height:
        left, tallest = 0, 1
        while left < width:
            photo = Image.open(photos[rng.integers(len(photos))]).convert("RGB")
            canvas.paste(photo, (left, top))
            left, tallest = left + photo.width, max(tallest, photo.height)
        top += tallest
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--number", type=int, default=40, help="of images")
    parser.add_argument("--megapixels", type=float, default=24.0)
    parser.add_argument("--quality", type=int, default=90)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    height = round((args.megapixels * 1e6 / 1.5) ** 0.5)  # 3 : 2, as cameras have it
    classes = sorted(path for path in (args.folder / "train").iterdir() if path.is_dir())
    for number in range(args.number):
        source = classes[number % len(classes)]
        target = args.out / "train" / source.name
        target.mkdir(parents=True, exist_ok=True)
        image = joined(sorted(source.glob("*.jpg")), height * 3 // 2, height, rng)
        image.save(target / f"{number}.jpg", quality=args.quality)
    sizes = [path.stat().st_size for path in args.out.glob("train/*/*.jpg")]
    print(f"{len(sizes)} JPEGs of {image.width} x {image.height} pixels, {sum(sizes) / len(sizes) / 1e6:.1f} MB each")


if __name__ == "__main__":
    main()
