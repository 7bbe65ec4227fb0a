"""Folds: each image in the evaluation split of exactly one, with the classes' shares, and whole groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hf_fasttrain.data.source.dataset import load_source
from hf_fasttrain.data.source.file_split import Groups
from hf_fasttrain.data.source.folds import fold_numbers
from hf_fasttrain.data.source.multi_label import MultiLabels
from hf_fasttrain.utils.errors import DataError


@pytest.mark.parametrize("counts", [(50, 31, 7, 2), (2, 2, 2), (5,), (101, 1)])
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_classes_and_sizes_differ_by_at_most_one_between_folds(counts: tuple[int, ...], folds: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    numbers = fold_numbers(labels, folds, seed=3)
    table = np.array([np.bincount(labels[numbers == fold], minlength=len(counts)) for fold in range(folds)])
    assert table.sum(0).tolist() == list(counts)
    assert np.ptp(table, axis=0).max() <= 1
    assert np.ptp(table.sum(1)) <= 1
    assert (numbers == fold_numbers(labels, folds, seed=3)).all()
    assert (numbers != fold_numbers(labels, folds, seed=4)).any()


def test_images_with_several_classes_are_dealt_by_their_sets() -> None:
    sets = [(0,), (0, 1), (2,), ()]
    pairs = [(image, label) for image in range(80) for label in sets[image % 4]]
    rows, classes = (np.array(each) for each in zip(*pairs, strict=True))
    labels = MultiLabels.of_pairs(rows, classes, 80, 3)
    numbers = fold_numbers(labels, 4, seed=0)
    for kind in range(4):
        assert np.bincount(numbers[kind::4], minlength=4).tolist() == [5, 5, 5, 5]
        assert np.bincount(fold_numbers(labels.dense(), 4, seed=0)[kind::4], minlength=4).tolist() == [5, 5, 5, 5]


def test_whole_groups_are_dealt_with_the_shares_of_their_classes() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-1, 60, 1200)
    labels = np.where(codes % 3 == 0, 0, rng.integers(0, 3, 1200))
    numbers = fold_numbers(labels, 5, 0, Groups(codes, [f"site {n}" for n in range(60)]))
    for code in range(60):
        assert len(set(numbers[codes == code].tolist())) == 1
    table = np.array([np.bincount(labels[numbers == fold], minlength=3) for fold in range(5)])
    assert (np.abs(table / table.sum(0) - 0.2) < 0.04).all()


def test_every_fold_gets_a_group_even_if_one_has_most_of_the_images() -> None:
    codes = np.repeat([0, 1, 2], [100, 1, 1])
    numbers = fold_numbers(np.zeros(102, np.int64), 3, 0, Groups(codes, ["a", "b", "c"]))
    assert sorted(np.bincount(numbers).tolist()) == [1, 1, 100]


def test_too_few_images_or_groups_are_one_message() -> None:
    with pytest.raises(DataError, match=r"data\.folds=5: there are only 4 images; set it to less"):
        fold_numbers(np.zeros(4, np.int64), 5, 0)
    with pytest.raises(DataError, match=r"only 3 groups \(data.group_column\), and each fold needs one"):
        fold_numbers(np.zeros(9, np.int64), 5, 0, Groups(np.arange(9) // 3, ["a", "b", "c"]))


def test_the_folds_of_a_data_set_have_each_image_once() -> None:
    sources = [load_source("digits", folds=4, fold=fold, seed=1) for fold in range(4)]
    rows = [source.evaluation.rows for source in sources]
    assert sorted(np.concatenate(rows).tolist()) == list(range(1797))  # type: ignore[arg-type]
    for fold, source in enumerate(sources):
        assert source.evaluation.name == f"fold {fold} of 4 of train"
        assert not set(source.train.rows.tolist()) & set(source.evaluation.rows.tolist())  # type: ignore[union-attr]


def test_a_validation_split_and_folds_exclude_each_other(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "validation"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{number}.png")
    with pytest.raises(DataError, match="has a split 'validation' to evaluate on already"):
        load_source(str(tmp_path), folds=3)
