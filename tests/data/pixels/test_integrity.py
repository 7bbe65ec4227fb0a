"""Damaged images are refused, even those that Pillow decodes, and intact ones are not."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from helpers.damaged_images import (
    END,
    drawn_photo,
    exif,
    images_of_all_formats,
    outcome,
    refused_jpegs,
    save,
    segment,
    sound_jpegs,
    with_one_byte_changed,
)
from helpers.runs import exit_status
from PIL import Image, ImageFile

from hf_fasttrain.data.pixels.decode import DECODING_ERRORS, decode, read_pixels
from hf_fasttrain.data.pixels.integrity import strict_pillow
from hf_fasttrain.data.pixels.jpeg import decode_complete, normalize_header
from hf_fasttrain.data.pixels.prepare import PIXELS_VERSION, Preparation
from hf_fasttrain.inference import predict_images
from hf_fasttrain.utils.errors import DataError

PHOTO = drawn_photo(1)
SOUND = sound_jpegs(PHOTO)
FORMATS = images_of_all_formats(PHOTO)
DECODERS = {"simplejpeg": {}, "Pillow": {"pillow": True}, "reduced": {"at_least": 20}}
WITH_CHECKSUMS = [name for name in FORMATS if name.startswith("PNG")] + ["TIFF, deflate"]


def libjpeg_warning(data: bytes) -> str | None:
    try:
        simplejpeg.decode_jpeg(data)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", WITH_CHECKSUMS)
def test_with_checksums_one_changed_byte_is_refused_or_changes_no_pixel(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    original = read_pixels(FORMATS[name])
    outcomes = [outcome(data, original) for data in with_one_byte_changed(FORMATS[name], 60)]
    assert outcomes.count("refused") >= 20
    assert set(outcomes) <= {"refused", "same"}


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("JPEG,") and name != "JPEG"])
def test_images_that_pillow_rejects_are_rejected(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """After raising, Pillow forgets the undecoded rest: a second load returns the decoded part, with the rest black."""
    data = FORMATS[name]
    damaged = [*with_one_byte_changed(data, 25, seed=1), *(data[: len(data) * part // 10] for part in range(1, 10))]
    for changed in damaged:
        try:
            Image.open(io.BytesIO(changed)).load()
        except DECODING_ERRORS:
            with pytest.raises(DataError, match="can't be decoded"):
                read_pixels(changed)


def test_a_wrong_checksum_that_pillow_skips_is_found() -> None:
    data = FORMATS["PNG with alpha"]
    end = data.index(b"IEND") - 8
    changed = data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]
    Image.open(io.BytesIO(changed)).load()
    with pytest.raises(DataError, match=r"broken PNG file \(bad checksum of its image data\)"):
        read_pixels(changed)


def test_only_the_first_frame_of_an_animation_must_be_intact() -> None:
    data = FORMATS["PNG, animated"]
    offset = data.index(b"fdAT") + 400
    changed = data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]
    assert np.array_equal(read_pixels(changed), np.asarray(PHOTO))


def test_a_jpeg_in_a_tiff_is_checked_like_any_other() -> None:
    data = bytearray(FORMATS["TIFF, JPEG"])
    offsets = Image.open(io.BytesIO(data)).tag_v2[273], Image.open(io.BytesIO(data)).tag_v2[279]
    middle = offsets[0][0] + offsets[1][0] // 2
    data[middle : middle + 2] = END
    Image.open(io.BytesIO(data)).load()
    with pytest.raises(DataError, match="premature end of data segment"):
        read_pixels(bytes(data))


def test_load_truncated_images_set_by_a_library_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name, data in FORMATS.items():
        truncated = data[: len(data) // 2]
        with pytest.raises(DataError, match="can't be decoded"):
            read_pixels(truncated)
        if name.startswith("JPEG,"):
            with pytest.raises(DataError, match="can't be decoded"):
                read_pixels(truncated, pillow=True)
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # it is restored


def test_pillow_stays_strict_until_the_last_thread_has_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with strict_pillow():
            inside.set()
            leave.wait(10)
            seen.append(ImageFile.LOAD_TRUNCATED_IMAGES)

    thread = threading.Thread(target=other)
    with strict_pillow():
        thread.start()
        inside.wait(10)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    leave.set()
    thread.join()
    assert seen == [False]
    assert ImageFile.LOAD_TRUNCATED_IMAGES


KINDS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-2],
    "cut, with an end": lambda data: data[: len(data) // 2] + END,
    "cut, with an end and more": lambda data: data[: len(data) // 2] + END + data,
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_with_parts_missing_is_damaged(kind: str, decoder: str) -> None:
    plain = (
        "plain",
        "progressive",
        "grey",
        "CMYK",
        "YCCK",
        "restart markers",
        "orientation 6",
        "unknown Adobe transform",
    )
    for name in (*plain, "JFIF of the future", "several pages" if kind == "cut, with an end" else "plain"):
        data = SOUND[name]
        if name == "several pages":
            data = data[: data.index(END) + 2]
        with pytest.raises(DataError, match=r"can't be decoded: .*[Pp]remature end.*; repair it or remove it"):
            read_pixels(KINDS[kind](data), **DECODERS[decoder])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.replace(b"\xff\xd1", b"\xff\xd4", 1), "found marker 0xd4 instead of RST1"),
        (
            lambda data: data[: (offset := data.index(b"\xff\xd0") + 2)] + b"\xff\0" * 9 + data[offset:],
            "bad Huffman code",
        ),
    ],
)
def test_a_wrong_restart_marker_and_a_bad_code_are_damage(
    change: Callable[[bytes], bytes], message: str, decoder: str
) -> None:
    damaged = change(SOUND["restart markers"])
    Image.open(io.BytesIO(damaged)).load()
    with pytest.raises(DataError, match=message):
        read_pixels(damaged, **DECODERS[decoder])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("change", ["cut", "wrong restart marker"])
def test_damage_after_a_harmless_warning_is_found(change: str, decoder: str) -> None:
    """libjpeg reports only its first warning."""
    data = SOUND["bytes before a restart"]
    if change == "cut":
        damaged = data[: data.rindex(b"\xff\xd0") + 6] + END
    else:
        offset = data.rindex(b"\xff\xd1")
        damaged = data[:offset] + b"\xff\xd5" + data[offset + 2 :]
    assert "extraneous bytes" in str(libjpeg_warning(damaged))
    with pytest.raises(DataError, match=r"premature end of data segment|found marker"):
        read_pixels(damaged, **DECODERS[decoder])


def test_no_intact_photo_is_refused() -> None:
    assert refused_jpegs(SOUND) == []


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("bytes before the end", "extraneous bytes before marker 0xd9"),
        ("bytes before a restart", "extraneous bytes before marker 0xd0"),
        ("bytes between segments", "extraneous bytes before marker"),
        ("unknown Adobe transform", "Unknown Adobe color transform"),
        ("JFIF of the future", "unknown JFIF revision"),
    ],
)
def test_harmless_warnings_do_not_change_pixels(name: str, warning: str) -> None:
    assert warning in str(libjpeg_warning(SOUND[name]))
    plain = SOUND["restart markers" if "restart" in name else "plain"]
    assert np.array_equal(decode(SOUND[name]), decode(plain))


def test_unusual_parameters_of_a_scan_are_harmless() -> None:
    offset = SOUND["plain"].index(b"\xff\xda") + 13
    modified = SOUND["plain"][: offset - 1] + b"\0" + SOUND["plain"][offset:]
    assert "Invalid SOS parameters" in str(libjpeg_warning(modified))
    assert np.array_equal(decode(modified), decode(SOUND["plain"]))
    with pytest.raises(DataError, match=r"[Pp]remature end"):
        read_pixels(modified[:-60] + END)


def test_pillow_decodes_complete_jpegs_that_simplejpeg_cannot_read() -> None:
    data = save(PHOTO.resize((96, 72)), keep_rgb=True, subsampling=0)  # of one Huffman table, so in any order of blocks
    offset = data.index(b"\xff\xc0") + 11
    modified = bytearray(data)
    modified[offset : offset + 9 : 3] = b"\x31\x11\x11"  # the channels at 3 x 1, 1 x 1 and 1 x 1
    assert "subsampling" in str(libjpeg_warning(modified))
    assert np.array_equal(decode(bytes(modified)), np.asarray(Image.open(io.BytesIO(modified))))
    with pytest.raises(DataError, match="premature end of data segment"):
        read_pixels(bytes(modified[: len(modified) // 2]) + END)


def test_pixels_of_cmyk_and_rotated_jpegs_are_pillows() -> None:
    for name in ("CMYK", "YCCK", "rotated CMYK", "CMYK without Adobe's marker", "orientation 5", "rotated by XMP"):
        assert np.array_equal(decode(SOUND[name]), decode(SOUND[name], pillow=True)), name


def test_reduced_decoding_applies_the_orientation() -> None:
    photo = PHOTO.resize((352, 288))
    upright, turned = save(photo), save(photo, exif=exif(6))
    assert np.array_equal(decode(turned, at_least=100), np.rot90(decode(upright, at_least=100), -1))


def test_a_normal_header_is_not_changed() -> None:
    for name in ("plain", "CMYK", "several pages", "padding before markers", "long profile"):
        assert normalize_header(SOUND[name]) is SOUND[name]
    unknown = normalize_header(SOUND["unknown Adobe transform, CMYK"])
    assert normalize_header(unknown) is unknown
    assert libjpeg_warning(unknown) is None


def test_markers_inside_segments_are_ignored() -> None:
    data = SOUND["plain"][:2] + segment(0xE5, b"\xff\xd3\xff\xd9\xff\xda") + SOUND["plain"][2:]
    assert np.array_equal(decode_complete(data, decode), decode(SOUND["plain"]))


def test_a_cache_with_pixels_of_damaged_images_is_not_used_again() -> None:
    assert Preparation().key()["pixels_version"] == PIXELS_VERSION >= 2


def test_check_training_and_predict_refuse_the_same_images(
    image_folder: Path, tmp_path: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photo, red = drawn_photo(3, 32, 32), image_folder / "train" / "red"
    png, jpeg = FORMATS["PNG"], save(photo, quality=95)
    damaged = [red / "damaged.png", red / "damaged.jpg"]
    damaged[0].write_bytes(png[:2000] + bytes([png[2000] ^ 1]) + png[2001:])
    damaged[1].write_bytes(jpeg[: len(jpeg) // 2] + END)
    settings = [f"data.dataset={image_folder}", f"output_dir={tmp_path / 'run'}", "train.duration=1 epochs"]
    recipe = str(write_recipe())
    assert exit_status(["check", recipe, *settings, "--images"]) == 2
    assert "2 of 26 images are corrupt" in capsys.readouterr().err.replace("\n", " ")
    assert exit_status([recipe, *settings, "data.max_bad_fraction=0.5"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["bad_images"] == 2
    for path in damaged:
        with pytest.raises(DataError, match=f"{path.name}: can't be decoded"):
            predict_images(tmp_path / "run", [str(path)])
    capsys.readouterr()
    assert exit_status(["predict", str(tmp_path / "run"), str(red), "--json"]) == 2
    printed = capsys.readouterr()
    assert {Path(row["image"]) for row in json.loads(printed.out)} == {*red.iterdir()} - {*damaged}
    assert f"2 of {len(list(red.iterdir()))} images skipped:\n  image {red / 'damaged.jpg'}: can't be" in printed.err
