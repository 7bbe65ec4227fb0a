"""Confident learning: folds, out-of-sample probabilities and flags, each against a plain reference."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from hf_fasttrain.train.label_errors import find_label_errors, fold_numbers, out_of_sample
from hf_fasttrain.train.linear_probe import Vectors


def clusters(counts: list[int], features: int = 6, seed: int = 0) -> Vectors:
    """Return overlapping clusters of features, so many images of each class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    centres = 1.5 * rng.normal(size=(len(counts), features))
    vectors = (centres[labels] + rng.normal(size=(len(labels), features))).astype(np.float32)
    return Vectors(vectors[:, None], labels, len(counts))


def flagged_by_loops(probabilities: np.ndarray, labels: np.ndarray) -> dict[int, int]:
    """Return image -> other class: off the diagonal of the confident joint as the paper defines it."""
    num_classes = probabilities.shape[1]
    thresholds = {
        j: np.mean([p[j] for p, label in zip(probabilities, labels, strict=True) if label == j])
        for j in range(num_classes)
        if (labels == j).any()
    }
    found = {}
    for image, (p, label) in enumerate(zip(probabilities, labels, strict=True)):
        confident = [j for j, threshold in thresholds.items() if p[j] >= threshold]
        if confident and (best := max(confident, key=lambda j: p[j])) != label:
            found[image] = best
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_flags_are_those_of_the_confident_joint(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 200)
    probabilities = rng.dirichlet(np.ones(4), 200)
    probabilities[np.arange(200), labels] += rng.choice([0.0, 1.0], 200)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    errors = find_label_errors(probabilities, labels)
    expected = flagged_by_loops(probabilities, labels)
    assert np.flatnonzero(errors.flagged).tolist() == sorted(expected)
    assert 20 < len(expected) < 180
    assert {image: int(errors.suggested[image]) for image in expected} == expected
    order = sorted(range(200), key=lambda i: probabilities[i, labels[i]] - max(np.delete(probabilities[i], labels[i])))
    assert errors.ranked.tolist() == order
    assert errors.losses == pytest.approx(-np.log(probabilities[np.arange(200), labels]))


def test_folds_spread_each_class_and_all_images() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [23, 7, 2, 1]))
    folds = fold_numbers(labels, 5, seed=3)
    for of in (folds, *(folds[labels == label] for label in range(4))):
        counts = np.bincount(of, minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (folds == fold_numbers(labels, 5, seed=3)).all()
    assert (folds != fold_numbers(labels, 5, seed=4)).any()


def test_each_image_is_judged_by_a_regression_that_was_fitted_without_it() -> None:
    data = clusters([30, 20, 25])
    probabilities, strength = out_of_sample(data, 3, strength=0.5, has_bias=True, seed=0)
    assert strength == 0.5
    folds, x = fold_numbers(data.labels, 3, 0), data.features[:, 0].astype(np.float64)
    for fold in range(3):
        rest = folds != fold
        mean = x[rest].mean(axis=0)
        scale = np.sqrt(((x[rest] - mean) ** 2).mean())
        model = LogisticRegression(C=0.5, max_iter=1000).fit((x[rest] - mean) / scale, data.labels[rest])
        expected = model.predict_proba((x[~rest] - mean) / scale)
        assert probabilities[~rest] == pytest.approx(expected, abs=1e-3)


def test_most_labels_that_were_made_wrong_come_first() -> None:
    data = clusters([60, 60, 60], features=12)
    rng = np.random.default_rng(1)
    wrong = rng.choice(180, 18, replace=False)
    labels = data.labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, 3, 18)) % 3
    noisy = Vectors(data.features, labels, 3)
    errors = find_label_errors(out_of_sample(noisy, 5, strength=None, has_bias=True, seed=0)[0], labels)
    assert len(np.intersect1d(errors.ranked[:18], wrong)) >= 16
    assert (errors.suggested[wrong] == data.labels[wrong]).mean() > 0.9
    assert errors.flagged[wrong].mean() > 0.8


def test_the_only_image_of_a_class_is_not_judged() -> None:
    data = clusters([20, 20, 1])
    errors = find_label_errors(out_of_sample(data, 5, strength=1.0, has_bias=True, seed=0)[0], data.labels)
    (alone,) = np.flatnonzero(data.labels == 2)
    assert errors.ranked[-1] == alone
    assert not errors.flagged[alone]
    assert errors.suggested[alone] == 2
    assert not (errors.suggested[errors.flagged] == 2).any()
