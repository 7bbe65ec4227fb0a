"""Odd images, of any mode and shape, large inside, with much or damaged metadata: bounded, quiet, right pixels."""

from __future__ import annotations

import io
import logging
import random
import struct
import sys
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fuzz_images import Watch, inputs, problem_of
from helpers.damaged_images import drawn_photo, exif, save, segment
from helpers.processes import in_child
from PIL import Image, PngImagePlugin, TiffImagePlugin

from hf_fasttrain.data.pixels import augment, limits, rgb
from hf_fasttrain.data.pixels.augment import EvalTransform
from hf_fasttrain.data.pixels.containers import FORMATS
from hf_fasttrain.data.pixels.decode import MAX_JPEG_SIDE, grey_of, image_size_of, read_pixels
from hf_fasttrain.data.pixels.netpbm import decode_netpbm, header_of
from hf_fasttrain.data.pixels.orientation import orientation_of, upright
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.pixels.rgb import Grey, ValueRange, rgb_pixels, to_rgb
from hf_fasttrain.data.pixels.spliced import Spliced
from hf_fasttrain.utils.errors import ImageError
from hf_fasttrain.utils.process_memory import limited_memory

PHOTO = drawn_photo(2, 61, 43)
PIXELS = np.asarray(PHOTO)
GREY = np.asarray(PHOTO.convert("L"))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*extra: bytes, width: int = 3, height: int = 2, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """Return a black PNG, with chunks before the image."""
    bits = depth * {0: 1, 2: 3, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = zlib.compress(rows or bytes((1 + width * bits // 8) * height))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    )


def tiff(tags: dict[int, list[int]], data: bytes) -> bytes:
    """Return a TIFF of long values, whose data start at byte 8."""
    place, values, entries = 8 + len(data) + 2 + 12 * len(tags) + 4, b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}L", *numbers)
        where = packed if len(numbers) == 1 else struct.pack("<L", place + len(values))
        values += packed if len(numbers) > 1 else b""
        entries += struct.pack("<HHL", tag, 4, len(numbers)) + where
    return (
        b"II*\0" + struct.pack("<L", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4) + values
    )


def grey_tiff(width: int, height: int, compression: int, parts: dict[int, list[int]], data: bytes) -> bytes:
    size = {256: [width], 257: [height], 258: [8], 259: [compression], 262: [1], 277: [1]}
    return tiff({**size, **parts}, data)


def claiming(data: bytes, width: int, height: int) -> bytes:
    """Return a JPEG that says it has another size."""
    place = next(data.index(bytes((0xFF, marker))) for marker in (0xC0, 0xC2) if bytes((0xFF, marker)) in data)
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def with_scans(number: int) -> bytes:
    data = save(Image.new("RGB", (2000, 2000)), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * number + data[-2:]


def precincts_of_one_pixel() -> bytes:
    """Return a JPEG 2000 for which OpenJPEG would take 575 bytes a pixel."""
    data = save(Image.new("L", (64, 64)), "JPEG2000", no_jp2=True, num_resolutions=1, codeblock_size=(4, 4))
    style = data.index(b"\xff\x52")
    body = data[style + 4 : style + 14]
    new = b"\xff\x52" + struct.pack(">H", 13) + bytes((body[0] | 1,)) + body[1:] + b"\0"
    size = data.index(b"\xff\x51")
    wide = (
        data[: size + 6] + struct.pack(">II", 9000, 9000) + data[size + 14 : size + 22] + struct.pack(">II", 9000, 9000)
    )
    return wide + data[size + 30 : style] + new + data[style + 14 :]


def bmp(width: int, height: int, compression: int, data: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + bytes(range(256)) * 4 + data


def gif(*extensions: bytes) -> bytes:
    """Return a GIF of two images, with extensions before the first one."""
    data = save(PHOTO.quantize(8), "GIF", save_all=True, append_images=[PHOTO.rotate(90).quantize(8)])
    place = data.index(b"!\xf9")
    return data[:place] + b"".join(extensions) + data[place:]


NUMBERS = [8] * 3000
HUGE: dict[str, tuple[bytes, str]] = {
    "a JPEG of 600 bytes": (claiming(save(PHOTO), 13_000, 13_000), r"truncated: .* bytes for 13,000 x 13,000"),
    "a progressive one": (claiming(save(PHOTO, progressive=True), 13_000, 13_000), "truncated"),
    "a JPEG of 4 billion pixels": (claiming(save(PHOTO), 65_500, 65_500), "decompression bomb"),
    "3,000 scans": (with_scans(3000), "3,010 scans, and at most"),
    "many segments": (save(PHOTO)[:2] + b"\xff\xfe\0\2" * 270_000 + save(PHOTO)[2:], "more than 262,144 segments"),
    "a PNG": (png(width=2**31 - 1, height=2**31 - 1, rows=b"1"), "decompression bomb"),
    "many chunks": (png(chunk(b"tEXt", b"a\0b") * 270_000), "more than 262,144 chunks"),
    "a WebP's canvas": (b"RIFF" + bytes(4) + b"WEBPVP8X" + b"\x0a\0\0\0\2\0\0\0" + b"\xff" * 6, "decompression bomb"),
    "a large WebP": (b"RIFF" + bytes(4) + b"WEBPVP8X" + b"\x0a\0\0\0\2\0\0\0" + b"\xff\x2f\0" * 2, "2.7. GB of memory"),
    "a GIF": (gif()[:6] + b"\xff" * 4 + gif()[10:], "decompression bomb"),
    "a BMP of runs": (bmp(13_000, 13_000, 1, b"\0\0" * 9), "13,000 x 13,000 pixels are more than 16,777,216"),
    "JPEG 2000": (precincts_of_one_pixel(), "GB of memory to decode, more than 1.61 GB"),
    "a PPM": (b"P6 30000 30000 255\n", "30,000 x 30,000 pixels are more than 178,956,970"),
    "a tile": (
        grey_tiff(64, 64, 8, {322: [60_000], 323: [60_000], 324: [8], 325: [9]}, zlib.compress(b"")),
        "GB of memory",
    ),
    "strips that overlap": (
        grey_tiff(3000, 3000, 8, {278: [1], 273: NUMBERS, 279: [9000] * 3000}, bytes(9000)),
        "3,000 strips or tiles overlap",
    ),
    "more strips than rows": (
        grey_tiff(30, 30, 1, {278: [29], 273: NUMBERS}, bytes(900)),
        "overlap, in an image with room",
    ),
    "many strips": (grey_tiff(1, 300_000, 1, {278: [1], 273: [8] * 300_000}, bytes(99)), "more than 262,144 strips"),
    "a JPEG in a TIFF": (
        grey_tiff(2000, 2000, 7, {278: [2000], 273: [8], 279: [70_000]}, with_scans(3000)),
        "3,010 scans",
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_what_is_larger_inside_than_it_may_be_is_a_bad_image_before_it_is_decoded(name: str) -> None:
    data, reason = HUGE[name]
    with limited_memory(200 << 20), pytest.raises(ImageError, match=f"can't be decoded: .*({reason}).*; "):
        read_pixels(data)


def decode_within(data: bytes, num_bytes: float) -> tuple[int, ...]:
    with limited_memory(int(num_bytes)):
        return read_pixels(data).shape


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory")
def test_memory_of_a_decode_is_a_few_bytes_a_pixel() -> None:
    side = 2500
    area, deep = side * side, Image.new("I;16", (side, side))
    images = {
        "16-bit": (save(deep, "PNG"), 2 + 3),
        "floats": (save(Image.new("F", (side, side)), "TIFF", compression="tiff_adobe_deflate"), 4 + 3),
        "inks": (save(Image.new("CMYK", (side, side))), 4 + 3),
        "rotated": (save(Image.new("RGB", (side, side)), exif=exif(6)), 3 + 3),
        "one row": (png(width=area, height=1), 4 + 3 + 2 * 3),
    }
    tiles = 50 << 20  # that are converted at a time
    for name, (data, per_pixel) in images.items():
        shape = in_child(lambda: decode_within(data, per_pixel * area + tiles))  # noqa: B023 - called at once
        assert shape == ((1, area, 3) if name == "one row" else (side, side, 3)), name


def test_the_limit_of_memory_counts_the_file_and_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = save(PHOTO, "PNG")
    needed = len(data) + 7 * PHOTO.width * PHOTO.height + 16 * PHOTO.width  # the last: two rows
    monkeypatch.setattr(limits, "MAX_MEMORY", needed)
    assert read_pixels(data).shape == PIXELS.shape
    monkeypatch.setattr(limits, "MAX_MEMORY", needed - 1)
    with pytest.raises(ImageError, match=r"it takes .* of memory to decode, more than .*; shrink it or remove it"):
        read_pixels(data)


def test_a_thin_image_is_resized_where_it_is_cut_out_only(monkeypatch: pytest.MonkeyPatch) -> None:
    thin = np.random.default_rng(0).integers(0, 256, (2, 30_000, 3), dtype=np.uint8)
    with limited_memory(100 << 20):  # whole, it would be 3.4 million x 224 pixels
        assert EvalTransform(224)(thin).shape == (224, 224, 3)
        assert EvalTransform(224)(np.ascontiguousarray(thin.transpose(1, 0, 2))).shape == (224, 224, 3)
    for shape in ((3, 400), (400, 3), (70, 900)):
        pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
        for name in ("bilinear", "bicubic", "lanczos"):
            transform = EvalTransform(32, name, 0.875)
            whole = transform(pixels).astype(int)
            with monkeypatch.context() as patch:
                patch.setattr(augment, "WHOLE_PIXELS", 0)
                part = transform(pixels).astype(int)
            assert abs(whole - part).max() <= 1


def test_a_side_that_no_jpeg_can_have_is_stored_as_pixels() -> None:
    data = png(width=MAX_JPEG_SIDE + 1, height=1)
    pixels, stored = Preparation(stored_quality=90).encoded(data)
    assert (pixels.shape, stored) == ((1, MAX_JPEG_SIDE + 1, 3), None)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes_are_converted_in_tiles_as_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = PHOTO.convert("RGB" if mode == "PA" else mode)
    image = PHOTO.quantize(16).convert("PA") if mode == "PA" else image
    if mode == "P":
        image.info["transparency"] = bytes(range(16))
    whole = np.asarray((image.convert("RGBA") if mode == "P" else image).convert("RGB"))
    for tile in (1 << 20, 150, 40):
        monkeypatch.setattr(rgb, "_TILE", tile)
        assert np.array_equal(rgb_pixels(image), whole)
    assert np.array_equal(np.asarray(to_rgb(image)), whole)


def test_grey_of_more_than_eight_bits_has_one_range_for_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rgb, "_TILE", 100)
    scan = (GREY.astype(np.uint16) << 4) + 7
    expected = np.round((scan - 0.0) * (255 / 4095)).clip(0, 255).astype(np.uint8)
    encoded = {form: save(Image.fromarray(scan), form) for form in ("PNG", "TIFF", "PPM")}
    encoded["TIFF, 32-bit"] = save(Image.fromarray(scan.astype(np.int32)), "TIFF")
    encoded["TIFF, floats"] = save(Image.fromarray(scan.astype(np.float32)), "TIFF")
    for form, data in encoded.items():
        assert np.array_equal(read_pixels(data, value_range=ValueRange(0, 4095))[..., 0], expected), form
    dark = read_pixels(encoded["PNG"])
    assert np.array_equal(dark[..., 0], np.round(scan * (255 / 65535)).astype(np.uint8))
    window = read_pixels(encoded["PNG"], value_range=ValueRange(1000, 2000))
    assert set(np.unique(window[(scan <= 1000) | (scan >= 2000)])) <= {0, 255}
    with pytest.raises(ImageError, match=r"its integers are from .* to be from 0 \(black\) to 1023 .*value_range"):
        read_pixels(encoded["PNG"], value_range=ValueRange(0, 1023, clips=False))
    for values in (GREY.astype(np.float32), GREY / np.float32(100) - 1):
        with pytest.raises(ImageError, match=r"its floats are from .*; set data.value_range"):
            read_pixels(save(Image.fromarray(values), "TIFF"))


def test_a_value_that_is_not_finite_does_not_darken_the_others() -> None:
    shares = GREY.astype(np.float32) / 255
    odd = shares.copy()
    odd[3, 4], odd[5, 6], odd[7, 8] = np.nan, np.inf, -np.inf
    odd.view(np.uint32)[9, 9] = 0x7F800001  # a signalling NaN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_pixels(save(Image.fromarray(odd), "TIFF"))[..., 0]
    expected = GREY.copy()
    expected[3, 4], expected[5, 6], expected[7, 8], expected[9, 9] = 0, 255, 0, 0
    assert np.array_equal(found, expected)
    assert grey_of(save(Image.fromarray(odd), "TIFF")) == Grey("floats", shares.min(), shares.max(), has_nan=True)
    assert grey_of(save(PHOTO)) is grey_of(save(PHOTO, "PNG")) is grey_of(b"no image") is None


def test_a_tiff_that_says_twelve_bits_has_twelve() -> None:
    packed = bytes((0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00))  # 4095, 0; 2048, 0
    tags = {256: [2], 257: [2], 258: [12], 259: [1], 262: [1], 277: [1], 278: [2], 273: [8], 279: [6]}
    assert read_pixels(tiff(tags, packed))[..., 0].tolist() == [[255, 0], [128, 0]]


def text_chunk(kind: bytes, key: bytes, text: bytes) -> bytes:
    packed = {b"tEXt": text, b"zTXt": b"\0" + zlib.compress(text), b"iTXt": b"\1\0\0\0" + zlib.compress(text)}
    return chunk(kind, key + b"\0" + packed[kind])


def test_a_png_with_much_text_has_the_pixels_of_one_without() -> None:
    plain, long = save(PHOTO, "PNG"), b"a" * 2_000_000
    texts = [text_chunk(kind, b"XML:com.adobe.xmp", long) for kind in (b"tEXt", b"zTXt", b"iTXt")]
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3_000_000)))
    for extra in (*texts, profile, chunk(b"eXIf", bytes(200_000)), chunk(b"prIv", long), chunk(b"gAMA", b"\0")):
        assert np.array_equal(read_pixels(plain[:33] + extra + plain[33:]), PIXELS)
        assert np.array_equal(read_pixels(plain[:-12] + extra + plain[-12:]), PIXELS)
        with pytest.raises(ImageError, match="bad checksum of its chunk"):
            read_pixels(plain[:33] + extra[:-1] + bytes((extra[-1] ^ 1,)) + plain[33:])


def test_comments_of_other_formats_do_not_matter_either() -> None:
    block = b"!\xfe" + b"\xffc" * 1 + b"c" * 254 + b"\0"
    assert np.array_equal(read_pixels(gif(block * 500)), read_pixels(gif()))
    plain = save(PHOTO, "PPM")
    assert np.array_equal(read_pixels(plain[:3] + b"#" + b"c" * 300_000 + b"\n" + plain[3:]), PIXELS)
    jpeg = save(PHOTO, quality=95)
    assert np.array_equal(read_pixels(jpeg[:2] + segment(0xFE, bytes(60_000)) * 40 + jpeg[2:]), read_pixels(jpeg))
    for pillow in (False, True):
        padded = jpeg[:2] + b"\xff" * 300_000 + jpeg[2:]
        assert np.array_equal(read_pixels(padded, pillow=pillow), read_pixels(jpeg))


def turned(orientation: int) -> np.ndarray:
    steps = {1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (4,), 7: (6,), 8: (2,)}[orientation]
    image = PHOTO
    for step in steps:
        image = image.transpose(Image.Transpose(step))
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_way_to_give_an_orientation(orientation: int) -> None:
    xmp, data = b'<x tiff:Orientation="%d"/>' % orientation, exif(orientation)
    info, raw, tags = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo(), TiffImagePlugin.ImageFileDirectory_v2()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    raw.add_text("Raw profile type exif", f"\nexif\n{len(data.tobytes()):8}\n{data.tobytes().hex()}\n", zip=True)
    tags[700], tags.tagtype[700] = xmp, 1
    plain = save(PHOTO, "PNG")
    images = {
        "PNG": save(PHOTO, "PNG", exif=data),
        "PNG, behind": plain[:-12] + chunk(b"eXIf", data.tobytes()[6:]) + plain[-12:],
        "PNG, XMP": save(PHOTO, "PNG", pnginfo=info),
        "PNG, raw": save(PHOTO, "PNG", pnginfo=raw),
        "WebP": save(PHOTO, "WEBP", lossless=True, exif=data),
        "WebP, XMP": save(PHOTO, "WEBP", lossless=True, xmp=xmp),
        "TIFF": save(PHOTO, "TIFF", exif=data),
        "TIFF, LZW": save(PHOTO, "TIFF", exif=data, compression="tiff_lzw"),
        "TIFF, XMP": save(PHOTO, "TIFF", tiffinfo=tags),
    }
    for name, encoded in images.items():
        assert np.array_equal(read_pixels(encoded), turned(orientation)), name
        assert image_size_of({"bytes": encoded}) == PHOTO.size
    assert np.array_equal(upright(PIXELS, orientation), turned(orientation))


def pillows_orientation(data: bytes) -> int:
    image = Image.new("L", (1, 1))
    image.info["exif"] = data
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - whatever Pillow raises for damaged data
        return 1
    return next((number for number in range(2, 9) if number == value), 1)


def test_damaged_exif_data_are_read_as_pillow_does() -> None:
    rng, source = random.Random(3), exif(6)
    source[0x010F], source[0x011A], source[0x0131] = "maker", 72.0, "some software"
    data = source.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(1500):
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 2, 4))):
                damaged[rng.randrange(6, len(damaged))] = rng.choice((0, 1, 6, 255, rng.randrange(256)))
            cut = bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])
            assert orientation_of(cut) == pillows_orientation(cut), cut.hex()


def test_exif_data_that_refer_to_all_of_themselves_again_and_again_cost_nothing() -> None:
    entries = b"".join(struct.pack("<HHLL", tag, 7, 3_000_000, 8) for tag in range(300, 30_300))
    bomb = b"II*\0\x08\0\0\0" + struct.pack("<H", 30_000) + entries + bytes(3_000_000)  # 90 GB
    images = [png(chunk(b"eXIf", bomb)), save(PHOTO, "WEBP", exif=b"Exif\0\0" + bomb)]
    with limited_memory(100 << 20):
        assert [read_pixels(data).shape for data in images] == [(2, 3, 3), PIXELS.shape]
        with pytest.raises(ImageError, match="not a valid TIFF file"):
            read_pixels(bomb)


NETPBM = {
    "P1": b"P1\n# bits\n61 43\n" + b"".join(b"%d" % (value > 99) for value in GREY.ravel()),
    "P1, spaces": b"P1 61 43\n" + b" ".join(b"%d" % (value > 99) for value in GREY.ravel()),
    "P2": b"P2 61 43 255 " + b"\n".join(b"%d" % value for value in GREY.ravel()) + b" ",
    "P2, 12 bits": b"P2 61 43 4095\n" + b" ".join(b"%d" % (16 * int(value)) for value in GREY.ravel()),
    "P3, 100": b"P3 61 43 100\n" + b" ".join(b"%d" % (value * 100 // 255) for value in PIXELS.astype(int).ravel()),
    "P5, 12 bits": b"P5 61 43 4095\n" + (GREY.astype(">u2") * 16 + 15).tobytes(),
    "P5, 7 bits": b"P5 61 43 127\n" + (GREY // 2).tobytes() + b"more",
    "P6, 10 bits": b"P6 61 43 1000\n" + (PIXELS.astype(">u2") * 3).tobytes(),
}


@pytest.mark.parametrize("name", NETPBM)
def test_netpbm_files_that_pillow_decodes_in_python_are_the_same_images(name: str) -> None:
    data = NETPBM[name]
    with Image.open(io.BytesIO(data)) as theirs:
        values = np.asarray(theirs)
    ours = np.asarray(decode_netpbm(data, header_of(data)))
    assert np.array_equal(ours, values.astype(np.uint8) * 255 if values.dtype == bool else values)
    for cut in (data[:-200], data[:30]):
        with pytest.raises(ImageError, match=r"can't be decoded: .*(truncated|no end)"):
            read_pixels(cut)


def test_values_that_a_text_can_t_have() -> None:
    for wrong in (b"P2 2 1 255 1 256", b"P2 2 1 255 1 x", b"P2 2 1 255 1 -1", b"P1 2 1 02", b"P2 2 1 70000 1 1"):
        with pytest.raises(ImageError, match=r"can't be decoded: it(s largest| has)"):
            read_pixels(wrong)
    assert read_pixels(b"P2 2 1 255 0 255 x")[..., 0].tolist() == [[0, 255]]  # what follows is not read


def test_no_other_format_is_opened(tmp_path: Path) -> None:
    others = {
        "a EPS file": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "a ICO file": save(PHOTO, "ICO"),
        "a PCX file": save(PHOTO, "PCX"),
        "not an image": b"<html>",
    }
    watch = Watch()
    for reason, data in others.items():
        path = tmp_path / "photo.jpg"
        path.write_bytes(data)
        watch.is_on = True
        with pytest.raises(ImageError, match=f"{reason}.*; (convert|repair) it or remove it"):
            read_pixels(path)
        watch.is_on = False
    assert not watch.seen
    assert sorted(FORMATS) == ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]


def test_nothing_is_printed_of_an_image(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PHOTO.width * PHOTO.height - 1)  # Pillow warns, up to twice of it
    compressed = save(PHOTO, "TIFF", compression="tiff_lzw")
    images = [
        save(PHOTO, exif=b"Exif\0\0II*\0\x08\0\0\0\5\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 1, 0) + b"\1"),
        compressed[:900] + b"\xff" * 200 + compressed[1100:],
        tiff({256: [4], 257: [4], 258: [8], 262: [1], 277: [100], 273: [8]}, bytes(16)),
        png(chunk(b"acTL", bytes(8)), chunk(b"acTL", bytes(8))),
        save(PHOTO.quantize(16), "PNG", transparency=bytes(range(16))),
    ]
    for action in ("error", "always"):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter(action)
            for data in images:
                with suppress(ImageError):
                    read_pixels(data)
        assert not shown
    assert logging.getLogger("PIL").handlers
    assert capfd.readouterr() == ("", "")


def test_a_spliced_file_reads_as_one() -> None:
    whole, rng = bytes(range(200)), random.Random(0)
    file, plain = Spliced([whole[:3], b"", memoryview(whole)[3:100], whole[100:]]), io.BytesIO(whole)
    for _ in range(200):
        place, whence = rng.choice(((rng.randrange(210), 0), (0, 1), (-rng.randrange(200), 2)))
        assert file.seek(place, whence) == plain.seek(place, whence) == file.tell()
        size = rng.choice((0, 1, 5, 150, -1))
        assert file.read(size) == plain.read(size)
    with pytest.raises(ValueError, match="negative"):
        file.seek(-1)


def test_damaged_images_of_every_format_are_pixels_or_bad_images(capfd: pytest.CaptureFixture[str]) -> None:
    """The short form of fuzz_images.py."""
    watch, outcomes = Watch(), []
    for index, description, data, way in inputs(7, 0, 700):
        outcome, problem = problem_of(data, way, watch)
        assert not problem, f"{index}: {description}; {way}: {problem}"
        outcomes.append(outcome)
    assert min(outcomes.count("pixels"), outcomes.count("bad")) > 100
    assert capfd.readouterr() == ("", "")
