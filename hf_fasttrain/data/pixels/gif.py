"""GIF files as Pillow is given them: without comments, which it may join in quadratic time."""

from __future__ import annotations

import re

from hf_fasttrain.data.pixels.jpeg import Encoded
from hf_fasttrain.data.pixels.limits import require_parts

_BLOCK = re.compile(rb"[!,;]")  # an extension, an image, the end
_CONTROL = 0xF9  # the extension with transparency and times


def without_texts(data: Encoded) -> list[Encoded]:
    """Return the parts of a GIF without the extensions before its first image, but for the last one of control."""
    view = memoryview(data)
    start = _colours_end(data, 13, data[10]) if len(data) > 13 else len(data)
    image, control = _next_image(data, start)
    if image is None:
        return [view]
    return [view[:start], control, view[image:]]


def has_frames(data: Encoded) -> bool:
    """Return whether there is a second image."""
    image, _ = _next_image(data, _colours_end(data, 13, data[10]) if len(data) > 13 else len(data))
    if image is None or image + 10 >= len(data):
        return False
    end = _data_end(data, _colours_end(data, image + 10, data[image + 9]) + 1)
    return _next_image(data, end)[0] is not None


def _colours_end(data: Encoded, place: int, flags: int) -> int:
    return place + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)


def _next_image(data: Encoded, place: int) -> tuple[int | None, Encoded]:
    """Return where the next image starts, None if none follows, and the last extension of control before it."""
    control: Encoded = b""
    number = 0
    while found := _BLOCK.search(data, place):
        if found[0] != b"!":
            return (found.start() if found[0] == b"," else None), control
        number += 1
        require_parts(number, "extensions")
        place = _data_end(data, found.end() + 1)
        if found.end() < len(data) and data[found.end()] == _CONTROL:
            control = memoryview(data)[found.start() : place]
    return None, control


def _data_end(data: Encoded, place: int) -> int:
    """Return the end of the blocks of data at a place."""
    while place < len(data) and data[place]:
        place += data[place] + 1
    return place + 1
