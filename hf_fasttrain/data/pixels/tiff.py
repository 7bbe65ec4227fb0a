"""TIFF files as Pillow is given them: the first page, without its metadata, and no larger inside than it may be."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np

from hf_fasttrain.data.pixels.ifd import Entry, Layout, entries, first_number, layout_of
from hf_fasttrain.data.pixels.jpeg import Encoded, UnsupportedJpeg, require_decodable
from hf_fasttrain.data.pixels.limits import MAX_SCAN_PIXELS, UnusableImage, require_parts
from hf_fasttrain.data.pixels.orientation import ORIENTATION, UPRIGHT, orientation_of, valid_orientation
from hf_fasttrain.data.pixels.spliced import Spliced

BITS, COMPRESSION, JPEG_TABLES = 258, 259, 347
JPEG, DEFLATE = 7, (8, 32946)
_RAW, _OLD_JPEG = 1, 6
_WHOLE_PARTS = (34887, 50001)  # LERC and WebP, which libtiff decodes to memory of their own
_COLOURS, _YCBCR = 262, 6
_SAMPLES, _ROWS_PER_STRIP, _PLANES, _XMP = 277, 278, 284, 700
_STRIP_OFFSETS, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS = 273, 322, 323, 324
DATA_TAGS = ((273, 279), (324, 325))  # offsets and lengths: of strips, of tiles
_TEXTS = {270, 271, 272, 285, 305, 306, 315, 316}
# What the pixels depend on: size, layout, compression, palette, and the private tags of codecs.
_NEEDED = {
    *range(254, 348),
    *range(512, 522),
    *range(529, 533),
    *(32997, 32998, 50674),
} - {*_TEXTS, ORIENTATION, 330}  # 330: further directories
_SINGLE_BYTES = {1, 2, 6, 7}  # types whose values Pillow does not make numbers of


def first_page(data: Encoded) -> tuple[Spliced, int, bool]:
    """Return a TIFF's first page alone, its orientation, and whether there are more pages.

    Raises SyntaxError for what is no TIFF, UnusableImage for a directory with more values than an image may need.
    """
    layout = layout_of(data)
    if layout is None:
        raise SyntaxError("not a TIFF file")
    found: dict[int, Entry] = {}
    for entry in entries(data, layout):
        found.setdefault(entry.tag, entry)
    needed = [entry for tag, entry in sorted(found.items()) if tag in _NEEDED]
    for entry in needed:
        if entry.type not in _SINGLE_BYTES:
            require_parts(entry.number, "strips, tiles or colours")
    return _with_directory(data, layout, needed), _orientation(data, layout, found), _has_more(data, layout)


def _with_directory(data: Encoded, layout: Layout, needed: list[Entry]) -> Spliced:
    """Return the file with a directory of the needed entries behind it, in place of its own."""
    place = len(data) + (len(data) & 1)
    directory = struct.pack(layout.count_format, len(needed)) + b"".join(entry.raw for entry in needed)
    end = struct.pack(layout.offset_format, 0)
    where = 8 if layout.is_big else 4
    head = bytes(data[:where]) + struct.pack(layout.offset_format, place)
    return Spliced([head, memoryview(data)[len(head) :], bytes(len(data) & 1), directory + end])


def _orientation(data: Encoded, layout: Layout, found: dict[int, Entry]) -> int:
    if ORIENTATION in found:
        return valid_orientation(first_number(data, layout, found[ORIENTATION]))
    if _XMP in found:
        return orientation_of(xmp=memoryview(data)[found[_XMP].start : found[_XMP].end])
    return UPRIGHT


def _has_more(data: Encoded, layout: Layout) -> bool:
    """Return whether another directory follows the first one."""
    with suppress(struct.error):
        (number,) = struct.unpack_from(layout.count_format, data, layout.first)
        size = struct.calcsize(layout.count_format) + number * struct.calcsize(layout.entry_format)
        return bool(struct.unpack_from(layout.offset_format, data, layout.first + size)[0])
    return False


def tiff_memory(image: Any, data: Encoded) -> float:
    """Return the bytes that libtiff and a copy of the file take while an opened TIFF is decoded.

    Raises UnusableImage or ValueError for strips and tiles that are more, or longer, than the image has room for.
    """
    tags = image.tag_v2
    width, height = image.size
    planes = tags.get(_SAMPLES, 1) if tags.get(_PLANES, 1) == 2 else 1
    strip = width, min(height, tags.get(_ROWS_PER_STRIP, height))
    tile = tags.get(_TILE_WIDTH, width), tags.get(_TILE_HEIGHT, height)
    if min(*strip, *tile) < 1:
        raise ValueError("strips or tiles without pixels")
    is_tiled = _TILE_OFFSETS in tags and _STRIP_OFFSETS not in tags
    part = tile if is_tiled else strip
    room_for = -(-width // part[0]) * -(-height // part[1]) * planes
    starts, lengths = _parts(tags, len(data))
    if len(starts) > 2 * room_for + 16 or lengths.sum() > 4 * len(data):
        raise ValueError(f"{len(starts):,} strips or tiles overlap, in an image with room for {room_for:,}")
    if tags.get(COMPRESSION, _RAW) == _RAW:
        return 0
    _require_few_scans(image, data, zip(starts.tolist(), lengths.tolist(), strict=False))
    stored = int(np.max(tags.get(BITS, (1,)))) / 8 * (1 if planes > 1 else tags.get(_SAMPLES, 1))
    codecs_own = stored if tags.get(COMPRESSION) in (JPEG, _OLD_JPEG, *_WHOLE_PARTS) else 0
    converted = 4 if tags.get(_COLOURS) == _YCBCR else 0
    area = max(strip[0] * strip[1], tile[0] * tile[1] if _TILE_WIDTH in tags else 0)
    return len(data) + area * (stored + codecs_own + converted)


def _parts(tags: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of the strips or tiles, and their lengths as far as they are given and within the file."""
    for offsets, lengths in DATA_TAGS:
        if offsets in tags:
            starts, given = (np.array(tags.get(tag, ()), np.uint64).reshape(-1) for tag in (offsets, lengths))
            starts = np.minimum(starts, size)
            number = min(len(starts), len(given))
            return starts, np.minimum(given[:number], size - starts[:number])
    return np.zeros(0, np.uint64), np.zeros(0, np.uint64)


def _require_few_scans(image: Any, data: Encoded, parts: Iterable[tuple[int, int]]) -> None:
    """Raise UnusableImage if the JPEGs in a TIFF have too many scans altogether."""
    if image.tag_v2.get(COMPRESSION) not in (JPEG, _OLD_JPEG):
        return
    total = 0
    for start, length in parts:
        with suppress(UnsupportedJpeg):
            total += require_decodable(jpeg_part(image.tag_v2, data, start, length))
        if total > MAX_SCAN_PIXELS:
            raise UnusableImage("it has too many scans", "re-encode it")


def declared_maximum(image: Any) -> float | None:
    """Return the largest value that a grey TIFF of fewer than 16 bits can have, which Pillow reads as 16-bit."""
    if image.format != "TIFF" or not image.mode.startswith("I;16"):
        return None
    bits = int(np.max(image.tag_v2.get(BITS, (16,))))
    return 2.0**bits - 1 if 8 < bits < 16 else None


def jpeg_part(tags: Any, data: Encoded, start: int, length: int) -> Encoded:
    """Return one of the JPEGs that a TIFF is made of, with the tables that are common to all, a JPEG without image."""
    part, tables = data[start : start + length], tags.get(JPEG_TABLES, b"")
    return tables[:-2] + bytes(part[2:]) if tables else part
