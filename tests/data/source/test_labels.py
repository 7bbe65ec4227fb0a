"""Labels are read as meant: one-hot vectors, integers with gaps, texts that look like numbers, other spellings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fuzz_labels
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers.fuzzing import fuzz
from helpers.runs import exit_status
from PIL import Image

from hf_fasttrain.data.source.classes import match_names
from hf_fasttrain.data.source.dataset import Split, hold_out, load_source, subset
from hf_fasttrain.data.source.labels import Labels, read_labels
from hf_fasttrain.utils.errors import DataError

# Texts that pandas, or Arrow's JSON reader, converts to numbers, dates, booleans or null.
LOOK_LIKE_OTHERS = ["007", "1e3", "2024-01-01", "N/A", "NA", "None", "True", "nan", "null"]


def read(
    train: list[Any], evaluation: list[Any] | None = None, *, feature: Any = None, other: Any = None, **options: Any
) -> Labels:
    """Return the labels of a train split and, if given, a validation split, with a feature for each."""
    splits = {"train": column(train, feature)}
    if evaluation is not None:
        splits["validation"] = column(evaluation, other or feature)
    return read_labels(splits, "label", where="data", train="train", **options)


def column(values: list[Any], feature: Any = None) -> Any:
    return datasets.Dataset.from_dict(
        {"label": values}, features=None if feature is None else datasets.Features({"label": feature})
    )


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("kind", [int, float, bool])
def test_one_hot_vectors_are_single_labels(num_classes: int, kind: type) -> None:
    classes = np.arange(12) % num_classes
    vectors = [[kind(label == index) for index in range(num_classes)] for label in classes]
    for feature in (
        None,
        datasets.List(datasets.Value({int: "int64", float: "float32", bool: "bool"}[kind]), num_classes),
    ):
        actual = read(vectors, vectors[:3], feature=feature)
        assert (actual.multi_label, actual.class_names) == (False, [str(i) for i in range(num_classes)])
        assert actual.by_split["train"].tolist() == classes.tolist()
        assert actual.by_split["validation"].tolist() == classes[:3].tolist()
        assert len(actual.notes) == 1
        assert (
            "0/1 vectors with exactly one class in every row: each image has one class; data.multi_label=true"
            in (actual.notes[0])
        )
    forced = read(vectors, multi_label=True)
    assert forced.by_split["train"].tolist() == np.eye(num_classes)[classes].tolist()
    assert forced.notes == []


def test_vectors_with_several_ones_in_any_split_are_multi_label() -> None:
    actual = read([[1, 0], [0, 1]], [[1, 1], [0, 0]])
    assert actual.multi_label
    assert actual.by_split["train"].tolist() == [[1, 0], [0, 1]]
    assert actual.by_split["validation"].tolist() == [[1, 1], [0, 0]]
    assert actual.notes == [
        "data, split 'validation', column 'label': 0/1 vectors with 2 classes in row 0: read as multi-label"
    ]
    with pytest.raises(
        DataError, match=r"split 'validation', .*: row 0 has 2 labels, where one for each image is need"
    ):
        read([[1, 0], [0, 1]], [[1, 1], [0, 0]], multi_label=False)


def test_lists_of_one_class_each_are_single_labels() -> None:
    for lists, names in (([["dog"], ["cat"], ["emu"]], ["cat", "dog", "emu"]), ([[4], [3], [9]], ["3", "4", "9"])):
        actual = read(lists)
        assert (actual.multi_label, actual.class_names, actual.by_split["train"].tolist()) == (False, names, [1, 0, 2])
        assert "lists with exactly one class in every row" in actual.notes[0]
        assert "data.multi_label=true" in actual.notes[0]
        assert read(lists, multi_label=True).multi_label
    multi_label = read([["dog"], ["cat"]], [["dog", "cat"]])
    assert (multi_label.multi_label, multi_label.notes) == (True, [])
    assert multi_label.by_split["validation"].tolist() == [[1, 1]]


def test_lists_of_class_numbers_stay_multi_label() -> None:
    actual = read([[0, 2], [1], [], [2, 1]])
    assert actual.multi_label
    assert actual.by_split["train"].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]]
    multi = datasets.List(datasets.ClassLabel(names=["a", "b"]))
    assert read([[0, 1], [0]], feature=multi).by_split["train"].tolist() == [[1, 1], [1, 0]]


def test_single_labels_can_be_trained_as_multi_label() -> None:
    assert read(["b", "a"], multi_label=True).by_split["train"].tolist() == [[0, 1], [1, 0]]


def test_multi_label_data_with_every_class_in_every_image_is_refused() -> None:
    feature = datasets.List(datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(DataError, match=r"every image has every class \(a, b\), so there is nothing to learn"):
        read([[0, 1], [1, 0]], feature=feature)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 2, 3], ["1", "2", "3"]),
        ([3, 4], ["3", "4"]),
        ([10, 2, 30], ["2", "10", "30"]),
        ([0, 10, 20], ["0", "10", "20"]),
        ([-1, 1], ["-1", "1"]),
        ([1.0, 3.0], ["1", "3"]),
        ([1000001, 1000002], ["1000001", "1000002"]),
    ],
)
def test_integers_that_do_not_start_at_zero_are_names(values: list[Any], names: list[str]) -> None:
    actual = read(values * 2, values)
    assert actual.class_names == names
    assert [names[label] for label in actual.by_split["train"]] == [str(int(value)) for value in values] * 2
    assert len(actual.notes) == 1
    assert f"integer labels with gaps: {', '.join(names)} are {len(names)} classes by these names" in actual.notes[0]


def test_a_missing_integer_is_a_class_without_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1, 3, 4] * 3)
    source = load_source(str(tmp_path / "train.parquet"))
    assert source.class_names == ["0", "1", "2", "3", "4"]
    assert "split 'train' has no image of 2" in source.notes


def test_a_negative_label_may_mean_no_class() -> None:
    assert "remove rows with a negative label if it means unlabelled" in read([-1, 0, 1]).notes[0]


def test_classes_that_may_mean_the_same_are_reported() -> None:
    actual = read(["cat", "Cat ", "dog", "007", "7"])
    assert len(actual.class_names) == 5
    assert actual.notes == [
        "data, split 'train', column 'label': '007' and '7', 'Cat ' and 'cat' are different classes, though they may "
        "mean the same"
    ]


def test_integers_from_zero_and_booleans_need_no_note() -> None:
    assert (read([0, 1, 2, 1]).class_names, read([0, 1, 2]).notes) == (["0", "1", "2"], [])
    flags = read([True, False, True])
    assert (flags.class_names, flags.by_split["train"].tolist(), flags.notes) == (["False", "True"], [1, 0, 1], [])


@pytest.mark.parametrize(
    ("values", "row"),
    [
        ([1, 2, None, 1], 2),
        ([1.0, float("nan"), 2.0], 1),
        (["a", "b", " "], 2),
        (["a", None], 1),
        ([None, None], 0),
        ([["a"], ["b", "a"], ["b", None]], 2),
        ([["a"], None], 1),
        ([[1.0, 0.0], [float("nan"), 1.0]], 1),
    ],
)
def test_missing_labels_are_named_with_their_row(values: list[Any], row: int) -> None:
    with pytest.raises(DataError, match=rf"split 'train', column 'label': row {row} has no label; remove such rows"):
        read(values)


@pytest.mark.parametrize("values", [[[0.9, 0.1], [0.2, 0.8]], [[[0, 1]], [[1, 0]]], [b"cat", b"dog"], [1e300, 1.0]])
def test_labels_that_are_not_classes_are_refused(values: list[Any]) -> None:
    with pytest.raises(DataError, match="labels must be integers or texts; got "):
        read(values)


def test_unlabelled_images_of_a_classlabel_column_are_named() -> None:
    with pytest.raises(DataError, match="row 1 has label -1, which means unlabelled; remove such rows; allowed"):
        read([0, -1], feature=datasets.ClassLabel(names=["a", "b"]))


@pytest.mark.parametrize(
    ("train", "evaluation", "expected"),
    [
        (["7", "10"], ["007", "010"], ["7", "10"]),
        (["007", "010"], [10, 7], ["010", "007"]),
        ([1, 2], [2.0, 1.0], ["2", "1"]),
        ([1, 2], ["1.0", "2.0"], ["1", "2"]),
        (["true", "false"], [True, False], ["true", "false"]),
        ([0, 1], [True, False], ["1", "0"]),
        (["1e3", "2e3"], [2000, 1000], ["2e3", "1e3"]),
        (["Caf\u00e9", "Bar"], ["cafe\u0301 ", "BAR"], ["Caf\u00e9", "Bar"]),
        (["a", "b"], [["b"], ["a"]], ["b", "a"]),
    ],
)
def test_other_spellings_are_matched_by_meaning(train: list[Any], evaluation: list[Any], expected: list[str]) -> None:
    actual = read(train, evaluation)
    assert [actual.class_names[label] for label in actual.by_split["train"]] == [str(value) for value in train]
    assert [actual.class_names[label] for label in actual.by_split["validation"]] == expected
    messages = [note for note in actual.notes if "validation" in note]
    flat = [value[0] if isinstance(value, list) else value for value in evaluation]
    spelt = [str(int(value) if isinstance(value, float) else value) for value in flat]
    assert len(messages) == (spelt != expected)


@pytest.mark.parametrize(
    ("train", "evaluation", "label"),
    [
        (["cat", "dog"], ["cat", "cow"], "'cow'"),
        (["7", "007", "8"], ["7", "07"], "'07'"),
        (["7", "8"], ["07", "007"], "'07'"),
        ([1, 2], [1, 0], "'0'"),
    ],
)
def test_labels_without_a_clear_class_are_refused_with_both_values(
    train: list[Any], evaluation: list[Any], label: str
) -> None:
    with pytest.raises(
        DataError, match=rf"split 'validation', column 'label': row \d has label {label}, which is"
    ) as messages:
        read(train, evaluation)
    assert all(str(value) in str(messages.value) for value in (*train, *evaluation))


def test_class_labels_of_two_splits_are_matched_by_name_and_numbers_by_number() -> None:
    by_name, turned = datasets.ClassLabel(names=["cat", "dog"]), datasets.ClassLabel(names=["dog", "cat"])
    assert read([0, 1], [0, 1], feature=by_name, other=turned).by_split["validation"].tolist() == [1, 0]
    plain = datasets.Value("int64")
    actual = read([0, 1], [1, 0], feature=by_name, other=plain)
    assert actual.by_split["validation"].tolist() == [1, 0]
    assert "labels are matched to split 'train' by number, since this split has no names" in actual.notes[0]
    actual = read([0, 1], [1, 0], feature=plain, other=by_name)
    assert (actual.by_split["validation"].tolist(), len(actual.notes)) == ([1, 0], 1)
    counted = datasets.ClassLabel(names=["1", "2", "3"])
    assert read([0, 1, 2], [1, 3], feature=counted, other=plain).by_split["validation"].tolist() == [0, 2]
    with pytest.raises(
        DataError, match=r"its integers \(1, 2\) may be numbers or names of the classes of split 'train'"
    ):
        read([0, 1, 2], [1, 2], feature=counted, other=plain)


def test_an_exact_name_wins_over_one_that_means_the_same() -> None:
    matched = match_names(["7", "007", "x"], ["007", "7", "X"])
    assert matched.numbers == {"7": 1, "007": 0, "x": 2}
    assert matched.renamed == {"x": "X"}


def test_class_names_of_tables_and_folders_are_not_changed(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    folders = [name for name in LOOK_LIKE_OTHERS if "/" not in name]
    for name in folders:
        (tmp_path / "folders" / name).mkdir(parents=True)
        for number in range(2):
            image.save(tmp_path / "folders" / name / f"{number}.png")
    assert load_source(str(tmp_path / "folders")).class_names == folders
    data = (tmp_path / "folders" / "NA" / "0.png").read_bytes()
    labels = LOOK_LIKE_OTHERS * 2
    for values in (pa.array(labels), pa.array(labels).dictionary_encode(), pa.array(labels, pa.large_string())):
        table = pa.table({"image": [{"bytes": data, "path": None}] * len(labels), "label": values})
        pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
        assert load_source(str(tmp_path / "train.parquet")).class_names == LOOK_LIKE_OTHERS


def test_classes_without_images_and_decisions_about_labels_are_reported_before_training(
    tmp_path: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    images = [Image.new("RGB", (4, 4))] * 20
    part = datasets.Dataset.from_dict({"image": images, "label": [0, 2] * 10}, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "data"))
    assert exit_status(["check", str(write_recipe()), f"data.dataset={tmp_path / 'data'}"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "note: split 'train' has no image of b" in notes
    assert "note: split 'held-out 10% of train' has no image of b" in notes
    unused = "has a split 'test' too, which is not used; data.test_split=test measures it once, at the end"
    assert any(note.endswith(unused) for note in notes)


def write_parquet(file: Path, labels: list[Any], feature: Any = None) -> None:
    image = {"bytes": b"", "path": None}
    features = None if feature is None else datasets.Features({"image": datasets.Image(), "label": feature})
    rows = {"image": [image] * len(labels), "label": labels}
    file.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


def test_files_of_another_split_change_neither_texts_nor_class_names(tmp_path: Path) -> None:
    for split, labels in {"test": [7, 10], "train": ["007", "010"], "validation": [10.0, 7.0]}.items():
        write_parquet(tmp_path / "codes" / f"{split}.parquet", labels)
    source = load_source(str(tmp_path / "codes"), test_split="test")
    assert source.class_names == ["007", "010"]
    assert [split.labels.tolist() for split in (source.evaluation, source.test or source.train)] == [[1, 0], [0, 1]]
    for split, names in {"train": ["cat", "dog"], "validation": ["dog", "cat"]}.items():
        write_parquet(tmp_path / "turned" / f"{split}.parquet", [0, 1], datasets.ClassLabel(names=names))
    source = load_source(str(tmp_path / "turned"))
    assert (source.class_names, source.evaluation.labels.tolist()) == (["cat", "dog"], [1, 0])
    write_parquet(tmp_path / "turned" / "train-1.parquet", [0, 1], datasets.ClassLabel(names=["dog", "cat"]))
    with pytest.raises(DataError, match=r"train-1.parquet numbers its classes as dog, cat, train.parquet as cat, dog"):
        load_source(str(tmp_path / "turned"))


def test_a_split_without_labels_is_named_with_its_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", ["a", "b"])
    image = {"bytes": [b""], "path": [None]}
    pyarrow.parquet.write_table(
        pa.table({"image": pa.StructArray.from_arrays(image.values(), names=list(image))}),
        tmp_path / "validation.parquet",
    )
    with pytest.raises(
        DataError, match=r"split 'validation' lacks column 'label' or 'image', which 'train' has; it has"
    ):
        load_source(str(tmp_path))


def test_many_classes_are_held_out_like_few_ones_by_one_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 800, 3000) * 3 % 797  # some classes have no images
    images: Any = None
    train, held_out = hold_out(Split("train", images, labels, np.arange(3000) + 5), 0.1, seed=2)
    draws = np.random.default_rng([2, 3000])  # the plain form: each class looked for on its own
    expected, total = [], 0
    for label in np.unique(labels):
        group = np.flatnonzero(labels == label)
        total += len(group)
        expected += draws.permutation(group)[: max(0, min(round(total * 0.1) - len(expected), len(group) - 1))].tolist()
    assert held_out.rows_of(np.arange(len(held_out))).tolist() == [row + 5 for row in sorted(expected)]
    assert sorted([*held_out.rows_of(np.arange(len(held_out))), *train.rows_of(np.arange(len(train)))]) == list(
        range(5, 3005)
    )

    searches: list[Any] = []
    real = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda values: searches.append(values) or real(values))
    hold_out(Split("train", images, labels, np.arange(3000)), 0.1, seed=2)
    assert len(searches) < 5  # whatever the number of classes


def test_a_subset_keeps_the_class_balance_and_is_part_of_each_larger_subset() -> None:
    labels = np.repeat([2, 0, 1], [60, 30, 10])
    images: Any = None
    split = Split("train", images, labels, np.arange(100) + 7)
    parts = {percent: subset(split, percent, 5) for percent in range(1, 101)}
    smaller: set[int] = set()
    for percent, part in parts.items():
        assert len(part) == percent
        rows = part.rows_of(np.arange(percent))
        assert smaller < set(rows.tolist())
        smaller = set(rows.tolist())
        assert np.array_equal(labels[rows - 7], part.labels)
        assert abs(np.bincount(part.labels, minlength=3) - np.array([0.3, 0.1, 0.6]) * percent).max() <= 1
    assert parts[100] is split
    assert not np.array_equal(parts[10].rows, subset(split, 10, 6).rows)
    multi_label = Split("train", images, np.zeros((50, 3), np.float32))
    assert len(set(subset(multi_label, 20, 0).rows_of(np.arange(20)).tolist())) == 20


def with_more_columns() -> datasets.Dataset:
    """Return a dataset with an image, a label and two more columns."""
    images = [Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)) for number in range(4)]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1, 0, 1], "age": [1, 2, 3, 4], "place": ["a"] * 4}
    ).cast_column("image", datasets.Image())


def test_unused_columns_are_named() -> None:
    source = load_source(with_more_columns(), eval_fraction=0.5)
    assert "the dataset passed in: not used: columns age, place (images: image, labels: label)" in source.notes
    assert load_source(with_more_columns().remove_columns(["age", "place"]), eval_fraction=0.5).notes == []


@pytest.mark.parametrize("method", ["set_transform", "with_transform"])
def test_a_transform_of_the_dataset_is_refused_not_dropped(method: str) -> None:
    dataset = with_more_columns()
    dataset = getattr(dataset, method)(lambda rows: rows) or dataset
    with pytest.raises(DataError, match=r"split 'train' .* has a transform .* transform=f.* reset_format"):
        load_source(datasets.DatasetDict(train=dataset), eval_fraction=0.5)
    dataset.reset_format()
    assert len(load_source(dataset, eval_fraction=0.5).train) == 2


def test_odd_label_columns_are_what_the_table_says_or_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The short form of fuzz_labels.py."""
    counts = fuzz(7, range(15), fuzz_labels.prepare, fuzz_labels.case, tmp_path)
    assert capsys.readouterr().out == ""
    assert counts["check: status 2"] > 3
    assert counts["check: status 0"] > 1


@pytest.mark.parametrize("features", [{"label": []}, {"label": {"_type": "Nonsense"}}, {"image": 3}, "[" * 9999])
def test_damaged_metadata_of_datasets_are_one_message(features: Any, tmp_path: Path) -> None:
    text = features if isinstance(features, str) else json.dumps({"info": {"features": features}})
    table = pa.table({"image": [b"x"], "label": [1]}).replace_schema_metadata({"huggingface": text})
    pa.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: its features can't be read \(.*\); update `datasets`"):
        load_source(str(tmp_path / "train.parquet"))


@pytest.mark.parametrize(
    "array",
    [
        pa.array([2**30, 0], pa.int32()).view(pa.date32()),
        pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")),
    ],
)
def test_values_that_are_none_of_their_type_are_one_message(array: Any) -> None:
    with pytest.raises(DataError, match=r"its values can't be read as (date32\[day\]|string): "):
        read_labels({"train": datasets.Dataset(pa.table({"label": array}))}, "label", where="data", train="train")
