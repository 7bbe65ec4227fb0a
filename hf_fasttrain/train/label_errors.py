"""Likely label errors: confident learning on out-of-sample probabilities.

Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 70 (2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from hf_fasttrain.train.linear_probe import Vectors, choose_strength, fit_regression, logits_of

ROUNDING = 1e-6  # by which a probability may miss its threshold


@dataclass(frozen=True)
class LabelErrors:
    """What confident learning says of N images with one of K labels each."""

    probabilities: np.ndarray  # (N, K), each image's by a model that was fitted without it
    labels: np.ndarray  # (N,) as given
    judged: np.ndarray  # (N,) bool; not the only image of a class, for which no model knows the class
    suggested: np.ndarray  # (N,) labels; the given ones where there is no other that is likelier
    flagged: np.ndarray  # (N,) bool: confidently of another class

    @property
    def margins(self) -> np.ndarray:
        """The probability of the given label less that of the likeliest other, (N,) from -1 to 1."""
        others = self.probabilities.copy()
        others[np.arange(len(others)), self.labels] = -1
        return np.asarray(self._of(self.labels) - others.max(axis=1))

    @property
    def losses(self) -> np.ndarray:
        """The out-of-sample cross-entropy of each image, (N,)."""
        return np.asarray(-np.log(np.maximum(self._of(self.labels), 1e-300)))

    @property
    def ranked(self) -> np.ndarray:
        """The images, most likely errors first: by the margin, then by the loss; those not judged come last."""
        return np.lexsort((-self.losses, self.margins, ~self.judged))

    def _of(self, labels: np.ndarray) -> np.ndarray:
        return np.asarray(self.probabilities[np.arange(len(labels)), labels])

    def probability_of_given(self) -> np.ndarray:
        """Return the probability of each given label, (N,)."""
        return self._of(self.labels)

    def probability_of_suggested(self) -> np.ndarray:
        """Return the probability of each suggested label, (N,)."""
        return self._of(self.suggested)


def fold_numbers(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Return the fold of each image, (N,) from 0: each class is spread evenly, and so are all images."""
    order = np.random.default_rng([seed, len(labels), 3]).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), np.int64)
    folds[by_class] = np.arange(len(labels)) % num_folds  # neighbours in this order are of the same class
    return folds


def out_of_sample(
    data: Vectors, num_folds: int, *, strength: float | None, has_bias: bool, seed: int
) -> tuple[np.ndarray, float]:
    """Return the probabilities (N, K) of images by regressions that were fitted to the other folds, and their strength.

    Without a `strength` it is chosen once, for all folds, on a fifth of the images: one number that all of them share.
    """
    if strength is None:
        strength, _ = choose_strength(data, has_bias=has_bias, seed=seed)
    folds = fold_numbers(data.labels, num_folds, seed)
    probabilities = np.zeros((len(data), data.num_classes))
    for fold in range(num_folds):
        held = np.flatnonzero(folds == fold)
        if not len(held):
            continue
        fitted = fit_regression(
            data.part(np.flatnonzero(folds != fold)), strength=strength, has_bias=has_bias, seed=seed
        )
        probabilities[held] = softmax(logits_of(fitted.head, data.part(held)).astype(np.float64), axis=1)
    return probabilities, strength


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> LabelErrors:
    """Return which labels are probably wrong by out-of-sample probabilities (N, K) of the labels (N,).

    The threshold of a class is the mean probability of the class among the images that are labelled so. An image is
    confidently of the likeliest class whose threshold its probability reaches. One whose confident class is not its
    label is flagged: it is outside of the diagonal of the confident joint.
    """
    num_classes = probabilities.shape[1]
    counts = np.bincount(labels, minlength=num_classes)
    judged = counts[labels] > 1
    totals = np.bincount(labels, probabilities[np.arange(len(labels)), labels], minlength=num_classes)
    thresholds = np.where(counts > 1, totals / np.maximum(counts, 1), np.inf)
    confident = np.where(probabilities >= thresholds - ROUNDING, probabilities, -1.0)
    confident_class = np.where(confident.max(axis=1) >= 0, confident.argmax(axis=1), labels)
    flagged = judged & (confident_class != labels)
    suggested = np.where(flagged, confident_class, np.where(judged, probabilities.argmax(axis=1), labels))
    return LabelErrors(probabilities, labels, judged, suggested, flagged)
