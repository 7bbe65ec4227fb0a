"""Decodes JPEGs by libjpeg-turbo (simplejpeg), and decides which of its warnings mean that a JPEG is damaged.

libjpeg continues after most faults: it fills what is missing with grey and only warns. It reports its first warning
only, so damage after a harmless warning has to be detected in other ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from hf_fasttrain.utils.library_errors import jpeg_warning_kind

Pixels = np.ndarray  # (H, W, 3) uint8, contiguous
Encoded = bytes | memoryview
Decode = Callable[[Encoded, bool], Pixels]  # the flag: strict, raise ValueError for the first warning

JPEG_START = b"\xff\xd8\xff"

_JUNK, _END, _START_OF_SCAN = 0x00, 0xD9, 0xDA
_RESTART_INTERVAL, _APP0, _APP1, _APP14 = 0xDD, 0xE0, 0xE1, 0xEE
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_ARITHMETIC = range(0xC9, 0xCC)
_MARKER = re.compile(rb"\xff+[^\x00\xff]")
_ADOBE_TRANSFORMS = {
    3: (1, 0),
    4: (2, 0),
}  # by number of channels; libjpeg reads an unknown one as the first
_PROBE = b"\xfe" * 16  # libjpeg reads missing bytes as zeros; these are ones


class UnsupportedJpeg(Exception):
    """A JPEG of a kind that simplejpeg can't read; Pillow may."""


class Segment(NamedTuple):
    """A segment data[start:end] of a JPEG; data[payload:end] is the content after the marker."""

    marker: int  # 0 for bytes outside of any marker's segment
    start: int
    payload: int
    end: int


def decode_jpeg(data: Encoded, at_least: int = 0) -> Pixels:
    """Return the RGB pixels of a JPEG as stored, at 1/2, 1/4 or 1/8 of its size if both sides stay `at_least` long.

    Raises ValueError if it is damaged, UnsupportedJpeg, or Image.DecompressionBombError.
    """
    return _decode_strictly(data, lambda data, strict: _decode_rgb(data, at_least, strict))


def verify_jpeg(data: Encoded) -> None:
    """Raise what decode_jpeg would, in two thirds of its time."""
    _decode_strictly(data, _decode_preview)


def _decode_rgb(data: Encoded, at_least: int, strict: bool) -> Pixels:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=strict)
    _require_no_bomb(height, width)
    if colours in ("CMYK", "YCCK"):
        # Written inverted, as Adobe does and Pillow assumes; never reduced.
        inks = simplejpeg.decode_jpeg(data, "CMYK", strict=strict)
        return np.array(Image.frombuffer("CMYK", (width, height), inks, "raw", "CMYK;I", 0, 1).convert("RGB"))
    if not at_least:
        return simplejpeg.decode_jpeg(data, strict=strict)
    # Other factors, such as 3/8, would be slower than none: libjpeg-turbo has vector code for powers of two only.
    factor = next((k for k in (8, 4, 2) if min(height, width) >= k * at_least), 1)
    return simplejpeg.decode_jpeg(data, min_height=-(-height // factor), min_width=-(-width // factor), strict=strict)


def _decode_preview(data: Encoded, strict: bool) -> Pixels:
    """Return a grey image of an eighth of the size: the cheapest way to read everything that can cause a warning."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=strict)
    _require_no_bomb(height, width)
    return simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=strict)


def _require_no_bomb(height: int, width: int) -> None:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 2**63)
    if height * width > limit:
        raise Image.DecompressionBombError(f"{width} x {height} pixels are more than {limit:,}: a decompression bomb?")


def _decode_strictly(data: Encoded, decode: Decode) -> Pixels:
    try:
        return decode(data, True)
    except ValueError as error:
        kind, warning = jpeg_warning_kind(error), str(error)
    if kind == "unknown":
        raise UnsupportedJpeg(warning)
    if kind in ("truncated", "damaged"):
        raise ValueError(f"image file is truncated: {warning}" if kind == "truncated" else warning)
    normalized = normalize_header(data)
    if normalized is not data:
        return _decode_strictly(normalized, decode)
    if kind == "harmless" or _has_restarts(data):
        decode_complete(data, lambda data: _decode_rgb(data, 0, False))
    return decode(data, False)  # the last possible warning is about the end of the image


def _has_restarts(data: Encoded) -> bool:
    return any(segment.marker == _RESTART_INTERVAL for segment in _segments(data))


def decode_complete(data: Encoded, decode: Callable[[Encoded], Pixels]) -> Pixels:
    """Return the pixels of a JPEG from a lenient `decode`; raises ValueError if image data are missing.

    Detected by inserting bytes before the markers: a complete image never reads them, so its pixels do not change.
    Does not detect bad codes in the middle.
    """
    pixels = decode(data)
    segments = list(_all_segments(data))
    if any(segment.marker in _ARITHMETIC for segment in segments):
        return pixels  # arithmetic coding may omit zeros at the end
    _require_restarts_in_order(segments)
    parts, offset = [], 0
    for before, segment in pairwise(segments):
        if before.marker == _START_OF_SCAN or before.marker in _RESTARTS:
            parts += [data[offset : segment.start], _PROBE]
            offset = segment.start
    if not np.array_equal(pixels, decode(b"".join([*parts, data[offset:]]))):
        raise ValueError("Corrupt JPEG data: premature end of data segment")
    return pixels


def _require_restarts_in_order(segments: list[Segment]) -> None:
    number = 0
    for segment in segments:
        if segment.marker in _RESTARTS:
            expected = _RESTARTS[number % 8]
            if segment.marker != expected:
                raise ValueError(f"Corrupt JPEG data: found marker {segment.marker:#x} instead of {expected:#x}")
            number += 1
        elif segment.marker == _START_OF_SCAN:
            number = 0


def inspect_header(data: Encoded) -> tuple[bool, bool]:
    """Return whether the header has EXIF or XMP data, and whether it has bytes outside of any segment.

    Takes a microsecond or two for any size: it stops at the first bytes outside of a segment.
    """
    offset, end, has_exif = 2, len(data), False
    while offset + 4 <= end:
        marker = data[offset + 1]
        if data[offset] != 0xFF or marker == _JUNK:
            return has_exif, True
        if marker == _START_OF_SCAN:
            break
        if marker == 0xFF:  # padding
            offset += 1
        elif marker in _WITHOUT_LENGTH:
            offset += 2
        else:
            has_exif = has_exif or marker == _APP1
            offset += 2 + (data[offset + 2] << 8 | data[offset + 3])
    return has_exif, False


def normalize_header(data: Encoded) -> Encoded:
    """Return a JPEG with the same pixels and a header that causes no warnings; `data` itself if nothing changes.

    Removes bytes outside of any segment, which Pillow rejects, and replaces unknown versions of JFIF and of Adobe's
    color transform.
    """
    segments = list(_segments(data))
    channels = next((data[s.payload + 5] for s in segments if s.marker in _FRAMES and s.payload + 5 < s.end), 0)
    parts = [_normalize(s.marker, data[s.start : s.payload], data[s.payload : s.end], channels) for s in segments]
    header, end = b"".join(parts), segments[-1].end if segments else 2
    return data if header == data[2:end] else bytes(data[:2]) + header + bytes(data[end:])


def _normalize(marker: int, head: Encoded, payload: Encoded, channels: int) -> bytes:
    if marker == _JUNK:
        return b""
    content = bytes(payload)
    if marker == _APP0 and content[:5] == b"JFIF\0" and len(content) >= 14:
        content = content[:5] + b"\1" + content[6:]
    if marker == _APP14 and content[:5] == b"Adobe" and len(content) >= 12:
        known = _ADOBE_TRANSFORMS.get(channels, ())
        if known and content[11] not in known:
            content = content[:11] + bytes(known[:1]) + content[12:]
    return bytes(head) + content


def _segments(data: Encoded) -> Iterator[Segment]:
    """Yield the segments of the header, up to the start of the first scan."""
    for segment in _all_segments(data):
        yield segment
        if segment.marker == _START_OF_SCAN:
            return


def _all_segments(data: Encoded) -> Iterator[Segment]:
    """Yield all segments up to the end of the image, without the entropy-coded data after scans and restarts."""
    offset, in_scan = 2, False
    while found := _MARKER.search(data, offset):
        start, payload, marker = found.start(), found.end(), data[found.end() - 1]
        if start > offset and not in_scan:
            yield Segment(_JUNK, offset, offset, start)
        offset = payload
        if marker not in _WITHOUT_LENGTH and marker != _END:
            if payload + 2 > len(data):
                return
            offset = payload + max(2, data[payload] << 8 | data[payload + 1])
            payload += 2
        in_scan = marker == _START_OF_SCAN or (in_scan and marker in _RESTARTS)
        yield Segment(marker, start, payload, min(offset, len(data)))
        if marker == _END:
            return
