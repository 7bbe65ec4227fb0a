"""Precision, recall and F1 of each class, and the confusion matrix, from a run's predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hf_fasttrain.run_folder.bits import count_bits
from hf_fasttrain.run_folder.predictions import Predictions

MAX_MATRIX_CLASSES = 1000  # classes


@dataclass(frozen=True)
class ClassFigures:
    """Precision, recall and F1 as scikit-learn computes them (0 where they are undefined). Arrays (K,)."""

    support: np.ndarray  # images of the class
    predicted: np.ndarray  # images that are predicted as the class
    correct: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def class_figures(predictions: Predictions, num_classes: int) -> ClassFigures:
    """Return the metrics of each class."""
    if predictions.is_multi_label:
        bits = (predictions.labels, predictions.predicted, predictions.labels & predictions.predicted)
        support, num_predicted, correct = (_counts(each, predictions.num_classes, num_classes) for each in bits)
    else:
        labels, predicted = predictions.labels.numpy(), predictions.predicted.numpy()
        support, num_predicted = (np.bincount(which, minlength=num_classes) for which in (labels, predicted))
        correct = np.bincount(labels[labels == predicted], minlength=num_classes)
    return ClassFigures(
        support=support,
        predicted=num_predicted,
        correct=correct,
        precision=_share(correct, num_predicted),
        recall=_share(correct, support),
        f1=_share(2 * correct, support + num_predicted),
    )


def _counts(bits: Tensor, of_predictions: int, num_classes: int) -> np.ndarray:
    """Return the images of each class; the run may name more classes than there are predictions of."""
    counts = count_bits(bits, of_predictions).numpy()
    return np.pad(counts, (0, max(0, num_classes - of_predictions)))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix: `counts` (K, K), truth by prediction."""

    counts: np.ndarray
    classes: np.ndarray  # (K,) their numbers
    left_out: int  # number of classes that are not shown
    support: np.ndarray  # (K,) images of each class, also those predicted as a class that is not shown
    accuracy: float  # of all images

    @property
    def shares(self) -> np.ndarray:
        """The counts as shares of their classes' images."""
        return _share(self.counts, self.support[:, None])


def confusion_matrix(predictions: Predictions, num_classes: int, largest: int = MAX_MATRIX_CLASSES) -> Confusion:
    """Return the confusion matrix of single-label predictions; of more than `largest` classes, the most confused."""
    labels, predicted = predictions.labels.numpy(), predictions.predicted.numpy()
    classes = np.arange(num_classes)
    if num_classes > largest:
        wrong = labels != predicted
        times = sum(np.bincount(which[wrong], minlength=num_classes) for which in (labels, predicted))
        classes = np.sort(np.argsort(-times, kind="stable")[:largest])
    position = np.full(num_classes, -1)
    position[classes] = np.arange(len(classes))
    rows, columns = position[labels], position[predicted]
    shown = (rows >= 0) & (columns >= 0)
    size = len(classes)
    counts = np.bincount(rows[shown] * size + columns[shown], minlength=size * size).reshape(size, size)
    support = np.bincount(labels, minlength=num_classes)[classes]
    return Confusion(counts, classes, num_classes - size, support, float((labels == predicted).mean()))


def cluster_classes(confusion: Confusion) -> np.ndarray:
    """Return an order (K,) of the matrix's rows in which classes that are confused with each other are neighbours."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    size = len(confusion.classes)
    if size < 3:
        return np.arange(size)
    similarity = confusion.shares + confusion.shares.T
    distance = 1 - np.minimum(similarity, 1)
    np.fill_diagonal(distance, 0)
    # The optimal order of the leaves takes 3 s for 300 classes, and grows with their third power.
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=size <= 200)
    return np.asarray(leaves_list(tree))


def most_confused(confusion: Confusion, number: int = 50) -> list[tuple[int, int, int, float]]:
    """Return (truth, prediction, images, share of the truth's images) of the most frequent mistakes."""
    wrong = confusion.counts.copy()
    np.fill_diagonal(wrong, 0)
    shares = confusion.shares
    order = np.lexsort((-shares.ravel(), -wrong.ravel()))[:number]
    cells = [divmod(int(index), len(wrong)) for index in order if wrong.ravel()[index]]
    classes = confusion.classes
    return [(int(classes[r]), int(classes[c]), int(wrong[r, c]), float(shares[r, c])) for r, c in cells]
