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

from hf_fasttrain.data.pixels.limits import (
    MAX_SCAN_PIXELS,
    UnusableImage,
    require_memory,
    require_parts,
    require_pixels,
)
from hf_fasttrain.utils.library_errors import jpeg_warning_kind

Pixels = np.ndarray  # (H, W, 3) uint8, contiguous
Encoded = bytes | memoryview
Decode = Callable[[Encoded, bool], Pixels]  # the flag: strict, raise ValueError for the first warning

JPEG_START = b"\xff\xd8\xff"

_JUNK, _END, _START_OF_SCAN = 0x00, 0xD9, 0xDA
_RESTART_INTERVAL, _APP0, _APP1, _APP2, _APP14 = 0xDD, 0xE0, 0xE1, 0xE2, 0xEE
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_METADATA = {*range(0xE1, 0xF0), 0xFE} - {_APP14}  # APP1 to APP15 without Adobe's, and comments
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_ARITHMETIC = range(0xC9, 0xCC)
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_PADDING = re.compile(rb"\xff+")
_ADOBE_TRANSFORMS = {
    3: (1, 0),
    4: (2, 0),
}  # by number of channels; libjpeg reads an unknown one as the first
_PROBE = b"\xfe" * 16  # libjpeg reads missing bytes as zeros; these are ones
_BAND = 1 << 22  # values that are compared at a time
# At least one bit for each 8x8 block of one channel, or of two that are each halved in another direction.
_MAX_PIXELS_PER_BYTE = 2048


class UnsupportedJpeg(Exception):
    """A JPEG of a kind that simplejpeg can't read; Pillow may."""


class Segment(NamedTuple):
    """A segment data[start:end] of a JPEG; data[payload:end] is the content after the marker."""

    marker: int  # 0 for bytes outside of any marker's segment
    start: int
    payload: int
    end: int

    @property
    def first(self) -> int:
        """Where the segment starts without the padding before its marker."""
        length = 0 if self.marker in _WITHOUT_LENGTH or self.marker == _END else 2
        return self.start if self.marker == _JUNK else self.payload - 2 - length


class Frame(NamedTuple):
    """The frame of a JPEG: what it claims to be."""

    marker: int
    width: int
    height: int
    channels: tuple[int, ...]  # samples of each channel in a unit of the image

    def memory(self, images: int, *, has_scans: bool) -> float:
        """Return the bytes for each pixel that decoding takes, with a number of decoded images at a time."""
        inks = 4 if len(self.channels) == 4 else 0
        coefficients = 2 * sum(self.channels) / max(self.channels, default=1) if has_scans else 0
        return 3 * images + inks + coefficients


class JpegHeader(NamedTuple):
    """What is known of a JPEG before it is decoded."""

    has_exif: bool  # or XMP
    has_junk: bool  # bytes outside of any segment; what follows them has not been inspected
    frame: Frame | None = None
    has_scans: bool = False  # more than one, so that all coefficients are held in memory


def decode_jpeg(data: Encoded, at_least: int = 0) -> Pixels:
    """Return the RGB pixels of a JPEG as stored, at 1/2, 1/4 or 1/8 of its size if both sides stay `at_least` long.

    Raises ValueError if it is damaged or too large, or UnsupportedJpeg.
    """
    return _decode_strictly(data, lambda data, strict: _decode_rgb(data, at_least, strict))


def verify_jpeg(data: Encoded) -> None:
    """Raise what decode_jpeg would, in two thirds of its time."""
    _decode_strictly(data, _decode_preview)


def _decode_rgb(data: Encoded, at_least: int, strict: bool) -> Pixels:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=strict)
    if colours in ("CMYK", "YCCK"):
        return _from_inks(simplejpeg.decode_jpeg(data, "CMYK", strict=strict))  # never reduced
    if not at_least:
        return simplejpeg.decode_jpeg(data, strict=strict)
    factor = reduction(width, height, at_least)
    return simplejpeg.decode_jpeg(data, min_height=-(-height // factor), min_width=-(-width // factor), strict=strict)


def reduction(width: int, height: int, at_least: int) -> int:
    """Return by what a JPEG of this size is divided when it is decoded: 8, 4, 2 or 1; both sides stay `at_least` long.

    Other factors, such as 3/8, would be slower than none: libjpeg-turbo has vector code for powers of two only.
    """
    return next((k for k in (8, 4, 2) if at_least and min(height, width) >= k * at_least), 1)


def _from_inks(inks: np.ndarray) -> Pixels:
    """Return the RGB pixels of CMYK values (H, W, 4), which are inverted, as Adobe writes them and Pillow assumes."""
    height, width = inks.shape[:2]
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND // (4 * width))
    for top in range(0, height, rows):
        band = inks[top : top + rows]
        image = Image.frombuffer("CMYK", (width, len(band)), band, "raw", "CMYK;I", 0, 1)
        pixels[top : top + rows] = np.asarray(image.convert("RGB"))
    return pixels


def _decode_preview(data: Encoded, strict: bool) -> Pixels:
    """Return a grey image of an eighth of the size: the cheapest way to read everything that can cause a warning."""
    return simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=strict)


def require_decodable(data: Encoded, *, images: int = 1, pillow: bool = False) -> int:
    """Raise ValueError for a JPEG that claims more than its bytes can hold, or takes more than an image may.

    `images`: how many decoded ones are held at a time, by `pillow` with a copy of four bytes a pixel. Returns its
    pixels times its scans.
    """
    header = inspect_header(data)
    if header.has_junk:
        header = inspect_header(normalize_header(data))
    frame = header.frame
    if frame is None:
        return 0
    require_pixels(frame.width, frame.height)
    area = frame.width * frame.height
    if frame.marker not in _ARITHMETIC and area > _MAX_PIXELS_PER_BYTE * len(data):
        raise ValueError(f"image file is truncated: {len(data):,} bytes for {frame.width:,} x {frame.height:,} pixels")
    memory = frame.memory(images, has_scans=header.has_scans) + (4 if pillow else 0)
    require_memory(len(data) + area * memory)
    return area * (_num_scans(data, area) if header.has_scans else 1)


def _num_scans(data: Encoded, area: int) -> int:
    """Return the number of scans; UnusableImage if there are too many for an image of this area."""
    most = MAX_SCAN_PIXELS // max(area, 64 * 64)
    number = bytes(data).count(bytes((0xFF, _START_OF_SCAN)))  # in thumbnails and comments too
    if number > most:
        number = sum(segment.marker == _START_OF_SCAN for segment in _all_segments(data))
    if number > most:
        raise UnusableImage(f"it has {number:,} scans, and at most {most:,} are decoded at its size", "re-encode it")
    return number


def _decode_strictly(data: Encoded, decode: Decode) -> Pixels:
    require_decodable(data)
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
    require_decodable(data, images=2)
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
    if not _are_equal(pixels, decode(b"".join([*parts, data[offset:]]))):
        raise ValueError("Corrupt JPEG data: premature end of data segment")
    return pixels


def _are_equal(pixels: Pixels, others: Pixels) -> bool:
    """Return whether two images are equal, without an array of truth values of their size."""
    rows = max(1, _BAND // (3 * pixels.shape[1]))
    bands = (slice(top, top + rows) for top in range(0, len(pixels), rows))
    return pixels.shape == others.shape and all(np.array_equal(pixels[band], others[band]) for band in bands)


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


def inspect_header(data: Encoded) -> JpegHeader:
    """Return what the header says.

    Takes two or three microseconds for any size: it stops at the first bytes outside of a segment.
    """
    offset, end, has_exif, number = 2, len(data), False, 0
    frame: Frame | None = None
    while offset + 4 <= end:
        marker = data[offset + 1]
        if data[offset] != 0xFF or marker == _JUNK:
            return JpegHeader(has_exif, True, frame)
        if marker == _START_OF_SCAN:
            return JpegHeader(
                has_exif, False, frame, frame is not None and _has_scans(frame, data[offset + 4 : offset + 5])
            )
        if marker == 0xFF:
            offset = _padding_end(data, offset) - 1
        elif marker in _WITHOUT_LENGTH:
            offset += 2
        else:
            if marker in _FRAMES:
                frame = _frame(marker, data[offset + 4 : offset + 22])
            has_exif = has_exif or marker == _APP1
            offset += 2 + (data[offset + 2] << 8 | data[offset + 3])
        number += 1
        require_parts(number, "segments")
    return JpegHeader(has_exif, False, frame)


def _padding_end(data: Encoded, offset: int) -> int:
    padding = _PADDING.match(data, offset)
    return padding.end() if padding else offset


def _frame(marker: int, content: Encoded) -> Frame | None:
    """Return the frame of the content of its segment: precision, height, width, and three bytes for each channel."""
    if len(content) < 9:
        return None
    height, width = content[1] << 8 | content[2], content[3] << 8 | content[4]
    samples = [content[place] for place in range(7, min(len(content), 6 + 3 * content[5]), 3)]
    return Frame(marker, width, height, tuple((sample >> 4) * (sample & 15) for sample in samples))


def _has_scans(frame: Frame, channels: Encoded) -> bool:
    """Return whether a JPEG may have several scans, of whose first one the number of channels is given."""
    return frame.marker in _PROGRESSIVE or (len(channels) == 1 and channels[0] < len(frame.channels))


def pixel_parts(data: Encoded) -> list[Encoded]:
    """Return the parts of a JPEG without metadata and padding, which Pillow would read byte by byte.

    Raises ValueError if there is no image.
    """
    view, segments = memoryview(data), list(_segments(data))
    if not segments or segments[-1].marker != _START_OF_SCAN:
        raise ValueError("image file is truncated: it ends before its image data")
    parts = [view[segment.first : segment.end] for segment in segments if segment.marker not in _METADATA]
    return [view[:2], *parts, view[segments[-1].end :]]


def exif_and_xmp(data: Encoded) -> tuple[bytes, bytes]:
    """Return the EXIF data of a JPEG, joined from all its segments of them, and its last XMP data."""
    exif, xmp = [], b""
    for segment in _segments(data):
        if segment.marker == _APP1:
            content = bytes(data[segment.payload : segment.end])
            if content.startswith(_EXIF):
                exif.append(content[len(_EXIF) :])
            elif content.startswith(_XMP):
                xmp = content[len(_XMP) :]
    return b"".join(exif), xmp


def multi_picture_index(data: Encoded) -> bytes:
    """Return the index of the images of a multi-picture JPEG; empty without one."""
    contents = (data[segment.payload : segment.end] for segment in _segments(data) if segment.marker == _APP2)
    return next((bytes(content[4:]) for content in contents if bytes(content[:4]) == b"MPF\0"), b"")


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
    """Yield all segments up to the end of the image, without the entropy-coded data after scans and restarts.

    Padding before a marker belongs to its segment.
    """
    offset, in_scan, number = 2, False, 0
    while found := _MARKER.search(data, offset):
        start, payload, marker = found.start(), found.end(), data[found.end() - 1]
        while start > offset and data[start - 1] == 0xFF:
            start -= 1
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
        number += 1
        require_parts(number, "segments")
