"""The check of all images before training: corrupt, duplicate, unusual, too small or missing ones."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers.processes import reset_accelerate
from PIL import Image

from hf_fasttrain.cli import main
from hf_fasttrain.data.source.copies import contradicting_copies
from hf_fasttrain.data.source.dataset import Source, Split, load_source
from hf_fasttrain.data.source.multi_label import MultiLabels
from hf_fasttrain.data.source.records import Records
from hf_fasttrain.data.source.scan import (
    CHUNK,
    CorruptImage,
    SplitScan,
    class_balance,
    describe_scan,
    find_duplicates,
    image_names,
    scan_split,
)
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.format import format_bytes

RNG = np.random.default_rng(0)
COLOUR = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))


def encoded(image: Image.Image = COLOUR, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def small_png(width: int, height: int, bits: int) -> bytes:
    """Return an RGB PNG whose header has this size and depth, with black pixels for 1 x 1."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b"")


def split_of(images: list[bytes | None], name: str = "train", labels: np.ndarray | None = None) -> Split:
    """Return a split of encoded images; None is a missing one."""
    rows = [None if data is None else {"bytes": data, "path": None} for data in images]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    dataset = datasets.Dataset.from_dict({"image": rows}, features=features)
    return Split(name, Records(dataset), np.zeros(len(images), np.int64) if labels is None else labels)


def scan(split: Split, workers: int = 0) -> SplitScan:
    return scan_split(split, workers=workers, progress=lambda number: None)


def as_dict(result: SplitScan) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(result).items()}


def test_every_kind_of_corruption_is_found() -> None:
    intact = {form: encoded(form=form) for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")}
    bad = {
        "0 bytes": b"",
        "not an image": b"<html>404</html>",
        "decompression bomb": small_png(20_000, 20_000, bits=8),
        "missing": None,
        "truncated": intact["JPEG"][:-200],
        **{form: data[: len(data) // 2] for form, data in intact.items()},
    }
    result = scan(split_of([intact["PNG"], *bad.values(), intact["JPEG"]]))
    assert [image.row for image in result.bad] == list(range(1, len(bad) + 1))
    assert all(image.split == "train" and image.path is None for image in result.bad)
    reasons = dict(zip(bad, (image.error for image in result.bad), strict=True))
    for kind in ("0 bytes", "not an image", "decompression bomb", "missing", "truncated"):
        assert kind in reasons[kind]
    assert not any("repair it" in reason or "object at 0x" in reason for reason in reasons.values()), reasons
    assert result.good.tolist() == [0, len(bad) + 1]
    assert result.bad_fraction == len(bad) / (len(bad) + 2)


def test_files_are_named(image_folder: Path) -> None:
    red = image_folder / "train" / "red"
    (red / "3.jpg").write_bytes((red / "3.jpg").read_bytes()[:300])
    source = load_source(str(image_folder))
    (red / "5.jpg").unlink()
    result = scan(source.train)
    assert [(image.row, image.path) for image in result.bad] == [(19, f"{red}/3.jpg"), (21, f"{red}/5.jpg")]
    assert "truncated" in result.bad[0].error.lower()
    assert result.bad[1].error == "can't be read: No such file or directory"
    assert image_names(source.train, np.array([19, 0])) == [f"{red}/3.jpg", f"{image_folder}/train/blue/0.jpg"]
    assert image_names(source.train, np.array([], np.int64)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_all_chunks_are_scanned_with_any_number_of_workers(workers: int) -> None:
    number = 2 * CHUNK + 5
    images: list[bytes | None] = [encoded(COLOUR.crop((0, 0, 9 + i % 20, 12))) for i in range(number)]
    images[70] = b"no"
    split = split_of(images)
    state, progress = torch.get_rng_state(), []
    result = scan_split(split, workers=workers, progress=progress.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert progress == [CHUNK, CHUNK, 5]
    assert result.bad == [CorruptImage("train", 70, None, "not an image")]
    assert result.num_images == number
    assert result.widths.tolist() == [0 if i == 70 else 9 + i % 20 for i in range(number)]
    assert result.encoded_bytes.tolist() == [0 if i == 70 else len(data or b"") for i, data in enumerate(images)]
    assert as_dict(result) == as_dict(scan(split))


def test_a_worker_that_dies_is_one_message() -> None:
    class Killed(Split):
        def records(self, indices: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RunError, match=r"split 'train': a process that decoded images died, .* lower data.workers"):
        scan(Killed("train", Records(None), np.zeros(3, np.int64)), workers=1)


def test_a_split_without_images_is_reported() -> None:
    result = scan(split_of([]))
    assert (result.num_images, result.bad_fraction, len(result.good)) == (0, 0.0, 0)
    damaged = split_of([b"", b""])
    result = scan(damaged)
    lines = describe_scan(result, class_balance(damaged, ["a"]), find_duplicates([result]), 32)
    assert (lines["corrupt"], lines["width: min, median, max"], lines["formats"]) == ("2", "none", "none")


def test_formats_and_peculiarities() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    deep = Image.fromarray(RNG.integers(0, 65536, (20, 30), dtype=np.uint16))
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    images = {
        "plain": encoded(form="JPEG"),
        "upright": encoded(form="JPEG", exif=upright),
        "CMYK": encoded(COLOUR.convert("CMYK"), "JPEG"),
        "palette": encoded(COLOUR.quantize(16)),
        "16-bit": encoded(deep),
        "16-bit TIFF": encoded(deep, "TIFF"),
        "32-bit": encoded(Image.fromarray(RNG.random((20, 30), np.float32)), "TIFF"),
        "EXIF rotation": encoded(form="JPEG", exif=exif),
        "EXIF rotation, PNG": encoded(exif=exif),
        "several frames": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "one frame": encoded(form="GIF"),
    }
    result = scan(split_of(list(images.values())))
    assert result.bad == []
    assert result.formats == Counter(JPEG=4, PNG=3, TIFF=2, GIF=2)
    assert result.modes["CMYK"] == 1
    expected = {"CMYK": 1, "palette": 3, "16-bit": 2, "32-bit": 1, "EXIF rotation": 2, "several frames": 1}
    assert result.unusual == Counter(expected)
    turned = [name.startswith("EXIF") for name in images]
    assert result.widths.tolist() == [20 if turn else 30 for turn in turned]
    assert result.heights.tolist() == [30 if turn else 20 for turn in turned]


def test_sixteen_bit_colour_is_reported() -> None:
    """Pillow opens it as 8-bit RGB and can't write it."""
    result = scan(split_of([small_png(1, 1, bits=16)]))
    assert (result.bad, result.unusual) == ([], Counter({"16-bit": 1}))


def test_sizes_and_bytes() -> None:
    images = [encoded(Image.new("RGB", size)) for size in ((40, 32), (100, 20), (31, 50))]
    split = split_of([*images, b"no"])
    result = scan(split)
    assert result.num_smaller(32) == 2
    assert result.decoded_bytes.tolist() == [3840, 6000, 4650, 0]
    lines = describe_scan(result, class_balance(split, ["a"]), find_duplicates([result]), 32)
    assert lines["width: min, median, max"] == "31, 40, 100"
    assert lines["height: min, median, max"] == "20, 32, 50"
    assert lines["short side below 32 px, upscaled"] == "2"
    assert lines["decoded (RGB): mean, total"] == "4.83 kB, 14.5 kB"
    assert lines["encoded: mean, total"].endswith(f", {format_bytes(sum(map(len, images)))}")


@pytest.mark.parametrize(("side", "text"), [(1000, "3.00 MB, 6.00 MB"), (20_000, "1.20 GB, 2.40 GB")])
def test_large_sizes_have_larger_units(side: int, text: str) -> None:
    widths = np.full(2, side)
    result = SplitScan(
        "train", [], np.zeros((2, 2), np.uint64), widths, widths, widths, Counter(), Counter(), Counter()
    )
    lines = describe_scan(result, class_balance(split_of([b"", b""]), ["a"]), find_duplicates([result]), 32)
    assert lines["decoded (RGB): mean, total"] == text


def test_duplicates_within_and_between_splits() -> None:
    a, b, c, d, e = (encoded(Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(5))
    splits = [
        split_of([a, b, b"", a, a, c]),
        split_of([b"", d, c, d, a], "validation"),
        split_of([e], "test"),
    ]
    result = find_duplicates([scan(split) for split in splits])
    assert result.within == {"train": 2, "validation": 1, "test": 0}
    assert [(overlap.train, overlap.other) for overlap in result.overlaps] == [
        ("train", "validation"),
        ("train", "test"),
    ]
    assert result.overlaps[0].pairs.tolist() == [[5, 2], [0, 4]]
    assert result.overlaps[1].pairs.tolist() == []
    assert image_names(splits[1], result.overlaps[0].pairs[:, 1]) == ["validation row 2", "validation row 4"]


def test_copies_with_different_labels_are_named() -> None:
    a, b, c, d = (encoded(Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(4))
    splits = [
        split_of([a, b, a, b"", b, c], labels=np.array([0, 1, 2, 0, 1, 0])),
        split_of([b"", c, d, b], "validation", np.array([2, 1, 0, 1])),
    ]
    number, result = contradicting_copies(splits, [scan(split) for split in splits], ["cat", "dog", "emu"])
    assert number == 2
    assert sorted(result) == [
        [("train row 0", "cat"), ("train row 2", "emu")],
        [("train row 5", "cat"), ("validation row 1", "dog")],
    ]
    assert contradicting_copies(splits[1:], [scan(splits[1])], ["cat", "dog", "emu"]) == (0, [])


def test_copies_with_several_labels_each() -> None:
    a, b = (encoded(Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(2))
    hot = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]])
    split = split_of([a, a, b, b, a], labels=MultiLabels.of_pairs(*np.nonzero(hot), *hot.shape))
    number, result = contradicting_copies([split], [scan(split)], ["cat", "dog", "emu"])
    assert (number, result) == (1, [[("train row 0", "cat + dog"), ("train row 1", "no class")]])


def test_contradicting_copies_are_those_of_a_plain_search() -> None:
    labels, contents = RNG.integers(0, 3, 300), RNG.integers(0, 120, 300)
    split, ones = split_of([b""] * 300, labels=labels), np.ones(300, np.int64)
    hashes = np.stack([contents, contents], axis=1).astype(np.uint64)
    result = SplitScan("train", [], hashes, ones, ones, ones, Counter(), Counter(), Counter())
    labels_of = {content: set(labels[contents == content].tolist()) for content in set(contents.tolist())}
    number, text = contradicting_copies([split], [result], ["a", "b", "c"], most=7)
    assert number == sum(len(known) > 1 for known in labels_of.values())
    assert len(text) == 7


def test_duplicates_among_many_hashes_are_found() -> None:
    hashes = RNG.integers(0, 40, (1000, 2)).astype(np.uint64)
    ones = np.ones(1000, np.int64)
    scans = [
        SplitScan(name, [], part, ones[: len(part)], ones[: len(part)], ones, Counter(), Counter(), Counter())
        for name, part in (("train", hashes[:700]), ("validation", hashes[700:]))
    ]
    result = find_duplicates(scans)
    known = set(map(tuple, hashes[:700].tolist()))
    also = [row for row, key in enumerate(hashes[700:].tolist()) if tuple(key) in known]
    assert result.within["train"] == 700 - len(known)
    assert result.overlaps[0].pairs[:, 1].tolist() == also
    assert all((hashes[left] == hashes[700 + right]).all() for left, right in result.overlaps[0].pairs)


def test_class_balance_is_reported() -> None:
    names = ["a", "b", "c", "d", "e", "f", "g", "h"]
    balance = class_balance(split_of([b""] * 12, labels=np.array([0, 0, 0, 1, 1, 2, 3, 4, 4, 6, 6, 6])), names)
    assert balance.counts.tolist() == [3, 2, 1, 1, 2, 0, 3, 0]
    assert balance.missing == ["f", "h"]
    assert balance.rarest() == [("c", 1), ("d", 1), ("b", 2), ("e", 2), ("a", 3)]
    multi_label = np.array([[1, 0, 1], [1, 0, 0]], np.float32)
    balance = class_balance(split_of([b"", b""], labels=multi_label), names[:3])
    assert (balance.counts.tolist(), balance.missing) == ([2, 0, 1], ["b"])


@pytest.fixture
def check(
    write_recipe: Callable[..., Path],
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `check RECIPE --images` on the image folder: (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        reset_accelerate()
        with pytest.raises(SystemExit) as error:
            main(["check", str(write_recipe()), f"data.dataset={image_folder}", *arguments])
        output = capsys.readouterr()
        return int(error.value.code or 0), output.out, output.err

    return run


def row_of(printed: str, key: str) -> list[str]:
    """Return the cells of a table's row."""
    lines = (line.strip("│ ") for line in printed.splitlines())
    return [cell.strip() for cell in next(line for line in lines if line.startswith(key)).split("│")]


def test_a_clean_folder(check: Callable[..., tuple[int, str, str]]) -> None:
    status, printed, errors = check("--images")
    assert (status, errors) == (0, "")
    assert row_of(printed, "corrupt") == ["corrupt", "0", "0"]
    assert row_of(printed, "short side below 32") == ["short side below 32 px, upscaled", "24", "12"]
    assert row_of(printed, "height: min")[1:] == ["20, 23.5, 27", "20, 21.5, 23"]
    assert row_of(printed, "images per class")[1:] == ["8, 8, 8", "4, 4, 4"]
    assert row_of(printed, "formats")[1:] == ["JPEG 24", "JPEG 12"]
    assert "is valid: 2 steps per epoch" in printed
    assert "warning" not in printed
    assert "every image" not in check()[1]


def test_corrupt_images_are_listed_and_refused(
    check: Callable[..., tuple[int, str, str]], image_folder: Path, tmp_path: Path
) -> None:
    blue = image_folder / "train" / "blue"
    for number in range(21):
        (blue / f"x{number}.jpg").write_bytes(b"")
    written = tmp_path / "bad.jsonl"
    status, printed, errors = check("--images", "--list", str(written))
    assert status == 2
    assert errors.startswith("error: split 'train': 21 of 45 images are corrupt; training would stop, since ")
    assert "data.max_bad_fraction is 0.01" in errors
    assert "is valid" not in printed
    assert "corrupt images: 21, the first 20" in printed
    assert printed.count("0 bytes") == 20
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(lines) == 21
    assert lines[0] == {"split": "train", "row": 8, "path": f"{blue}/x0.jpg", "error": "0 bytes"}
    status, printed, _ = check("--images", "data.max_bad_fraction=0.5", "data.workers=2")
    assert status == 0
    assert row_of(printed, "corrupt")[1:] == ["21", "0"]


def test_leaks_and_missing_classes_are_reported(check: Callable[..., tuple[int, str, str]], image_folder: Path) -> None:
    train, validation = image_folder / "train", image_folder / "validation"
    shutil.rmtree(validation / "green")
    for number in range(4):
        for name in ("blue", "red"):
            shutil.copy(train / name / f"{number}.jpg", validation / name / f"{number}.jpg")
    for number in range(4):
        shutil.copy(train / "red" / "4.jpg", validation / "blue" / f"copy{number}.jpg")
    status, printed, _ = check("--images")
    assert status == 0
    assert "warning: 1 image has copies with different labels; correct them or remove them:" in printed
    assert f"  {train}/red/4.jpg (red) = {validation}/blue/copy0.jpg (blue)\n" in printed
    assert "note: split 'validation' has no image of green" in printed
    warning = "warning: 12 of 12 images of split 'validation' are in split 'train' too: its accuracy will be overstated"
    assert warning in printed
    pairs = [line.strip() for line in printed.splitlines() if " = " in line and "(red)" not in line]
    assert len(pairs) == 10
    assert pairs[0] == f"{validation}/blue/0.jpg = {train}/blue/0.jpg"
    assert row_of(printed, "duplicates within")[1:] == ["0", "3"]
    assert row_of(printed, "rarest")[1:] == ["blue 8, green 8, red 8", "red 4, blue 8"]
    assert row_of(printed, "classes without")[1:] == ["0", "1"]


def test_wrong_uses_of_list_are_refused(check: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    cases = {
        ("--list", "x.jsonl"): "--list writes what --images finds; give both",
        ("--images", "--list", str(tmp_path / "there")): "exists already; give another file to write",
        ("--images", "--list", str(tmp_path / "no" / "x.jsonl")): "no is not a folder",
    }
    for arguments, expected in cases.items():
        status, _, errors = check(*arguments)
        assert status == 2
        assert expected in errors


def test_images_without_paths_of_a_held_out_part() -> None:
    source: Source = load_source("digits")
    scans = [scan(source.train, workers=2), scan(source.evaluation)]
    assert [result.bad for result in scans] == [[], []]
    assert sum(result.num_images for result in scans) == 1797
    assert scans[0].formats == Counter(PNG=scans[0].num_images)
    assert find_duplicates(scans).within.keys() == {"train", "held-out 10% of train"}
