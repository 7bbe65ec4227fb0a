"""Classifiers of features by scikit-learn: logistic regression, whose strength is chosen, and nearest neighbours.

What is chosen is chosen on a part of the training images, never on the evaluation split.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import log_softmax

from hf_fasttrain.models.features import LinearHead

PART = 0.2  # of the training images, on which strength and number of neighbours are chosen
MOST_IMAGES = 20_000  # of those used for choosing; more would take long and choose the same
STRENGTHS = tuple(float(10.0**power) for power in np.arange(-4.0, 2.5, 0.5))  # scikit-learn's C: 1 / regularisation
NEIGHBORS = (1, 3, 5, 10, 20)
MOST_STEPS = 1000  # of the solver
THREADED_WORK = 10**9
UNSEEN = 10.0  # by how much the logit of a class without images is below the mean of the others


@dataclass(frozen=True)
class Vectors:
    """Features of images, and their classes."""

    features: np.ndarray  # (N, V, C) float32: the evaluation crop first, then augmented views
    labels: np.ndarray  # (N,) class numbers, or (N, K) 0 and 1
    num_classes: int
    weights: np.ndarray | None = None  # (N,) of the images in the loss
    class_weights: np.ndarray | None = None  # (K,); multi-label: of the classes that an image has

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.labels.ndim == 2

    def part(self, rows: np.ndarray) -> Vectors:
        """Return some of the images."""
        weights = None if self.weights is None else self.weights[rows]
        return replace(self, features=self.features[rows], labels=self.labels[rows], weights=weights)

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the features (N * V, C) of all views, and the labels of each of them."""
        views = self.features.shape[1]
        return self.features.reshape(len(self) * views, -1), np.repeat(self.labels, views, axis=0)

    def weights_for(self, targets: np.ndarray, number: int) -> np.ndarray | None:
        """Return the weight of each view in the regression with `targets`; `number`: of its class (multi-label)."""
        if self.weights is None and self.class_weights is None:
            return None
        weights = np.repeat(np.ones(len(self)) if self.weights is None else self.weights, self.features.shape[1])
        if self.class_weights is None:
            return weights
        if self.is_multi_label:
            return weights * np.where(targets > 0, self.class_weights[number], 1.0)
        return weights * self.class_weights[targets]


@dataclass(frozen=True)
class Regression:
    """A fitted logistic regression."""

    head: LinearHead
    strength: float  # scikit-learn's C
    chosen_on: int  # images on which the strength was chosen; 0: it was given
    has_converged: bool


def fit_regression(data: Vectors, *, strength: float | None, has_bias: bool, seed: int) -> Regression:
    """Return the multinomial logistic regression of features, or one regression for each class (multi-label).

    Features are centred, and scaled by one number, so that a strength means the same for all models; scaling each by
    its own deviation was worse (flowers, EfficientNet-Lite0: loss 0.30 instead of 0.24). Without a `strength` it is
    chosen by the mean loss on a fifth of the images, then all of them are used. Without `has_bias` there is no
    intercept.
    """
    chosen_on = 0
    if strength is None:
        strength, chosen_on = choose_strength(data, has_bias=has_bias, seed=seed)
    *_, (head, has_converged) = _path(data, [strength], has_bias=has_bias)
    return Regression(head, strength, chosen_on, has_converged)


def choose_strength(data: Vectors, *, has_bias: bool, seed: int) -> tuple[float, int]:
    """Return the strength with the least loss on a part of the images, and how many these are."""
    fitted, held = split_rows(data, seed)
    if not len(held):
        return 1.0, 0
    part, test = data.part(fitted), data.part(held)
    losses: list[float] = []
    for head, _ in _path(part, STRENGTHS, has_bias=has_bias):
        losses.append(mean_loss(head, test))
        if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
            break  # it is convex but for noise, and weak regularisation takes longest
    return STRENGTHS[int(np.argmin(losses))], len(held)


def split_rows(data: Vectors, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to fit and those to choose by, a fifth of each class; a class with one image is fitted.

    Images with several classes are drawn regardless of them.
    """
    rng = np.random.default_rng([seed, len(data), 2])
    order = rng.permutation(len(data))[:MOST_IMAGES]
    if data.is_multi_label:
        number = int(PART * len(order))
        return np.sort(order[number:]), np.sort(order[:number])
    by_class = order[np.argsort(data.labels[order], kind="stable")]
    counts = np.bincount(data.labels[by_class], minlength=data.num_classes)
    rank = np.arange(len(by_class)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
    is_held = rank < np.repeat(np.where(counts > 1, np.maximum(1, (PART * counts).astype(int)), 0), counts)
    return np.sort(by_class[~is_held]), np.sort(by_class[is_held])


def _path(data: Vectors, strengths: Any, *, has_bias: bool) -> Iterator[tuple[LinearHead, bool]]:
    """Yield the regression of each strength, and whether the solver has converged; each begins with the one before."""
    from sklearn.linear_model import LogisticRegression

    vectors, labels = data.flat()
    mean = vectors.mean(axis=0, dtype=np.float64) if has_bias else np.zeros(vectors.shape[1])
    scaled = vectors - mean  # float64, as the solver computes
    scale = float(np.sqrt(np.mean(scaled**2))) or 1.0
    scaled /= scale
    targets = labels.T if data.is_multi_label else labels[None]  # of each regression
    weights = [data.weights_for(target, number) for number, target in enumerate(targets)]
    options = {"max_iter": MOST_STEPS, "fit_intercept": has_bias, "warm_start": True}
    models = [LogisticRegression(**options) for _ in targets]
    for strength in strengths:
        with warnings.catch_warnings(), threads_for(vectors.size * data.num_classes):
            warnings.simplefilter("ignore")  # of a solver that has not converged, which is returned
            for model, target, each in zip(models, targets, weights, strict=True):
                model.C = strength
                if len(np.unique(target)) > 1:
                    model.fit(scaled, target, sample_weight=each)
        is_done = all(int(np.max(getattr(model, "n_iter_", 0))) < MOST_STEPS for model in models)
        combined = _one_by_one if data.is_multi_label else _together
        weight, bias = combined(models, targets, (data.num_classes, len(mean)))
        weight = weight / scale
        bias = bias - weight @ mean if has_bias else np.zeros_like(bias)
        yield LinearHead(weight.astype(np.float32), bias.astype(np.float32)), is_done


def threads_for(work: int) -> Any:
    """Return a context in which BLAS and OpenMP use one thread unless a pass has much to compute (multiplications).

    Their threads take longer to start and end than a small product does: 1,000 images with 1,280 features were fitted
    in 0.7 s instead of 2.5 s.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1 if work < THREADED_WORK else None)


def _together(models: list[Any], targets: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (K, C) and biases (K,) of one regression of all classes."""
    (model,), known = models, np.unique(targets[0])
    weights, biases = np.zeros(shape), np.full(shape[0], -UNSEEN)
    if len(known) < 2:  # nothing was fitted
        biases[known] = 0.0
        return weights, biases
    weight, bias = model.coef_, np.broadcast_to(model.intercept_, len(model.coef_))
    if len(known) == 2:  # scikit-learn gives the difference of the two
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weights += weight.mean(axis=0)  # so that no class without images is ever the likeliest
    biases += bias.mean()
    weights[known], biases[known] = weight, bias
    return weights, biases


def _one_by_one(models: list[Any], targets: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (K, C) and biases (K,) of a regression for each class; constants for what all or none have."""
    weights, biases = np.zeros(shape), np.zeros(shape[0])
    for number, (model, target) in enumerate(zip(models, targets, strict=True)):
        if hasattr(model, "coef_"):
            weights[number], biases[number] = model.coef_[0], np.ravel(model.intercept_)[0]
        else:
            biases[number] = UNSEEN if target[0] else -UNSEEN
    return weights, biases


def logits_of(head: LinearHead, data: Vectors) -> np.ndarray:
    """Return the logits (N, K) of the evaluation crops."""
    return np.asarray(data.features[:, 0] @ head.weight.T + head.bias)


def mean_loss(head: LinearHead, data: Vectors) -> float:
    """Return the mean loss of the evaluation crops, weighted: cross-entropy, or binary summed over the classes."""
    logits, weights = logits_of(head, data).astype(np.float64), data.weights
    if data.is_multi_label:
        positive = 1.0 if data.class_weights is None else data.class_weights
        losses = positive * data.labels * np.logaddexp(0, -logits) + (1 - data.labels) * np.logaddexp(0, logits)
        return float(np.average(losses.sum(axis=1), weights=weights))
    losses = -log_softmax(logits, axis=1)[np.arange(len(data)), data.labels]
    if data.class_weights is not None:
        weights = data.class_weights[data.labels] * (1.0 if weights is None else weights)
    return float(np.average(losses, weights=weights))


class Neighbors:
    """k nearest neighbours by cosine similarity, among the evaluation crops; k is chosen unless it is given."""

    def __init__(self, data: Vectors, number: int | None, seed: int) -> None:
        self.number = number or self._choose(data, seed)
        self.number = min(self.number, len(data))
        self.num_classes, self.is_multi_label = data.num_classes, data.is_multi_label
        self._model = _fitted_neighbors(data, self.number)

    def _choose(self, data: Vectors, seed: int) -> int:
        fitted, held = split_rows(data, seed)
        options = [number for number in NEIGHBORS if number <= len(fitted)]
        if not len(held) or not options:
            return 1
        part, test = data.part(fitted), data.part(held)
        _, nearest = _fitted_neighbors(part, options[-1]).kneighbors(test.features[:, 0])
        shares = (votes(part.labels[nearest[:, :number]], data.num_classes) for number in options)
        right = [_share_right(share, test.labels) for share in shares]
        return options[int(np.argmax(right))]

    def shares(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the shares (N, K) of the neighbours of `features` (N, C) that have each class."""
        _, nearest = self._model.kneighbors(features)
        return votes(labels[nearest], self.num_classes)


def votes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the share of each class (N, K) among the labels of k neighbours, (N, k) or (N, k, K)."""
    if labels.ndim == 3:
        return np.asarray(labels.mean(axis=1))
    counts = np.zeros((len(labels), num_classes))
    for column in labels.T:
        counts[np.arange(len(labels)), column] += 1
    return counts / labels.shape[1]


def _fitted_neighbors(data: Vectors, number: int) -> Any:
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=number, metric="cosine", algorithm="brute").fit(data.features[:, 0])


def _share_right(shares: np.ndarray, labels: np.ndarray) -> float:
    if labels.ndim == 2:
        return float(((shares >= 0.5) == (labels > 0.5)).all(axis=1).mean())
    return float((shares.argmax(axis=1) == labels).mean())


def as_logits(shares: np.ndarray, *, multi_label: bool) -> np.ndarray:
    """Return logits whose softmax, or sigmoid, are the shares; 0 and 1 become 1e-6 and 1 - 1e-6."""
    shares = np.clip(shares, 1e-6, 1 - 1e-6)
    return np.log(shares) - np.log1p(-shares) if multi_label else np.log(shares)
