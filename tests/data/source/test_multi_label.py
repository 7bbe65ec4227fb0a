"""Labels of several classes each, compared with the dense arrays that they stand for."""

from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest
import xxhash

from hf_fasttrain.data.source import fingerprint
from hf_fasttrain.data.source.classes import names_without_images
from hf_fasttrain.data.source.dataset import Split, hold_out, subset
from hf_fasttrain.data.source.labels import read_labels, renumber
from hf_fasttrain.data.source.multi_label import MultiLabels, class_counts, dense_labels, join_labels


def random_labels(seed: int, num_images: int = 40, num_classes: int = 9) -> tuple[MultiLabels, np.ndarray]:
    """Return the same labels sparse and dense; some images and some classes have none."""
    rng = np.random.default_rng(seed)
    hot = (rng.random((num_images, num_classes)) < rng.choice([0.0, 0.1, 0.5], (num_images, 1))).astype(np.float32)
    hot[:, rng.integers(num_classes)] = 0
    rows, classes = np.nonzero(hot)
    return MultiLabels.of_pairs(rows, classes, num_images, num_classes), hot


@pytest.mark.parametrize("seed", range(5))
def test_they_are_the_dense_labels_however_they_are_cut_and_joined(seed: int) -> None:
    labels, hot = random_labels(seed)
    other, other_hot = random_labels(seed + 100, 7)
    rng = np.random.default_rng(seed)
    assert labels.shape == hot.shape
    assert np.array_equal(np.asarray(labels), hot)
    for rows in (slice(3, 9), slice(0, 0), slice(None, None, 2), rng.integers(-40, 40, 25), rng.random(40) < 0.5):
        assert np.array_equal(dense_labels(labels, rows), hot[rows])
        assert dense_labels(labels, rows).dtype == np.float32
    assert np.array_equal(np.asarray(join_labels([labels, other[2:5]])), np.concatenate([hot, other_hot[2:5]]))
    assert np.array_equal(class_counts(labels, 9), hot.sum(0))
    assert [labels.of(row) for row in range(40)] == [np.flatnonzero(row).tolist() for row in hot]
    codes = np.unique(hot, axis=0, return_inverse=True)[1].reshape(-1)
    assert np.array_equal(labels.numbered()[:, None] == labels.numbered(), codes[:, None] == codes)
    names = [str(number) for number in range(9)]
    assert names_without_images(labels, names) == [names[number] for number in np.flatnonzero(hot.sum(0) == 0)]
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(labels))), hot)


def test_renumbered_classes_are_moved_columns() -> None:
    labels, hot = random_labels(3)
    expected = np.zeros((40, 12), np.float32)
    expected[:, [11, 0, 5]] = hot[:, [2, 4, 8]]
    renumbered = renumber(labels, {2: 11, 4: 0, 8: 5}, 12)
    assert np.array_equal(np.asarray(renumbered), expected)


def test_memory_grows_with_labels_not_with_classes() -> None:
    lists = [[row % 20_000, (7 * row + 3) % 20_000] for row in range(2000)]
    feature = datasets.Sequence(datasets.ClassLabel(names=[str(number) for number in range(20_000)]))
    data = datasets.Dataset.from_dict({"label": lists}, features=datasets.Features({"label": feature}))
    labels = read_labels({"train": data}, "label", where="data", train="train").by_split["train"]
    assert labels.shape == (2000, 20_000)
    assert labels.nbytes < 40_000  # dense: 160 MB
    train, held_out = hold_out(Split("train", [], labels), 0.1, seed=0)
    assert (len(train), len(held_out), len(subset(train, 50, 0).labels)) == (1800, 200, 50)
    assert [sorted(lists[row]) for row in held_out.rows_of(np.arange(200))] == [
        held_out.labels.of(row) for row in range(200)
    ]


def test_the_fingerprint_is_that_of_dense_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, hot = random_labels(1)
    monkeypatch.setattr(fingerprint, "ROWS_AT_ONCE", 7)
    hashed = xxhash.xxh3_64()
    fingerprint._add_labels(hashed, labels)
    assert hashed.hexdigest() == xxhash.xxh3_64(hot.tobytes()).hexdigest()  # as older versions stored it
    monkeypatch.setattr(fingerprint, "MAX_DENSE", 10)
    hashed = xxhash.xxh3_64()
    fingerprint._add_labels(hashed, labels)
    assert hashed.hexdigest() != xxhash.xxh3_64(hot.tobytes()).hexdigest()


def test_vectors_of_a_class_label_have_its_names() -> None:
    classes = datasets.Features({"label": datasets.Sequence(datasets.ClassLabel(names=["sun", "rain", "wind"]))})
    rows = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    read = read_labels(
        {"train": datasets.Dataset.from_dict({"label": rows}, features=classes)}, "label", where="x", train="train"
    )
    assert read.class_names == ["sun", "rain", "wind"]
    assert np.asarray(read.by_split["train"]).tolist() == rows
