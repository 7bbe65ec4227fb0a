"""Logistic regression and nearest neighbours of features, compared with scikit-learn used plainly."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hf_fasttrain.train.linear_probe import (
    STRENGTHS,
    Neighbors,
    Vectors,
    as_logits,
    fit_regression,
    logits_of,
    mean_loss,
    split_rows,
)


@pytest.fixture
def digits() -> Vectors:
    """Return 300 digits, whose pixels are the features."""
    pixels, labels = load_digits(return_X_y=True)
    return Vectors(pixels[:300, None].astype(np.float32), labels[:300], 10)


def reference(data: Vectors, strength: float, **options: object) -> LogisticRegression:
    pixels = data.features[:, 0].astype(np.float64)
    centred = pixels - pixels.mean(axis=0)
    return LogisticRegression(C=strength, max_iter=3000).fit(centred / centred.std(), data.labels, **options)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_head_has_the_logits_of_scikit_learns_regression(digits: Vectors, weighted: bool) -> None:
    class_weights = np.linspace(0.5, 2, 10) if weighted else None
    data = Vectors(digits.features, digits.labels, 10, class_weights=class_weights)
    fitted = fit_regression(data, strength=0.1, has_bias=True, seed=0)
    weights = None if class_weights is None else class_weights[data.labels]
    expected = reference(digits, 0.1, sample_weight=weights).coef_
    scale = (pixels := digits.features[:, 0].astype(np.float64) - digits.features[:, 0].mean(axis=0)).std()
    assert fitted.head.weight * scale == pytest.approx(expected, abs=2e-3)
    assert fitted.has_converged
    assert (logits_of(fitted.head, data).argmax(axis=1) == (pixels / scale @ expected.T).argmax(axis=1)).mean() > 0.98


def test_the_strength_is_the_one_with_the_least_loss_on_a_fifth_of_the_images(digits: Vectors) -> None:
    fitted, held = split_rows(digits, 3)
    assert sorted([*fitted, *held]) == list(range(300))
    counts = np.bincount(digits.labels)
    assert np.bincount(digits.labels[held]).tolist() == [int(0.2 * count) for count in counts]
    chosen = fit_regression(digits, strength=None, has_bias=True, seed=3)
    assert chosen.chosen_on == len(held)

    def loss(strength: float) -> float:
        head = fit_regression(digits.part(fitted), strength=strength, has_bias=True, seed=3).head
        return mean_loss(head, digits.part(held))

    around = [s for s in STRENGTHS if 0.2 < s / chosen.strength < 5]
    assert min(around, key=loss) == chosen.strength


def test_a_class_without_images_is_never_the_likeliest(digits: Vectors) -> None:
    data = Vectors(digits.features, digits.labels, 12)
    head = fit_regression(data, strength=1.0, has_bias=True, seed=0).head
    assert head.weight.shape == (12, 64)
    assert set(logits_of(head, data).argmax(axis=1)) <= set(range(10))


@pytest.mark.parametrize("known", [[4], [4, 7]])
def test_one_and_two_classes(digits: Vectors, known: list[int]) -> None:
    rows = np.flatnonzero(np.isin(digits.labels, known))
    part = digits.part(rows)
    head = fit_regression(part, strength=None, has_bias=True, seed=0).head
    assert (logits_of(head, part).argmax(axis=1) == part.labels).all()
    if len(known) == 2:
        model = reference(part, fit_regression(part, strength=None, has_bias=True, seed=0).strength)
        odds = logits_of(head, part)[:, 7] - logits_of(head, part)[:, 4]
        pixels = part.features[:, 0].astype(np.float64) - part.features[:, 0].mean(axis=0)
        assert odds == pytest.approx(model.decision_function(pixels / pixels.std()), abs=2e-2)


def test_several_labels_are_a_regression_for_each_class(digits: Vectors) -> None:
    hot = np.stack([digits.labels % 2, digits.labels > 4, np.zeros(300), np.ones(300)], axis=1).astype(np.float32)
    data = Vectors(digits.features, hot, 4)
    fitted = fit_regression(data, strength=0.1, has_bias=True, seed=0)
    logits = logits_of(fitted.head, data)
    pixels = digits.features[:, 0].astype(np.float64) - digits.features[:, 0].mean(axis=0)
    for number in (0, 1):
        model = LogisticRegression(C=0.1, max_iter=3000).fit(pixels / pixels.std(), hot[:, number])
        assert logits[:, number] == pytest.approx(model.decision_function(pixels / pixels.std()), abs=2e-2)
    assert (logits[:, 2] < 0).all()
    assert (logits[:, 3] > 0).all()
    assert fit_regression(data, strength=None, has_bias=True, seed=0).strength > 0
    shares = Neighbors(data, 5, 0).shares(digits.features[:10, 0], hot)
    assert ((as_logits(shares, multi_label=True) >= 0) == (shares >= 0.5)).all()


def test_views_are_further_vectors_of_their_images(digits: Vectors) -> None:
    twice = Vectors(np.repeat(digits.features, 2, axis=1), digits.labels, 10)
    once = fit_regression(digits, strength=0.2, has_bias=True, seed=0).head
    assert fit_regression(twice, strength=0.1, has_bias=True, seed=0).head.weight == pytest.approx(
        once.weight, abs=1e-3
    )


def test_a_head_without_bias_is_fitted_without_one(digits: Vectors) -> None:
    head = fit_regression(digits, strength=1.0, has_bias=False, seed=0).head
    assert not head.bias.any()
    assert (logits_of(head, digits).argmax(axis=1) == digits.labels).mean() > 0.95


def test_the_neighbors_are_scikit_learns(digits: Vectors) -> None:
    train, test = digits.part(np.arange(200)), digits.part(np.arange(200, 300))
    neighbors = Neighbors(train, 3, 0)
    expected = KNeighborsClassifier(3, metric="cosine", algorithm="brute").fit(train.features[:, 0], train.labels)
    shares = neighbors.shares(test.features[:, 0], train.labels)
    assert shares[:, expected.classes_] == pytest.approx(expected.predict_proba(test.features[:, 0]))
    assert Neighbors(train, None, 0).number in (1, 3, 5, 10, 20)
    assert Neighbors(digits.part(np.arange(2)), 20, 0).number == 2
