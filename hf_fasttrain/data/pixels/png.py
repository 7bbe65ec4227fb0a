"""PNG files as Pillow is given them: the chunks that pixels are made of, and only the first image of an animation.

Pillow reads texts and colour profiles first, and rejects images for long ones.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from hf_fasttrain.data.pixels.jpeg import Encoded
from hf_fasttrain.data.pixels.limits import require_parts

START = b"\x89PNG\r\n\x1a\n"
_NEEDED = {b"IHDR", b"PLTE", b"tRNS", b"IDAT"}
_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
_XMP, _RAW_EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"
_MAX_TEXT = 1 << 24  # bytes of a text that are inflated
_KEY = re.compile(rb"([^\0]{1,79})\0")
_LANGUAGE = re.compile(rb"[^\0]*\0[^\0]*\0")  # and the translated key


class Inspected(NamedTuple):
    """What is needed of a PNG."""

    parts: Sequence[Encoded]  # of the file, for Pillow
    exif: Encoded
    xmp: Encoded
    has_frames: bool


def inspect(data: Encoded) -> Inspected:
    """Return the parts of a PNG that make the pixels, and its EXIF and XMP data.

    Raises ValueError for a broken chunk before the image.
    """
    view, needed = memoryview(data), [(0, len(START))]
    exif, has_frames, in_image, is_behind = view[:0], False, False, False
    texts: dict[bytes, tuple[bytes, memoryview]] = {}
    for kind, start, end in _chunks(view):
        is_behind = is_behind or (in_image and kind != b"IDAT")
        in_image = in_image or kind == b"IDAT"
        if kind in _NEEDED and not is_behind:
            if needed[-1][1] == start:
                start = needed.pop()[0]
            needed.append((start, end))
            continue
        if not in_image:
            _require_checksum(view[start:end])
        content = view[start + 8 : end - 4]
        if kind == b"eXIf":
            exif = content
        elif kind == b"acTL":
            has_frames = int.from_bytes(content[:4], "big") > 1
        elif kind in _TEXTS and (key := _KEY.match(content)) and key[1] in (_XMP, _RAW_EXIF):
            texts[key[1]] = kind, content[key.end() :]
    if not in_image:
        raise ValueError("broken PNG file: no image data")
    parts = [view[start:end] for start, end in needed]
    return Inspected(parts, exif or _raw_exif(texts), _text(texts, _XMP), has_frames)


def _chunks(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk up to a broken one; its content is between 8 bytes and 4 of checksum."""
    place, number = len(START), 0
    while place + 8 <= len(view):
        kind = bytes(view[place + 4 : place + 8])
        if kind == b"IEND" or not kind.isalpha():
            return
        end = min(len(view), place + 12 + int.from_bytes(view[place : place + 4], "big"))
        yield kind, place, end
        place = end
        number += 1
        require_parts(number, "chunks")


def _require_checksum(chunk: memoryview) -> None:
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        raise ValueError(f"broken PNG file (bad checksum of its chunk {bytes(chunk[4:8])!r})")


def _raw_exif(texts: dict[bytes, tuple[bytes, memoryview]]) -> bytes:
    """Return EXIF data written as hexadecimal text behind three lines, as ImageMagick does."""
    lines = _text(texts, _RAW_EXIF).split(b"\n")[3:]
    with suppress(ValueError):
        return bytes.fromhex(b"".join(lines).decode("latin-1"))
    return b""


def _text(texts: dict[bytes, tuple[bytes, memoryview]], key: bytes) -> bytes:
    """Return the text of a key, as far as it is inflated; empty if there is none."""
    kind, content = texts.get(key, (b"tEXt", memoryview(b"")))
    is_deflated = kind == b"zTXt"
    if kind == b"iTXt" and (language := _LANGUAGE.match(content, 2)):
        is_deflated, content = content[0] != 0, content[language.end() :]
    elif kind == b"zTXt":
        content = content[1:]
    if not is_deflated:
        return bytes(content)
    with suppress(zlib.error):
        return zlib.decompressobj().decompress(content, _MAX_TEXT)
    return b""
