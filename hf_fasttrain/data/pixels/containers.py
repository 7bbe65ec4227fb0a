"""Image files opened by Pillow: only in the formats that are read, without metadata, and within the limits.

What Pillow would do with metadata may be slow, take memory, print warnings or reject the image (long texts in PNGs,
EXIF tags that refer to all of the file), and the pixels do not depend on it, but for the orientation.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError

from hf_fasttrain.data.pixels import gif, jpeg2000, netpbm, png
from hf_fasttrain.data.pixels.ifd import MAGICS, entries, first_number, layout_of
from hf_fasttrain.data.pixels.jpeg import (
    JPEG_START,
    Encoded,
    exif_and_xmp,
    multi_picture_index,
    pixel_parts,
    require_decodable,
)
from hf_fasttrain.data.pixels.limits import (
    MAX_RLE_PIXELS,
    UnusableImage,
    require_memory,
    require_pixels,
)
from hf_fasttrain.data.pixels.orientation import UPRIGHT, orientation_of
from hf_fasttrain.data.pixels.spliced import Spliced
from hf_fasttrain.data.pixels.tiff import first_page, tiff_memory

_MAGICS: dict[str, tuple[bytes, ...]] = {
    "JPEG": (JPEG_START,),
    "PNG": (png.START,),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": MAGICS,
    "BMP": (b"BM",),
    "JPEG2000": (jpeg2000.BOX_START, jpeg2000.STREAM_START),
    "PPM": tuple(b"P%d" % kind for kind in range(1, 7)),
}
FORMATS = (*_MAGICS, "WEBP")  # as Pillow calls them
_PICTURES = 0xB001  # tag of their number
_WEBP_BYTES = 14  # for each pixel that libwebp takes beside Pillow's image
_RESULT_BYTES = 3  # for each pixel
_WIDE, _ROW_BYTES = 1 << 16, 8  # pixels of a row; bytes of a pixel in a file, at most


class Opened(NamedTuple):
    """An image whose header was read, and whose claims are within the limits; nothing is decoded."""

    image: ImageFile.ImageFile
    orientation: int  # EXIF's, 1 to 8
    has_frames: bool  # or pages: several


class _File(NamedTuple):
    """What Pillow is given of a file."""

    file: Any
    orientation: int = UPRIGHT
    has_frames: bool = False


def format_of(data: Encoded) -> str | None:
    """Return the format of an encoded image by its first bytes; None if it is none of FORMATS."""
    start = bytes(data[:12])
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "WEBP"
    return next((name for name, magics in _MAGICS.items() if start.startswith(magics)), None)


def open_image(data: Encoded) -> Opened:
    """Open an image by Pillow.

    Raises UnusableImage if it is of another format or claims more than the limits allow, or what Pillow raises.
    """
    name = format_of(data)
    if name is None:
        raise UnusableImage(*_other_format(data))
    given = _FILES.get(name, _whole)(data)
    try:
        image: Any = Image.open(given.file, formats=(name,))
    except UnidentifiedImageError:
        raise ValueError(f"not a valid {name} file") from None
    except Image.DecompressionBombError as error:  # Pillow's limit, which the user may have lowered
        raise UnusableImage(str(error)) from None
    require_pixels(image.width, image.height, MAX_RLE_PIXELS if _is_run_length_encoded(image) else None)
    require_memory(len(data) + _memory(image, data))
    if image.width > _WIDE:  # Pillow joins what it has read for each block of 64 kB until a row is complete
        image.decodermaxblock = _ROW_BYTES * image.width
    orientation, has_frames = given.orientation, given.has_frames
    if name == "WEBP":
        orientation = orientation_of(image.info.get("exif", b""), image.info.get("xmp", b""))
        has_frames = image.is_animated
    return Opened(image, orientation, has_frames)


def _other_format(data: Encoded) -> tuple[str, str]:
    """Return reason and advice for what is none of FORMATS; Pillow's other readers are asked for its name only."""
    Image.init()
    prefix, names = bytes(data[:16]), []
    for name, (_, accept) in Image.OPEN.items():
        with suppress(Exception):
            if accept is not None and accept(prefix):
                names.append(name)
    if not names:
        return "not an image", "repair it or remove it"
    return f"a {names[0]} file; read are {', '.join(sorted(FORMATS))}", "convert it or remove it"


def _memory(image: Any, data: Encoded) -> float:
    """Return the bytes that an opened image takes when it is decoded, without those of the file."""
    area, mode = image.width * image.height, image.mode
    own = 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4
    beside: dict[str, Callable[[], float]] = {
        "TIFF": lambda: tiff_memory(image, data),
        "JPEG2000": lambda: jpeg2000.decoder_memory(data),
        "WEBP": lambda: _WEBP_BYTES * area,
        "BMP": lambda: 2 * area if _is_run_length_encoded(image) else 0,
        "GIF": lambda: area,
    }
    rows = 2 * _ROW_BYTES // 4 * own * image.width  # which matter in images of one row only
    return area * own + max(_RESULT_BYTES * area, beside.get(image.format, lambda: 0)()) + rows


def _is_run_length_encoded(image: Any) -> bool:
    return any(tile[0] == "bmp_rle" for tile in image.tile)


def _whole(data: Encoded) -> _File:
    return _File(io.BytesIO(data))


def _webp(data: Encoded) -> _File:
    """Return a WebP as it is, if its canvas is not too large: libwebp would allocate it."""
    if data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = (1 + int.from_bytes(data[place : place + 3], "little") for place in (24, 27))
        require_pixels(width, height)
        require_memory(len(data) + width * height * (4 + _WEBP_BYTES))
    return _whole(data)


def _jpeg(data: Encoded) -> _File:
    require_decodable(data, pillow=True)
    return _File(Spliced(pixel_parts(data)), orientation_of(*exif_and_xmp(data)), _num_pictures(data) > 1)


def _num_pictures(data: Encoded) -> float:
    """Return the number of images that a JPEG has by its multi-picture index, such as that of a stereo camera."""
    index = multi_picture_index(data)
    if (layout := layout_of(index)) is None:
        return 1
    numbers = (first_number(index, layout, entry) for entry in entries(index, layout) if entry.tag == _PICTURES)
    return next(numbers, None) or 1


def _tiff(data: Encoded) -> _File:
    return _File(*first_page(data))


def _png(data: Encoded) -> _File:
    found = png.inspect(data)
    return _File(Spliced(found.parts), orientation_of(found.exif, found.xmp), found.has_frames)


def _gif(data: Encoded) -> _File:
    return _File(Spliced(gif.without_texts(data)), has_frames=gif.has_frames(data))


def _netpbm(data: Encoded) -> _File:
    header = netpbm.header_of(data)
    return _File(Spliced([netpbm.as_bytes(header), memoryview(data)[header.start :]]))


_FILES: dict[str, Callable[[Encoded], _File]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "TIFF": _tiff,
    "PPM": _netpbm,
    "WEBP": _webp,
}
