"""How much memory OpenJPEG takes for a JPEG 2000: its headers may ask for any amount, and it checks little of that."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from hf_fasttrain.data.pixels.jpeg import Encoded
from hf_fasttrain.data.pixels.limits import require_parts, require_pixels

BOX_START, STREAM_START = b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"
_SIZE, _STYLE, _CHANNEL_STYLE = 0x51, 0x52, 0x53  # markers, after 0xff
_TILE, _TILE_DATA, _END = 0x90, 0x93, 0xD9
_BLOCK_BYTES = 600  # of a code block and its share of a precinct; measured: 430, and 575 with a precinct for each
_TILE_BYTES, _TILE_CHANNEL_BYTES = 6000, 1400  # of the settings of a tile, of which there may be 65,535


def decoder_memory(data: Encoded) -> float:
    """Return the bytes that OpenJPEG takes while it decodes; ValueError for what has no valid header."""
    start = _stream_start(data)
    if bytes(data[start : start + 4]) != STREAM_START:
        raise ValueError("not a JPEG 2000 file: no image data")
    _, _, right, bottom, left, top, tile_width, tile_height, _, _, channels = struct.unpack_from(
        ">HHIIIIIIIIH", data, start + 4
    )
    width, height = right - left, bottom - top
    require_pixels(width, height)
    require_pixels(tile_width, tile_height, most=2**64)
    depth = max(((value & 0x7F) + 1 for value in data[start + 42 : start + 42 + 3 * channels : 3]), default=8)
    tiles = -(-right // tile_width) * -(-bottom // tile_height)
    tile_width, tile_height = min(width, tile_width), min(height, tile_height)
    blocks = max((_num_blocks(style, tile_width, tile_height) for style in _styles(data, start)), default=0)
    values = tile_width * tile_height * channels * (4 + (1 if depth <= 8 else 2))  # 4: as OpenJPEG holds them
    return values + channels * blocks * _BLOCK_BYTES + tiles * (_TILE_BYTES + channels * _TILE_CHANNEL_BYTES)


def _stream_start(data: Encoded) -> int:
    """Return where the codestream starts: at the beginning, or in the first box for it."""
    place = number = 0
    while bytes(data[:12]) == BOX_START and place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        head = 8
        if length == 1 and place + 16 <= len(data):
            (length,), head = struct.unpack_from(">Q", data, place + 8), 16
        if kind == b"jp2c":
            return place + head
        if length < head:
            return len(data)
        place += length
        number += 1
        require_parts(number, "boxes")
    return place


def _styles(data: Encoded, start: int) -> Iterator[Encoded]:
    """Yield the coding styles: number of resolutions, sizes of code blocks, and those of precincts if they are given.

    They stand in the header and, for single tiles and channels, in the headers of tile parts.
    """
    place, part, number = start + 2, 0, 0
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
        number += 1
        require_parts(number, "tile parts")
        if marker == _TILE:
            part = place
        elif marker == _TILE_DATA:
            (size,) = struct.unpack_from(">I", data, part + 6)
            if not size or part + size <= place:
                return
            place = part + size
            continue
        elif marker == _END:
            return
        elif marker == _STYLE:
            yield data[place + 9 : place + 2 + length]
        elif marker == _CHANNEL_STYLE:
            yield data[place + 6 : place + 2 + length]
        place += 2 + length


def _num_blocks(style: Encoded, width: int, height: int) -> int:
    """Return about how many code blocks and precincts a channel of a tile has, at most."""
    if len(style) < 5:
        return 0
    levels, precincts = min(style[0], 32), style[5:]
    block = [2 ** (min(value, 8) + 2) for value in style[1:3]]
    number = 0
    for level in range(levels + 1):  # from the smallest resolution to the largest
        scale = levels - level
        sides = -(-width >> scale), -(-height >> scale)
        sizes = block
        if len(precincts) > level:
            # Those of all but the smallest resolution are of its bands, which have half of its size.
            logs = (max(0, log - (level > 0)) for log in (precincts[level] & 15, precincts[level] >> 4))
            sizes = [min(side, 2**log) for side, log in zip(block, logs, strict=True)]
        number += -(-sides[0] // sizes[0]) * -(-sides[1] // sizes[1])
    return number
