"""Image file directories: the tables of tags that TIFF files have, and the EXIF data of other formats."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from hf_fasttrain.data.pixels.jpeg import Encoded
from hf_fasttrain.data.pixels.limits import require_parts

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # type -> bytes
_NUMBERS = {3: "H", 4: "L", 5: "2L", 6: "b", 8: "h", 9: "l", 10: "2l", 11: "f", 12: "d", 13: "L", 16: "Q"}
_CLASSIC = {b"II*\0": "<", b"MM\0*": ">", b"II\0*": "<", b"MM*\0": ">"}  # Pillow reads the last two as well
_BIG = {b"II+\0": "<", b"MM\0+": ">"}
MAGICS = tuple({**_CLASSIC, **_BIG})


class Layout(NamedTuple):
    """How the directories of a file are written."""

    order: str  # of bytes: < or >
    is_big: bool  # BigTIFF
    first: int  # offset of the first directory

    @property
    def offset_format(self) -> str:
        """Format of an offset, for struct."""
        return f"{self.order}{'Q' if self.is_big else 'L'}"

    @property
    def count_format(self) -> str:
        """Format of the number of a directory's entries, for struct."""
        return f"{self.order}{'Q' if self.is_big else 'H'}"

    @property
    def entry_format(self) -> str:
        """Format of an entry, for struct: tag, type, number of values, and the value or its offset."""
        return f"{self.order}{'HHQ8s' if self.is_big else 'HHL4s'}"


class Entry(NamedTuple):
    """An entry of a directory; its values are data[start:end]."""

    tag: int
    type: int
    number: int  # of values
    start: int
    end: int
    raw: bytes  # the entry itself


def layout_of(data: Encoded) -> Layout | None:
    """Return the layout of a TIFF or of EXIF data, None if it is neither."""
    magic = bytes(data[:4])
    if order := _CLASSIC.get(magic):
        return Layout(order, False, struct.unpack_from(f"{order}L", data, 4)[0]) if len(data) >= 8 else None
    if order := _BIG.get(magic):
        return Layout(order, True, struct.unpack_from(f"{order}Q", data, 8)[0]) if len(data) >= 16 else None
    return None


def entries(data: Encoded, layout: Layout) -> Iterator[Entry]:
    """Yield the entries of the first directory, as Pillow reads it: up to the first one that is not within the data.

    Entries of unknown types, without values, and with more of them than all of the data are left out.
    """
    inline, size = (8, 20) if layout.is_big else (4, 12)
    first = layout.first + struct.calcsize(layout.count_format)
    if first > len(data):
        return
    (number,) = struct.unpack_from(layout.count_format, data, layout.first)
    require_parts(number, "tags")
    room = len(data)  # of all values: else each of many tags could refer to all of the data
    for place in range(first, min(len(data) - size + 1, first + number * size), size):
        tag, type_, count, value = struct.unpack_from(layout.entry_format, data, place)
        num_bytes, start = count * _SIZES.get(type_, 0), place + size - inline
        if num_bytes > inline:
            (start,) = struct.unpack(layout.offset_format, value)
            room -= num_bytes
            if room < 0:
                continue
            if start + num_bytes > len(data):
                return
        if num_bytes:
            yield Entry(tag, type_, count, start, start + num_bytes, bytes(data[place : place + size]))


def first_number(data: Encoded, layout: Layout, entry: Entry) -> float | None:
    """Return the first value of an entry; None if it is no number."""
    form = _NUMBERS.get(entry.type)
    if form is None:
        return None
    values = struct.unpack_from(f"{layout.order}{form}", data, entry.start)
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None
