"""Damages images of every format at random and decodes them: each must give pixels, or be a bad image with a reason.

    python tests/fuzz_images.py [--count 10000] [--seed N] [--keep FOLDER]

Nothing else may come of an image: no other exception, more than 2 GiB of memory or 20 s, a file that is opened for
writing, a program that is started, a word that is printed. Processes of their own decode 500 inputs each. What went
wrong is kept in a folder. `data/pixels/test_odd_images.py` runs a short form of it.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from helpers.damaged_images import drawn_photo, exif, images_of_all_formats, save
from PIL import Image, PngImagePlugin

from hf_fasttrain.data.pixels.augment import EvalTransform
from hf_fasttrain.data.pixels.decode import image_size_of, inspect, read_pixels
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.pixels.rgb import ValueRange
from hf_fasttrain.utils.errors import ImageError

MOST_MEMORY, MOST_SECONDS = 2 << 30, 20.0  # bytes of a process; of its processor's time for an image
SIZES = (0, 1, 2, 255, 256, 4096, 13_300, 30_000, 65_535, 65_536, 1 << 20, 1 << 24, 2**31 - 1, 2**31, 2**32 - 1)
IN_A_PROCESS = 500
WAYS: dict[str, Callable[[bytes], Any]] = {
    "as they are": lambda data: read_pixels(data),
    "by Pillow": lambda data: read_pixels(data, pillow=True),
    "reduced": lambda data: read_pixels(data, at_least=8),
    "of a range": lambda data: read_pixels(data, value_range=ValueRange(0, 4095)),
    "for evaluation": Preparation(center=EvalTransform(32)).encoded,
    "stored": Preparation(short_side=16, stored_quality=90).encoded,
    "header": lambda data: (inspect(data), image_size_of({"bytes": data})),
}


@cache
def sound_images() -> dict[str, bytes]:
    """Return small images of every format that is read, in many of its forms."""
    photo = drawn_photo(1, 40, 32)
    grey, text = np.asarray(photo.convert("L")), PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="5"/>', zip=True)
    text.add_text("Comment", "long " * 500, zip=True)
    found = images_of_all_formats(photo)
    for mode in ("1", "LA", "P", "RGBA", "CMYK", "LAB", "YCbCr"):
        found[f"TIFF, {mode}"] = save(photo.convert(mode), "TIFF")
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[f"TIFF, {name}, BigTIFF"] = save(photo, "TIFF", compression=name, big_tiff=True)
    return found | {
        "TIFF, fax": save(photo.convert("1"), "TIFF", compression="group4"),
        "TIFF, strips": save(photo, "TIFF", strip_size=300, compression="tiff_lzw"),
        "TIFF, pages": save(photo, "TIFF", save_all=True, append_images=[photo, photo]),
        "TIFF, floats": save(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "TIFF, integers": save(Image.fromarray(grey.astype(np.int32)), "TIFF", compression="tiff_adobe_deflate"),
        "TIFF, rotated": save(photo, "TIFF", exif=exif(7)),
        "PNG, texts": save(photo, "PNG", pnginfo=text, exif=exif(3)),
        "PNG, palette, alpha": save(photo.quantize(16), "PNG", transparency=bytes(range(16))),
        "GIF, animated": save(photo, "GIF", save_all=True, append_images=[photo.rotate(90)], comment=b"text" * 90),
        "WebP, animated": save(photo, "WEBP", save_all=True, append_images=[photo.rotate(90)], exif=exif(6)),
        "JPEG, several pages": save(photo, "MPO", save_all=True, append_images=[photo.rotate(90)]),
        "JPEG, 4:4:4": save(photo, quality=95, subsampling=0, comment=b"\xff\xda"),
        "JPEG 2000, codestream": save(photo.convert("L"), "JPEG2000", no_jp2=True, tile_size=(16, 16)),
        "JPEG 2000, 16-bit": save(Image.fromarray(grey.astype(np.uint16) * 257), "JPEG2000"),
        "BMP, palette": save(photo.quantize(16), "BMP"),
        "BMP, run-length": _run_length_bmp(),
        "PGM, 16-bit": save(Image.fromarray(grey.astype(np.uint16) * 257), "PPM"),
        "PGM, 12-bit": b"P5\n# scan\n40 32\n4095\n" + (grey.astype(">u2") * 16).tobytes(),
        "PGM, text": b"P2 40 32 255\n" + b" ".join(b"%d" % value for value in grey.ravel()),
        "PBM": save(photo.convert("1"), "PPM"),
        "PBM, text": b"P1 40 32\n" + b"".join(b"%d" % (value > 99) for value in grey.ravel()),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 32\nshowpage\n",
        "AVIF's name": b"\0\0\0\x20ftypavif" + bytes(40),
        "ICO": struct.pack("<HHHBBBBHHII", 0, 1, 1, 40, 32, 0, 0, 1, 32, 40, 22) + bytes(40),
    }


def _run_length_bmp() -> bytes:
    palette = b"".join(bytes((level, 255 - level, 7, 0)) for level in range(256))
    head = struct.pack("<IiiHHIIiiII", 40, 40, 32, 1, 8, 1, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + len(palette)) + head + palette + (b"\x28\x05\0\0" * 32) + b"\0\1"


def damaged(rng: random.Random) -> tuple[str, bytes]:
    """Return what was done to which image, and its bytes."""
    images = sound_images()
    name = rng.choice(list(images))
    data, changes = bytearray(images[name]), []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        change = rng.choice(CHANGES)
        change(data, rng)
        changes.append(change.__name__.strip("_"))
    if name.startswith("PNG") and rng.random() < 0.7:
        data = _with_checksums(data)  # else most changes end there
        changes.append("checksums")
    return f"{name}: {', '.join(changes)}", bytes(data)


def _byte(data: bytearray, rng: random.Random) -> None:
    if data:
        data[_place(data, rng)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def _number(data: bytearray, rng: random.Random) -> None:
    place, form = _place(data, rng), rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(form)
    if place + size <= len(data):
        struct.pack_into(form, data, place, rng.choice(SIZES) % (1 << 8 * size))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _without(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    del data[place : place + rng.choice((1, 2, 4, 12, 100))]


def _repeated(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    data[place:place] = data[place : place + rng.choice((1, 4, 12, 60))] * rng.choice((1, 3, 50, 2000))


def _inserted(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    data[place:place] = rng.randbytes(rng.choice((1, 2, 5, 40)))


def _other(data: bytearray, rng: random.Random) -> None:
    """Replace a part by one of another image."""
    other = rng.choice(list(sound_images().values()))
    place, start = _place(data, rng), rng.randrange(len(other))
    data[place : place + 80] = other[start : start + rng.choice((4, 40, 400))]


def _marker(data: bytearray, rng: random.Random) -> None:
    """Change a marker of a JPEG or JPEG 2000, or what follows it."""
    found = [place for place in range(len(data) - 3) if data[place] == 0xFF and data[place + 1]]
    if found:
        data[rng.choice(found) + rng.choice((1, 2, 3))] = rng.choice((0xC0, 0xC2, 0xDA, 0xD0, 0x52, rng.randrange(256)))


CHANGES = (_byte, _byte, _number, _number, _cut, _without, _repeated, _inserted, _other, _marker)


def _place(data: bytearray, rng: random.Random) -> int:
    """Return a place, most often in the header."""
    return rng.randrange(max(1, min(len(data), rng.choice((32, 200, 200, 1 << 20)))))


def _with_checksums(data: bytearray) -> bytearray:
    place = 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return data


class Watch:
    """Records what decoding does to the outside, as Python's audit events tell it."""

    EVENTS = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "socket.")
    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def __init__(self) -> None:
        self.is_on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.is_on and (event.startswith(self.EVENTS) or (event == "open" and args[2] & self.WRITES)):
            self.seen.append(f"{event} {args}")


def problem_of(data: bytes, way: str, watch: Watch) -> tuple[str, str]:
    """Return what became of an image (pixels, or the start of the reason) and what was wrong with that, if anything."""
    start, watch.is_on, watch.seen = time.process_time(), True, []
    try:
        WAYS[way](data)
        outcome, problem = "pixels", ""
    except ImageError as error:
        outcome, problem = "bad", "" if error.reason.strip() else "no reason"
    except Exception as error:  # noqa: BLE001 - that there is any is what is looked for
        is_header = way == "header" and type(error).__name__ != "MemoryError"
        outcome, problem = "bad", "" if is_header else f"{type(error).__name__}: {error}"
    watch.is_on = False
    seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if memory > MOST_MEMORY:
        problem = f"{memory >> 20} MiB"
    elif seconds > MOST_SECONDS:
        problem = f"{seconds:.0f} s"
    return outcome, problem or "; ".join(watch.seen)


def inputs(seed: int, first: int, number: int) -> Iterator[tuple[int, str, bytes, str]]:
    """Yield (number, description, bytes, way to decode) of damaged images."""
    for index in range(first, first + number):
        rng = random.Random(f"{seed} {index}")
        description, data = damaged(rng)
        yield index, description, data, rng.choice(list(WAYS))


def fuzz(seed: int, first: int, number: int, keep: Path, watch: Watch) -> Counter[str]:
    """Decode damaged images, print and keep those that went wrong, and return how many gave what."""
    counts: Counter[str] = Counter()
    for index, description, data, way in inputs(seed, first, number):
        outcome, problem = problem_of(data, way, watch)
        counts["wrong" if problem else outcome] += 1
        if problem:
            (keep / f"{seed}_{index}.bin").write_bytes(data)
            print(f"{index}: {description}; {way}: {problem}", flush=True)
    return counts


def _run_part(seed: int, first: int, number: int, keep: Path) -> None:
    """Decode in this process, and end with a line of counts; whatever else is printed is a mistake of the decoder."""
    counts = fuzz(seed, first, number, keep, Watch())
    print("counts", *(f"{name}={count}" for name, count in counts.items()), flush=True)


def main() -> None:
    """Print the seed, what went wrong, and the counts; exit status 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--part", type=int, nargs=2, help=argparse.SUPPRESS)  # first and number, in this process
    args = parser.parse_args()
    keep = args.keep or Path(tempfile.mkdtemp(prefix="fuzz_images_"))
    keep.mkdir(exist_ok=True)
    if args.part:
        _run_part(args.seed, *args.part, keep)
        return
    print(f"seed {args.seed}", flush=True)
    counts, wrong = Counter[str](), 0
    for first in range(0, args.count, IN_A_PROCESS):
        number = min(IN_A_PROCESS, args.count - first)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--seed", str(args.seed), "--keep", str(keep.resolve())]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            part = [*command, "--part", str(first), str(number)]
            done = subprocess.run(part, cwd=folder, env=env, capture_output=True, text=True, errors="replace")
            left = os.listdir(folder)
        lines = done.stdout.splitlines()
        ended = bool(lines) and lines[-1].startswith("counts")
        pairs = [pair.split("=") for pair in lines.pop().split()[1:]] if ended else []
        counts.update({name: int(count) for name, count in pairs})
        problems = [*lines, *done.stderr.splitlines(), *(f"file {name}" for name in left)]
        problems += [] if ended else [f"the process ended with status {done.returncode}"]
        for problem in problems:
            print(f"of inputs from {first} on: {problem}", flush=True)
        wrong += len(problems)
    print(f"{args.count} inputs, seed {args.seed}: {dict(counts)}; {wrong} lines of what went wrong; kept in {keep}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
