"""Tables of paths and labels: what a cell means, which column is what, and what is said about odd rows."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from hf_fasttrain.data.source.dataset import Source, Split, load_source
from hf_fasttrain.data.source.evaluation_split import load_evaluation_split
from hf_fasttrain.data.source.fingerprint import fingerprint
from hf_fasttrain.utils.errors import DataError

LOOK_LIKE_OTHERS = ["007", "1.0", "1e3", "2024-01-01", "NA", "None", "nan", "null", "true"]


def draw(folder: Path, names: Sequence[str]) -> None:
    """Write a small image to each path below a folder."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number % 256, 0, 0)).save(folder / name)


def write(folder: Path, lines: Sequence[str], name: str = "labels.csv", *, encoding: str = "utf-8") -> str:
    """Write a table and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return str(folder / name)


def table(folder: Path, labels: Sequence[Any], *, header: str = "image,label", sign: str = ",") -> str:
    """Write an image in images/ and a row for each label, and return the table's path."""
    names = [f"images/{number}.png" for number in range(len(labels))]
    draw(folder, names)
    return write(folder, [header, *(f"{name}{sign}{label}" for name, label in zip(names, labels, strict=True))])


def labels_of(source: Source) -> dict[str, str]:
    """Return file name -> class name of the training and the evaluation split."""
    class_of = {}
    for split in (source.train, source.evaluation):
        for path, label in zip(paths_of(split), split.labels, strict=True):
            class_of[path.name] = source.class_names[label]
    return class_of


def paths_of(split: Split) -> list[Path]:
    """Return the paths of a split."""
    return [Path(record["path"]) for record in split.records(np.arange(len(split)))]


def note(source: Any, words: str) -> str:
    """Return the note with these words in it."""
    found = [text for text in source.notes if words in text]
    assert len(found) == 1, (words, source.notes)
    return found[0]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_labels_are_classes_as_they_are_written(suffix: str, tmp_path: Path) -> None:
    labels = LOOK_LIKE_OTHERS * 2
    names = [f"{number}.png" for number in range(len(labels))]
    draw(tmp_path, names)
    rows = [("file", "label"), *zip(names, labels, strict=True)]
    lines = [{"csv": ",", "tsv": "\t"}.get(suffix, ",").join(row) for row in rows]
    if suffix == "jsonl":
        lines = [json.dumps({"file": name, "label": label}) for name, label in rows[1:]]
    source = load_source(write(tmp_path, lines, f"labels.{suffix}"))
    assert source.class_names == LOOK_LIKE_OTHERS
    assert labels_of(source) == dict(rows[1:])
    assert all(path.is_file() for path in paths_of(source.train))


def test_numbers_in_json_are_names_too(tmp_path: Path) -> None:
    draw(tmp_path, [f"{number}.png" for number in range(6)])
    values = ["1.0", "1", "10", "true", "1e3", "2"]
    lines = [f'{{"image": "{number}.png", "label": {value}}}' for number, value in enumerate(values)]
    source = load_source(write(tmp_path, lines, "labels.jsonl"), eval_fraction=0.0)
    assert source.class_names == sorted(values)


def test_integers_are_names_in_numerical_order(tmp_path: Path) -> None:
    source = load_source(table(tmp_path, ["10", "9", "0", "-2"] * 3))
    assert source.class_names == ["-2", "0", "9", "10"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_exports_with_marks_semicolons_and_windows_line_ends(encoding: str, tmp_path: Path) -> None:
    draw(tmp_path, ["a b/é, 1.png", "a b/2.png", "3.png", "4.png"])
    lines = ["Bild;Label\r", 'a b\\é, 1.png;"x; y"\r', '".\\a b\\2.png";z\r', "3.png;z\r", '4.png;"x; y"\r']
    source = load_source(write(tmp_path, lines, encoding=encoding), eval_fraction=0.0)
    assert source.class_names == ["x; y", "z"]
    assert labels_of(source) == {"é, 1.png": "x; y", "2.png": "z", "3.png": "z", "4.png": "x; y"}
    assert "cells are separated by semicolons, by its first line" in note(source, "separated")


def test_quotes_line_breaks_and_the_first_line_of_excel(tmp_path: Path) -> None:
    draw(tmp_path, ["0.png", "1.png"])
    text = 'sep=|\nimage|label\n0.png|"a ""b""\nc"\n1.png|d\n'
    (tmp_path / "labels.csv").write_text(text)
    source = load_source(str(tmp_path / "labels.csv"), eval_fraction=0.0)
    assert source.class_names == ['a "b"\nc', "d"]


def test_images_are_below_image_root_or_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "photos", ["0.png", "1.png"])
    file = write(tmp_path / "tables", ["image,label", "0.png,a", "1.png,b"])
    for root in ("../photos", str(tmp_path / "photos")):
        source = load_source(file, image_root=root, eval_fraction=0.0)
        assert paths_of(source.train) == [tmp_path / "photos" / "0.png", tmp_path / "photos" / "1.png"]
    with pytest.raises(DataError, match=r"none of the 2 images that it lists is there, such as 0.png, 1.png, below"):
        load_source(file)
    with pytest.raises(DataError, match=r"data.image_root: .*nowhere is no folder"):
        load_source(file, image_root="nowhere")
    monkeypatch.chdir(tmp_path / "photos")
    source = load_source(file, eval_fraction=0.0)
    assert "below the working folder" in note(source, "working folder")


def test_splits_by_a_column(tmp_path: Path) -> None:
    rows = [("Train", "a"), ("val", "b"), ("TEST", "a"), ("train", "b"), ("", "a"), ("training", "a")]
    file = table(tmp_path, [f"{split},{label}" for split, label in rows], header="image,Subset,label")
    source = load_source(file, test_split="test")
    assert (source.train.name, source.evaluation.name) == ("train", "validation")
    assert [path.name for path in paths_of(source.train)] == ["0.png", "3.png", "5.png"]
    assert source.test is not None
    assert [path.name for path in paths_of(source.test)] == ["2.png"]
    assert "splits by column 'Subset': train (3), validation (1), test (1)" in note(source, "splits by")
    assert "1 row without a split (images/4.png)" in note(source, "left out")
    assert source.columns.split == "Subset"
    assert len(load_source(file, split_column=None, eval_fraction=0.0).train) == 6


def test_a_column_of_other_values_is_a_split_only_if_it_is_named(tmp_path: Path) -> None:
    file = table(tmp_path, [f"{number % 3},{'ab'[number % 2]}" for number in range(12)], header="image,fold,label")
    source = load_source(file)
    assert source.held_out
    assert "not used: column fold" in note(source, "not used")
    source = load_source(file, split_column="fold", train_split="0", eval_split="2")
    assert (source.train.name, source.evaluation.name, len(source.train)) == ("0", "2", 4)


def test_rows_that_occur_twice_are_used_once_and_contradictions_are_said(tmp_path: Path) -> None:
    draw(tmp_path, [f"{number}.png" for number in range(4)])
    rows = ["0.png,a,train", "1.png,b,train", "./0.png,a,train", "1.png,a,train", "2.png,b,val", "0.png,a,val"]
    source = load_source(write(tmp_path, ["image,label,split", *rows, "3.png,a,val"]))
    assert [path.name for path in paths_of(source.train)] == ["0.png", "1.png", "1.png"]
    assert "1 row repeats an image with the same label (0.png); each is used once" in note(source, "repeats")
    assert "1 image has rows with different labels (1.png: b, a)" in note(source, "different labels")
    assert "1 image is in two splits or more (0.png)" in note(source, "two splits")


def test_rows_without_a_label_and_missing_images_are_counted(tmp_path: Path) -> None:
    labels = ["a", "b"] * 20
    labels[4] = labels[7] = ""
    file = table(tmp_path, labels)
    for number in (1, 2, 3):
        (tmp_path / "images" / f"{number}.png").unlink()
    source = load_source(file, max_bad_fraction=0.2)
    assert len(source.train) + len(source.evaluation) == 38  # those that are not there are bad images
    text = note(source, "left out")
    assert "3 images that the table lists, but are not there (images/1.png)" in text
    assert "2 rows without a label (images/4.png)" in text
    with pytest.raises(DataError, match=r"5 of 40 images of split 'train' are left out .*correct the table") as error:
        load_source(file, max_bad_fraction=0.1)
    assert "\n  images/1.png\n  images/2.png\n" in str(error.value)


@pytest.mark.parametrize("separator", ["|", ","])
def test_several_labels_in_a_cell(separator: str, tmp_path: Path) -> None:
    cells = [f"cat{separator} dog", "dog", f"owl{separator}cat{separator}", "owl", f"dog{separator}dog"] * 3
    file = table(tmp_path, [f'"{cell}"' for cell in cells])
    source = load_source(file, label_separator=separator, eval_fraction=0.2)
    assert source.multi_label
    assert source.class_names == ["cat", "dog", "owl"]
    whole = load_source(file, label_separator=separator, eval_fraction=0.0).train.labels
    assert np.asarray(whole)[:5].tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1], [0, 1, 0]]
    assert "name a label twice" in note(source, "twice")
    assert len(load_source(file, eval_fraction=0.0).class_names) == 5  # without the key: a cell is a label


def test_columns_of_0_and_1_are_classes(tmp_path: Path) -> None:
    rows = ["1,0,0,7", "0,1,1,7", "0,0,0,8", "1,1,1,9"] * 2
    file = table(tmp_path, rows, header="image,sun,rain,wind,age")
    source = load_source(file, eval_fraction=0.0)
    assert source.class_names == ["sun", "rain", "wind"]
    assert np.asarray(source.train.labels)[:4].tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]
    assert "columns sun, rain, wind are one class each" in note(source, "one class each")
    source = load_source(file, label_column=["wind", "sun"], eval_fraction=0.0)
    assert source.class_names == ["wind", "sun"]
    assert source.columns.listed == ("wind", "sun")
    with pytest.raises(DataError, match=r"column 'age' has '7', '8', '9'; in a list of data.label_column"):
        load_source(file, label_column=["sun", "age"])


def test_undecided_columns_are_shown_with_examples_and_what_to_write(tmp_path: Path) -> None:
    rows = [f"{'xy'[number % 2]},{number % 3},{number}" for number in range(12)]
    file = table(tmp_path, rows, header="where,colour,size,id")
    with pytest.raises(DataError) as error:
        load_source(file)
    assert "which column has the labels can't be decided: several columns would do. Write data.label_column=colour" in (
        str(error.value)
    )
    assert "\n  where: 'images/0.png', 'images/1.png', 'images/2.png' <- images\n" in str(error.value)
    assert "\n  colour: 'x', 'y' <- may be the labels\n" in str(error.value)
    assert load_source(file, label_column="size").class_names == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"'colur' is not a column .*Did you mean 'colour'\?"):
        load_source(file, label_column="colur")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.png,a\n1.png,b\n", r"first line must have the names of the columns; got '0.png', 'a'. Add a line"),
        ("image,label\n0.png,a,b\n", r"can't be read as csv: .*double quotes"),
        ("image,label,label\n0.png,a,b\n", r"has column 'label' twice"),
        ("image,label\n", r"has no rows"),
        ("\n\n", r"is empty; its first line"),
        ("image,label\n0.png,\n", r"no row has a label in column 'label'"),
        ("image,label\nhttps://x.org/0.png,a\nhttps://x.org/1.png,b\n", r"addresses are not downloaded"),
        ("image,label\nzero,a\none,b\n", r"zero.png is: write the names with their suffix"),
        ("image,label\nphotos/zero.png,a\nphotos/1.png,b\n", r"zero.png is: write the paths relative to that folder"),
    ],
)
def test_tables_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    draw(tmp_path, ["0.png", "1.png", "zero.png"])
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_source(str(tmp_path / "labels.csv"), eval_fraction=0.0)


def test_text_that_is_not_utf_8_is_located(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes("image,label\n0.png,é\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"it is not UTF-8 \(byte 0xe9 at 18\); save it as UTF-8"):
        load_source(str(tmp_path / "labels.csv"))


def grouped(folder: Path, header: str = "image,label,patient") -> str:
    """Write a table of 40 patients with 1 to 6 images each, of two classes."""
    rng = np.random.default_rng(0)
    rows = [f"{'ab'[patient % 2]},p{patient}" for patient in range(40) for _ in range(rng.integers(1, 7))]
    return table(folder, rows, header=header)


def test_groups_are_held_out_as_a_whole(tmp_path: Path) -> None:
    file = grouped(tmp_path)
    group_of = dict(line.rsplit(",", 1) for line in Path(file).read_text().splitlines()[1:])
    group_of = {path.split(",")[0].rpartition("/")[2]: group for path, group in group_of.items()}
    source = load_source(file, group_column="patient", eval_fraction=0.2)
    sides = [{group_of[path.name] for path in paths_of(split)} for split in (source.train, source.evaluation)]
    assert not sides[0] & sides[1]
    share = len(source.evaluation) / (len(source.train) + len(source.evaluation))
    assert 0.15 < share < 0.25
    assert 0.3 < source.evaluation.labels.mean() < 0.7
    other = load_source(file, group_column="patient", eval_fraction=0.2, seed=1)
    assert {*paths_of(other.evaluation)} != {*paths_of(source.evaluation)}


def test_groups_that_splits_share_are_said(tmp_path: Path) -> None:
    rows = ["a,p1,train", "b,p2,train", "a,p1,val", "b,,val", "b,p3,val"]
    source = load_source(table(tmp_path, rows, header="image,label,patient,split"), group_column="patient")
    assert "shares 1 group of column 'patient' with split 'train' (p1), 1 of its 3 images" in note(source, "shares")
    assert "1 row of split 'validation' without a group; each is one by itself" in note(source, "without a group")


def test_groups_of_a_dataset_are_held_out_as_a_whole() -> None:
    import datasets

    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(30)]
    rows = {"image": images, "label": ["a", "b"] * 15, "camera": [number // 3 for number in range(30)]}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("string"), "camera": datasets.Value("int64")}
    )
    source = load_source(datasets.Dataset.from_dict(rows, features=features), group_column="camera", eval_fraction=0.2)
    assert source.train.rows is not None
    assert source.evaluation.rows is not None
    assert len(source.evaluation) == 6
    assert not {*(source.train.rows // 3)} & {*(source.evaluation.rows // 3)}
    assert not any("not used" in text for text in source.notes)


def test_a_folder_without_classes_names_its_table(tmp_path: Path) -> None:
    draw(tmp_path, ["0.png"])
    file = write(tmp_path, ["image,label", "0.png,a"])
    with pytest.raises(DataError, match=rf"no class folders.*To read a table of labels, give data.dataset={file}"):
        load_source(str(tmp_path))


def test_one_group_can_not_be_held_out(tmp_path: Path) -> None:
    file = table(tmp_path, ["a,x", "b,x"] * 4, header="image,label,video")
    with pytest.raises(DataError, match=r"data.group_column: all training images belong to one group"):
        load_source(file, group_column="video")
    with pytest.raises(DataError, match=r"data.group_column: 'vidio' is not a column .*Did you mean 'video'\?"):
        load_source(file, group_column="vidio")


@pytest.mark.parametrize(
    "labels", [[3, 4, 10], ["b", "a", "10"], [[0, 1, 1], [1, 0, 0], [0, 0, 1]], [[1], [1, 2], [3]]]
)
def test_parquet_files_of_paths_are_the_same_data_as_before(labels: list[Any], tmp_path: Path) -> None:
    names = [f"images/{number}.png" for number in range(12)]
    draw(tmp_path, names)
    values = (labels * 4)[:12]
    file = tmp_path / "labels.parquet"
    pyarrow.parquet.write_table(pa.table({"image": names, "label": values}), file)
    found = [load_source(str(file), inventory=inventory) for inventory in ("full", "old")]
    assert fingerprint(found[0]) == fingerprint(found[1])
    assert found[0].class_names == found[1].class_names
    assert paths_of(found[0].train) == paths_of(found[1].train)


def test_class_names_of_a_parquet_file(tmp_path: Path) -> None:
    import datasets

    draw(tmp_path, ["0.png", "1.png", "2.png"])
    features = datasets.Features(
        {"path": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    )
    rows = {"path": ["0.png", "1.png", "2.png"], "label": [2, 0, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "labels.parquet")
    source = load_source(str(tmp_path / "labels.parquet"), eval_fraction=0.0)
    assert source.class_names == ["x", "y", "z"]
    assert source.train.labels.tolist() == [2, 0, 2]


def test_vectors_have_the_names_in_the_metadata_of_their_column(tmp_path: Path) -> None:
    draw(tmp_path, ["0.png", "1.png", "2.png"])
    label = pa.field("label", pa.list_(pa.int8(), 3), metadata={"names": '["sun", "rain", "wind"]'})
    rows = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    columns = [pa.array(["0.png", "1.png", "2.png"]), pa.array(rows, label.type)]
    pyarrow.parquet.write_table(
        pa.Table.from_arrays(columns, schema=pa.schema([pa.field("file", pa.string()), label])),
        tmp_path / "labels.parquet",
    )
    source = load_source(str(tmp_path / "labels.parquet"), eval_fraction=0.0)
    assert source.class_names == ["sun", "rain", "wind"]
    assert np.asarray(source.train.labels).tolist() == rows


def test_soft_labels_are_refused(tmp_path: Path) -> None:
    draw(tmp_path, ["0.png", "1.png"])
    columns = {"image": ["0.png", "1.png"], "label": [[0.25, 0.75], [0.5, 0.5]]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match=r"got 0.25, 0.75, 0.5; shares of classes \(soft labels\) can't"):
        load_source(str(tmp_path / "labels.parquet"))


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = table(tmp_path, ["a", "b"] * 20)
    listed, scandir = list[str](), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    load_source(file)
    assert listed == [f"{tmp_path}/images"]


def test_keys_of_tables_are_refused_for_other_data(image_folder: Path) -> None:
    for key, value in {"label_separator": "|", "image_root": "x", "split_column": "split"}.items():
        with pytest.raises(DataError, match=rf"data.{key}: has an effect on tables of paths and labels"):
            load_source(str(image_folder), **{key: value})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"data.label_column: a list of columns is for tables"):
        load_source(str(image_folder), label_column=["a", "b"])


def test_a_table_is_evaluated_by_names(tmp_path: Path) -> None:
    measured = load_evaluation_split(table(tmp_path, ["b", "a", "b"]), multi_label=False)
    assert measured.class_names == ["a", "b"]
    assert measured.split.labels.tolist() == [1, 0, 1]
