"""Folders with metadata.csv, .jsonl or .parquet: class names as in the file, splits by folder."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from hf_fasttrain.data.source.dataset import Source, load_source
from hf_fasttrain.utils.errors import DataError

# Texts that pandas, or Arrow's JSON reader, converts to numbers, dates, booleans or null.
LOOK_LIKE_OTHERS = ["007", "1e3", "2024-01-01", "N/A", "NA", "None", "True", "nan", "null"]


def write(folder: Path, labels: Sequence[Any], suffix: str = "csv", *, inside: str = "") -> None:
    """Write an image and a row of metadata for each label."""
    (folder / inside).mkdir(parents=True, exist_ok=True)
    names = [f"{inside}{number}.png" for number in range(len(labels))]
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    file = folder / f"metadata.{suffix}"
    rows = list(zip(names, labels, strict=True))
    if suffix == "csv":
        file.write_text("file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    elif suffix == "jsonl":
        file.write_text("".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in rows))
    else:
        pyarrow.parquet.write_table(pa.table({"file_name": names, "label": list(labels)}), file)


def labels_of(source: Source) -> dict[str, str]:
    """Return file name -> class name of both splits."""
    class_of = {}
    for split in (source.train, source.evaluation):
        for record, label in zip(split.records(range(len(split))), split.labels, strict=True):
            assert Path(record["path"]).is_file()
            class_of[Path(record["path"]).name] = source.class_names[label]
    return class_of


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_class_names_are_those_of_the_file(suffix: str, tmp_path: Path) -> None:
    labels = LOOK_LIKE_OTHERS * 2
    write(tmp_path, labels, suffix)
    source = load_source(str(tmp_path))
    assert source.class_names == LOOK_LIKE_OTHERS
    assert labels_of(source) == {f"{number}.png": label for number, label in enumerate(labels)}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_integers_are_classes_in_numerical_order(suffix: str, tmp_path: Path) -> None:
    labels = [10, 9, 2] * 4
    write(tmp_path, labels, suffix)
    source = load_source(str(tmp_path))
    assert source.class_names == ["2", "9", "10"]
    assert labels_of(source) == {f"{number}.png": str(label) for number, label in enumerate(labels)}


def test_lists_and_values_of_several_types_in_json(tmp_path: Path) -> None:
    write(tmp_path, [["a"], ["b", "a"]] * 6, "jsonl")
    assert load_source(str(tmp_path)).multi_label
    write(tmp_path, [1, "a", True] * 4, "jsonl")
    assert load_source(str(tmp_path)).class_names == ["1", "a", "true"]


@pytest.mark.parametrize(("suffix", "missing"), [("csv", ""), ("jsonl", None), ("parquet", None)])
def test_a_missing_label_is_named_with_its_row(suffix: str, missing: Any, tmp_path: Path) -> None:
    write(tmp_path, [3, 4, missing, 3], suffix)
    with pytest.raises(DataError, match="column 'label': row 2 has no label; remove such rows"):
        load_source(str(tmp_path))


def test_splits_are_folders_and_not_words_in_file_names(tmp_path: Path) -> None:
    write(tmp_path / "train", ["a", "b"] * 3, inside="test tubes/")
    write(tmp_path / "val", ["b", "a"], "jsonl")
    source = load_source(str(tmp_path))
    assert (source.train.name, len(source.train)) == ("train", 6)
    assert (source.evaluation.name, len(source.evaluation)) == ("validation", 2)
    assert source.evaluation.labels.tolist() == [1, 0]


def test_one_file_may_list_the_images_of_all_splits(tmp_path: Path) -> None:
    lines = ["file_name,kind,label"]
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        for number, label in enumerate(("a", "b")):
            Image.new("RGB", (4, 4)).save(tmp_path / split / f"{number}.png")
            lines.append(f'{split}/{number}.png,"x, y",{label}')
    (tmp_path / "metadata.csv").write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    source = load_source(str(tmp_path), test_split="test")
    assert [len(split) for split in (source.train, source.evaluation, source.test or [])] == [2, 2, 2]


MISTAKES: dict[str, tuple[str, str, str]] = {
    "too many cells": (
        "metadata.csv",
        "file_name,label\na.png,a, b\n",
        "line 2: has 3 cells, the header 2; quote cells",
    ),
    "no file names": (
        "metadata.csv",
        "name;label\na.png;b\n",
        "no column file_name, which names the images; it has name;",
    ),
    "a path outside": (
        "metadata.csv",
        "file_name,label\n../a.png,b\n",
        r"row 0 has file_name '\.\./a.png'; give an image",
    ),
    "an absolute path": (
        "metadata.jsonl",
        '{"file_name": "/etc/passwd", "label": 1}',
        "row 0 has file_name '/etc/passw",
    ),
    "an address": ("metadata.jsonl", '{"file_name": "file:///x.png", "label": 1}', "give an image's path below"),
    "no file name": ("metadata.csv", "file_name,label\n,b\n", "row 0 has file_name None; give an image's path below"),
    "broken JSON": ("metadata.jsonl", '{"file_name": \n', "metadata.jsonl, line 1: not valid JSON"),
    "no object": ("metadata.jsonl", "[1]\n", r"line 1: must be a JSON object with file_name; got \[1\]"),
    "an open quote": ("metadata.csv", 'file_name,label\n"a.png,b\n', "can't be read as csv: unexpected end of data"),
    "a column twice": ("metadata.csv", "file_name,label,label\na.png,b,c\n", "has column 'label' twice; rename one"),
    "a key twice": (
        "metadata.jsonl",
        '{"file_name": "a.png", "label": 1, "label": 2}',
        "line 1: has column 'label' twice; rename one",
    ),
    "no UTF-8": (
        "metadata.csv",
        "file_name,label\na.png,\udce9\n",
        "it is not UTF-8 .byte 0xe9 at 22.; save it as UTF-8",
    ),
    "no parquet": ("metadata.parquet", "no", "can't be read as parquet"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_metadata_are_one_message(case: str, tmp_path: Path) -> None:
    name, text, expected = MISTAKES[case]
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=expected) as messages:
        load_source(str(tmp_path))
    assert str(tmp_path) in str(messages.value)


def test_metadata_that_are_a_link_to_a_file_of_the_system_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").symlink_to("/proc/self/environ")
    with pytest.raises(DataError, match=r"metadata.csv: can't be read as csv: 0 bytes$"):
        load_source(str(tmp_path))


def test_half_characters_in_json_are_replaced_but_in_names_of_files(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    for file in (name, "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / file)
    lines = [{"file_name": name, "label": "x\ud800", "\udfff": 1}, {"file_name": "b.png", "label": "y", "\udfff": 2}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines * 2)))
    source = load_source(str(tmp_path), eval_fraction=0.5)
    assert source.class_names == ["x\ufffd", "y"]
    assert name in {os.path.basename(record["path"]) for record in source.train.records(range(len(source.train)))}


def test_two_metadata_files_in_a_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"])
    write(tmp_path, ["a", "b"], "jsonl")
    with pytest.raises(DataError, match=r"has metadata.csv and metadata.jsonl; keep one of them"):
        load_source(str(tmp_path))


def test_metadata_of_something_else_leave_class_folders_as_they_are(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write(tmp_path / name, ["x"] * 4)
        (tmp_path / name / "metadata.csv").unlink()
    (tmp_path / "metadata.csv").write_text("id,author\n1,me\n")
    (tmp_path / "cat" / "metadata.jsonl").write_text("not even JSON\n")
    source = load_source(str(tmp_path), eval_fraction=0.25)
    assert (source.class_names, len(source.train)) == (["cat", "dog"], 6)
    (note,) = source.notes
    assert "2 tables or metadata of something else (cat/metadata.jsonl: no column file_name)" in note
    (tmp_path / "metadata.csv").write_text("file_name,label\nIMG_1.NEF,x\nIMG_2.NEF,y\n")
    with pytest.raises(
        DataError, match=r"metadata.csv: none of the 2 images that it lists is there, such as IMG_1.NEF"
    ):
        load_source(str(tmp_path))


def test_what_metadata_do_not_list_and_what_is_not_there_is_said(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"] * 6)
    lines = (tmp_path / "metadata.csv").read_text().splitlines()
    (tmp_path / "metadata.csv").write_text("\n".join([*lines[:-1], "gone.png,a", lines[1]]))
    source = load_source(str(tmp_path))
    assert (
        f"{tmp_path}: 12 images; left out: 1 image that metadata list, but is not there (gone.png), "
        "1 image that metadata do not list (11.png)"
    ) in source.notes
    assert f"{tmp_path}: 1 images are listed more than once (0.png)" in source.notes
    with pytest.raises(DataError, match="1 of 13 images of split 'train' are left out"):
        load_source(str(tmp_path), max_bad_fraction=0.05)


@pytest.mark.parametrize("written", ["sub\\{}é.png", "./x/../sub/{}é.png", "sub/{}é.png"])
def test_paths_may_be_written_by_other_systems(written: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    rows = []
    for number in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / "sub" / unicodedata.normalize("NFD", f"{number}é.png"))
        rows.append(f"{written.format(number)},{'ab'[number % 2]}")
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]), encoding="utf-8")
    assert len(labels_of(load_source(str(tmp_path), eval_fraction=0.5))) == 4


def test_metadata_of_an_unused_split_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "train", ["a", "b"] * 3)
    write(tmp_path / "validation", ["a", "b"])
    write(tmp_path / "test", ["a"])
    (tmp_path / "test" / "metadata.csv").write_text('file_name,label\n"0.png,a\n')
    assert len(load_source(str(tmp_path)).train) == 6
    with pytest.raises(DataError, match="can't be read as csv"):
        load_source(str(tmp_path), test_split="test")
