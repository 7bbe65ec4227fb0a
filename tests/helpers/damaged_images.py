"""How much damage is found, and whether intact photos pass: the long form of test_integrity.py.

    python -m tests.helpers.damaged_images [--folder PHOTOS] [--photos 10] [--flips 300]

Makes about 60 unusual but intact JPEGs of each photo (of a folder, or generated) and counts how many each decoder
refuses. Then changes one byte at a time in images of each format and prints which fraction is refused, is decoded
unchanged, or is decoded to other pixels: most formats have no checksums.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from hf_fasttrain.data.pixels.decode import DECODING_ERRORS, decode, read_pixels
from hf_fasttrain.utils.errors import DataError

ORIENTATION = 0x0112  # EXIF
END = b"\xff\xd9"
VISIBLE = 8  # of 255 levels


def drawn_photo(seed: int, width: int = 88, height: int = 72) -> Image.Image:
    """Return a smooth colour picture without black."""
    rng = np.random.default_rng(seed)
    small = rng.integers(30, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """Return an image's encoded bytes."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def segment(marker: int, payload: bytes) -> bytes:
    """Return a segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def adobe(transform: int) -> bytes:
    """Return the marker of a JPEG's colour transform."""
    return segment(0xEE, b"Adobe" + bytes([0, 100, 0, 0, 0, 0, transform]))


def exif(orientation: int) -> Image.Exif:
    """Return EXIF data."""
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


def without_jfif(data: bytes) -> bytes:
    """Return a JPEG without its JFIF segment."""
    return data[:2] + data[20:] if data[6:10] == b"JFIF" else data


def sound_jpegs(photo: Image.Image, seed: int = 0) -> dict[str, bytes]:
    """Return unusual JPEGs of a photo, none of them damaged."""
    plain, restarts = save(photo, quality=90), save(photo, restart_marker_blocks=2)
    pixels, profile = np.asarray(photo), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    thumbnail = save(photo.resize((24, 20)))
    random_bytes = np.random.default_rng(seed).integers(0, 255, 37, dtype=np.uint8).tobytes()
    cmyk = save(photo.convert("CMYK"))
    jpegs = {
        "plain": plain,
        "progressive": save(photo, progressive=True),
        "optimized": save(photo, optimize=True, quality=35),
        "best": save(photo, quality=100, subsampling=0),
        "grey": save(photo.convert("L")),
        "CMYK": cmyk,
        "progressive CMYK": save(photo.convert("CMYK"), progressive=True),
        "rotated CMYK": save(photo.convert("CMYK"), exif=exif(6)),
        "CMYK without Adobe's marker": cmyk.replace(cmyk[cmyk.index(b"\xff\xee") :][:16], b"", 1),
        "YCCK": cmyk.replace(cmyk[cmyk.index(b"\xff\xee") :][:16], adobe(2), 1),
        "RGB": save(photo, keep_rgb=True),
        "Adobe RGB": without_jfif(plain)[:2] + adobe(0) + without_jfif(plain)[2:],
        "Adobe YCbCr": without_jfif(plain)[:2] + adobe(1) + without_jfif(plain)[2:],
        "unknown Adobe transform": without_jfif(plain)[:2] + adobe(9) + without_jfif(plain)[2:],
        "unknown Adobe transform, CMYK": cmyk.replace(cmyk[cmyk.index(b"\xff\xee") :][:16], adobe(7), 1),
        "neither JFIF nor Adobe": without_jfif(plain),
        "JFIF of the future": plain.replace(b"JFIF\0\1", b"JFIF\0\3"),
        "restart markers": restarts,
        "restart markers in each row": save(photo, restart_marker_rows=1),
        "progressive with restart markers": save(photo, progressive=True, restart_marker_rows=1),
        "colour profile": save(photo, icc_profile=profile),
        "broken colour profile": save(photo, icc_profile=random_bytes),
        "long profile": save(photo, icc_profile=b"x" * 140_000),
        "comment": save(photo, comment=b"\xff\xd9 a flower \xff\xda"),
        "resolution": save(photo, dpi=(300, 300)),
        "several pages": save(photo, "MPO", save_all=True, append_images=[photo.rotate(180)]),
        "EXIF thumbnail": plain[:2] + segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail) + plain[2:],
        "broken EXIF": plain[:2] + segment(0xE1, b"Exif\0\0" + random_bytes) + plain[2:],
        "rotated by XMP": save(photo, xmp=b'<x><rdf:Description tiff:Orientation="6"/></x>'),
        "unknown segments": plain[:2]
        + segment(0xEB, random_bytes)
        + segment(0xED, b"Photoshop 3.0\0" + random_bytes)
        + plain[2:],
        "thumbnail in an APP segment": plain[:2] + segment(0xE5, thumbnail) + plain[2:],
        "padding before markers": re.sub(rb"\xff(?=[\xc0\xc4\xdb\xda])", b"\xff" * 3, plain, count=4),
        "padding before the end": plain[:-2] + b"\xff\xff\xff" + END,
        "bytes before the end": plain[:-2] + random_bytes + END,
        "zeros before the end": plain[:-2] + bytes(512) + END,
        "bytes before the end, restarts": restarts[:-2] + random_bytes + END,
        "bytes before the end, CMYK": cmyk[:-2] + random_bytes + END,
        "bytes before the end, rotated": save(photo, exif=exif(8))[:-2] + random_bytes + END,
        "bytes before a restart": restarts.replace(b"\xff\xd0", b"abc\xff\xd0", 1),
        "bytes between segments": plain[:20] + random_bytes.replace(b"\xff", b"") + plain[20:],
        "thumbnail behind": plain + thumbnail,
        "trailing bytes": plain + random_bytes,
        "trailing zeros": plain + bytes(4096),
        "trailing text": plain + b"SEFHe\0\0\0SEFT",
        "trailing video": plain + b"\0\0\0\x18ftypmp42" + random_bytes * 40,
        "half an image behind": plain + plain[: len(plain) // 2],
        "trailing bytes, rotated": save(photo, exif=exif(6)) + random_bytes,
        "trailing bytes, CMYK": cmyk + random_bytes,
        "one pixel": save(photo.resize((1, 1))),
        "one row": save(photo.resize((50, 1))),
        "odd size": save(photo.resize((51, 37)), subsampling=1),
    }
    for sampling in ("444", "422", "420", "440", "411"):
        jpegs[f"sampled {sampling}"] = simplejpeg.encode_jpeg(pixels, colorsubsampling=sampling)
    for orientation in (*range(1, 9), 0, 99):
        jpegs[f"orientation {orientation}"] = save(photo, exif=exif(orientation))
    return jpegs


def refused_jpegs(jpegs: dict[str, bytes]) -> list[str]:
    """Return the JPEGs that are refused, or decoded differently by the two decoders, with the reason."""
    wrong = []
    for name, data in jpegs.items():
        try:
            ours, theirs = (decode(data, pillow=pillow) for pillow in (False, True))
            decode(data, at_least=20)
        except DECODING_ERRORS as error:
            wrong.append(f"{name}: {error!r}")
        else:
            if not np.array_equal(ours, theirs):
                wrong.append(f"{name}: other pixels by Pillow")
    return wrong


def adam7_png(pixels: np.ndarray) -> bytes:
    """Return an interlaced PNG in chunks of 2 kB, which Pillow can't write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [row for y, x, dy, dx in passes for row in pixels[y::dy, x::dx]]
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    parts = [chunk(b"IDAT", packed[offset : offset + 2048]) for offset in range(0, len(packed), 2048)]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(parts) + chunk(b"IEND", b"")


def images_of_all_formats(photo: Image.Image) -> dict[str, bytes]:
    """Return a photo in each format."""
    grey = np.asarray(photo.convert("L"))
    second = photo.rotate(180)
    return {
        "PNG": save(photo, "PNG"),
        "PNG with alpha": save(photo.convert("RGBA"), "PNG"),
        "PNG with palette": save(photo.convert("P"), "PNG"),
        "PNG, 16-bit": save(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "PNG, interlaced": adam7_png(np.asarray(photo)),
        "PNG, animated": save(photo, "PNG", save_all=True, append_images=[second]),
        "TIFF": save(photo, "TIFF"),
        "TIFF, deflate": save(photo, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF, LZW": save(photo, "TIFF", compression="tiff_lzw"),
        "TIFF, packbits": save(photo, "TIFF", compression="packbits"),
        "TIFF, JPEG": save(photo, "TIFF", compression="jpeg"),
        "GIF": save(photo, "GIF"),
        "JPEG 2000": save(photo, "JPEG2000"),
        "WebP": save(photo, "WEBP"),
        "WebP, lossless": save(photo, "WEBP", lossless=True),
        "BMP": save(photo, "BMP"),
        "PPM": save(photo, "PPM"),
        "JPEG": save(photo),
        "JPEG, grey": save(photo.convert("L")),
        "JPEG, CMYK": save(photo.convert("CMYK")),
        "JPEG, rotated": save(photo, exif=exif(6)),
        "JPEG, progressive": save(photo, progressive=True),
        "JPEG, restart markers": save(photo, restart_marker_blocks=4),
    }


def with_one_byte_changed(data: bytes, number: int, seed: int = 0) -> Iterator[bytes]:
    """Yield an image's bytes `number` times with one byte changed, except in the first ten."""
    rng = np.random.default_rng(seed)
    for offset, change in zip(rng.integers(10, len(data), number), rng.integers(1, 256, number), strict=True):
        yield data[:offset] + bytes([data[offset] ^ int(change)]) + data[offset + 1 :]


def outcome(data: bytes, original: np.ndarray) -> str:
    """Return the outcome for a damaged image: refused, unchanged, or the fraction of changed pixels."""
    try:
        pixels = read_pixels(data)
    except DataError:
        return "refused"
    if pixels.shape != original.shape:
        return "other size"
    share = (np.abs(pixels.astype(int) - original) > VISIBLE).any(2).mean()
    return "same" if not share else "under 1 %" if share < 0.01 else "more"


def _photos(folder: Path | None, number: int) -> Iterator[Image.Image]:
    if folder is None:
        yield from (drawn_photo(seed, 176, 144) for seed in range(number))
        return
    for path in sorted(folder.rglob("*.jpg"))[:number]:
        with Image.open(path) as image:
            yield image.convert("RGB").resize((320, 240))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--photos", type=int, default=10)
    parser.add_argument("--flips", type=int, default=300)
    args = parser.parse_args()
    photos = list(_photos(args.folder, args.photos))
    number, wrong = 0, []
    for seed, photo in enumerate(photos):
        jpegs = sound_jpegs(photo, seed)
        number += len(jpegs)
        wrong += refused_jpegs(jpegs)
    print(f"{number} sound JPEGs: {len(wrong)} refused or decoded differently", *wrong, sep="\n  ")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes there
    for name, data in images_of_all_formats(photos[0]).items():
        original = read_pixels(data)
        counts = Counter(outcome(changed, original) for changed in with_one_byte_changed(data, args.flips))
        shares = ", ".join(f"{kind} {count / args.flips:.0%}" for kind, count in counts.most_common())
        print(f"{name}, one byte of {len(data):,} changed: {shares}")


if __name__ == "__main__":
    main()
