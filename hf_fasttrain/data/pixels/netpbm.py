"""PBM, PGM and PPM files that Pillow decodes in Python, a microsecond for each value: as text, or of odd maxima."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from hf_fasttrain.data.pixels.jpeg import Encoded
from hf_fasttrain.data.pixels.limits import require_memory, require_parts, require_pixels

_WHITE = b" \t\n\v\f\r"
_SPACE, _NO_SPACE = re.compile(rb"[ \t\n\v\f\r]"), re.compile(rb"[^ \t\n\v\f\r]")
_LINE_END, _COMMENT = re.compile(rb"[\r\n]"), re.compile(rb"#[^\r\n]*")
_NUMBER = re.compile(rb"[0-9]{1,10}(?![0-9])")
_NO_BIT, _NO_NUMBER = re.compile(rb"[^01]"), re.compile(rb"[^0-9 \t\n\v\f\r]|[0-9]{11}")
_BLOCK = 1 << 24  # bytes of text, or values, that are converted at a time


class Header(NamedTuple):
    """What a file says of itself."""

    kind: int  # 1 to 6, of P1 to P6
    width: int
    height: int
    maximum: int  # 1 for bits
    start: int  # of the values

    @property
    def channels(self) -> int:
        """Values of a pixel."""
        return 3 if self.kind in (3, 6) else 1

    @property
    def is_text(self) -> bool:
        """Whether its values are written as numbers."""
        return self.kind <= 3


def header_of(data: Encoded) -> Header:
    """Return the header of one of P1 to P6. Raises ValueError for anything else and for sizes out of range."""
    kind = data[1] - ord("0") if len(data) > 2 else 0
    if kind not in range(1, 7) or not _SPACE.match(data, 2):
        raise ValueError("not a PPM file")
    numbers, place = [], 2
    for _ in range(2 if kind in (1, 4) else 3):
        found = _NUMBER.match(data, _next_token(data, place))
        if found is None:
            raise ValueError("its header has no end")
        numbers.append(int(found[0]))
        place = found.end()
    width, height, maximum = numbers if len(numbers) == 3 else (*numbers, 1)
    require_pixels(width, height)
    if not 0 < maximum < 65536:
        raise ValueError(f"its largest value is {maximum}, not 1 to 65535")
    return Header(kind, width, height, maximum, place + 1)  # one space ends it


def _next_token(data: Encoded, place: int) -> int:
    """Return where the next token of the header starts, behind spaces and comments, which end with their lines."""
    number = 0
    while found := _NO_SPACE.search(data, place):
        if found[0] != b"#":
            return found.start()
        end = _LINE_END.search(data, found.start())
        place = end.end() if end else len(data)
        number += 1
        require_parts(number, "comments")
    return len(data)


def as_bytes(header: Header) -> bytes:
    """Return a header without comments."""
    numbers = (header.width, header.height, *([] if header.kind in (1, 4) else [header.maximum]))
    return b"P%d %s\n" % (header.kind, " ".join(map(str, numbers)).encode())


def is_slow(header: Header) -> bool:
    """Return whether Pillow decodes such a file in Python."""
    usual = (255, 65535) if header.kind == 5 else (255,)
    return header.is_text or (header.kind != 4 and header.maximum not in usual)


def decode_netpbm(data: Encoded, header: Header) -> Image.Image:
    """Return the image that Pillow makes of it: of mode L, RGB, or I, whose values are scaled to 65535.

    Raises ValueError for missing, invalid and too large values.
    """
    area, is_deep = header.width * header.height, header.maximum > 255 and header.channels == 1
    require_memory(2 * len(data) + area * (header.channels * (4 if is_deep else 1) + 7))
    dtype, white = (np.int32, 65535) if is_deep else (np.uint8, 255)
    table = np.round(np.arange(header.maximum + 1) / header.maximum * white).astype(dtype)
    if header.kind == 1:
        table = table[::-1]  # 1 is black
    values = np.empty(area * header.channels, dtype)
    place = 0
    for block in _bits(data, header) if header.kind == 1 else _numbers(data, header):
        taken = block[: len(values) - place]
        if header.is_text and taken.max(initial=0) > header.maximum:
            raise ValueError(f"it has the value {taken.max()}, and says that {header.maximum} is the largest")
        values[place : place + len(taken)] = table[np.minimum(taken, header.maximum)]
        place += len(taken)
        if place == len(values):
            break
    else:
        raise ValueError(f"image file is truncated: {place:,} of {len(values):,} values")
    shape = (header.height, header.width, *([3] if header.channels == 3 else []))
    return Image.fromarray(values.reshape(shape))


def _bits(data: Encoded, header: Header) -> Iterator[np.ndarray]:
    """Yield the bits of a text, which need no spaces between them."""
    text = _without_comments(data[header.start :])
    for place in range(0, len(text), _BLOCK):
        block = text[place : place + _BLOCK].translate(None, _WHITE)
        wrong = _NO_BIT.search(block)
        yield np.frombuffer(block[: wrong.start()] if wrong else block, np.uint8) - ord("0")
        if wrong:
            raise ValueError(f"it has {wrong[0]!r} among its bits")


def _numbers(data: Encoded, header: Header) -> Iterator[np.ndarray]:
    """Yield the values of a text or of bytes."""
    if not header.is_text:
        dtype = np.dtype(">u2" if header.maximum > 255 else "u1")
        values = np.frombuffer(data, dtype, (len(data) - header.start) // dtype.itemsize, header.start)
        yield from (values[place : place + _BLOCK] for place in range(0, len(values), _BLOCK))
        return
    text, place = _without_comments(data[header.start :]), 0
    while place < len(text):
        space = _SPACE.search(text, place + _BLOCK)
        end = space.end() if space else len(text)
        wrong = _NO_NUMBER.search(text, place, end)
        numbers = text[place : wrong.start() if wrong else end].strip()
        if numbers:
            yield np.fromstring(numbers, np.int64, sep=" ")
        if wrong:
            raise ValueError(f"it has {wrong[0]!r} among its values")
        place = end


def _without_comments(text: Encoded) -> bytes:
    return _COMMENT.sub(b"", text) if _COMMENT.search(text) else bytes(text)
