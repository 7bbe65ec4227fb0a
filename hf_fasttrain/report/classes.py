"""What predictions say of each class, and of each pair of classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_fasttrain.run_folder.predictions import Predictions

LARGEST_MATRIX = 1000  # classes


@dataclass(frozen=True)
class ClassFigures:
    """Precision, recall and F1 as scikit-learn has them (0 where they are not defined). Arrays (K,)."""

    support: np.ndarray  # images that are of the class
    predicted: np.ndarray  # images that are said to be
    right: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def class_figures(predictions: Predictions, num_classes: int) -> ClassFigures:
    """Return each class's figures."""
    labels, predicted = predictions.labels.numpy(), predictions.predicted.numpy()
    if predictions.is_multi_label:
        support, said, right = labels.sum(0), predicted.sum(0), (labels & predicted).sum(0)
    else:
        support, said = (np.bincount(which, minlength=num_classes) for which in (labels, predicted))
        right = np.bincount(labels[labels == predicted], minlength=num_classes)
    return ClassFigures(
        support=support,
        predicted=said,
        right=right,
        precision=_share(right, said),
        recall=_share(right, support),
        f1=_share(2 * right, support + said),
    )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)


@dataclass(frozen=True)
class Confusion:
    """How often images of one class are taken for another: `counts` (K, K), truth by prediction."""

    counts: np.ndarray
    classes: np.ndarray  # (K,) which classes these are
    left_out: int  # classes that are not shown
    support: np.ndarray  # (K,) images of each class, those that are taken for a class that is not shown too
    accuracy: float  # of all images

    @property
    def shares(self) -> np.ndarray:
        """The counts as shares of their classes' images."""
        return _share(self.counts, self.support[:, None])


def confusion_of(predictions: Predictions, num_classes: int, largest: int = LARGEST_MATRIX) -> Confusion:
    """Return the confusion matrix of single-label predictions; of more than `largest` classes, those mistaken most."""
    labels, predicted = predictions.labels.numpy(), predictions.predicted.numpy()
    classes = np.arange(num_classes)
    if num_classes > largest:
        wrong = labels != predicted
        times = sum(np.bincount(which[wrong], minlength=num_classes) for which in (labels, predicted))
        classes = np.sort(np.argsort(-times, kind="stable")[:largest])
    place = np.full(num_classes, -1)
    place[classes] = np.arange(len(classes))
    rows, columns = place[labels], place[predicted]
    shown = (rows >= 0) & (columns >= 0)
    size = len(classes)
    counts = np.bincount(rows[shown] * size + columns[shown], minlength=size * size).reshape(size, size)
    support = np.bincount(labels, minlength=num_classes)[classes]
    return Confusion(counts, classes, num_classes - size, support, float((labels == predicted).mean()))


def confused_together(confusion: Confusion) -> np.ndarray:
    """Return an order of the matrix's places in which classes that are taken for each other stand together."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    size = len(confusion.classes)
    if size < 3:
        return np.arange(size)
    alike = confusion.shares + confusion.shares.T
    distance = 1 - np.minimum(alike, 1)
    np.fill_diagonal(distance, 0)
    # The best order of the leaves takes 3 s with 300 classes and grows with their third power.
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=size <= 200)
    return np.asarray(leaves_list(tree))


def most_confused(confusion: Confusion, number: int = 50) -> list[tuple[int, int, int, float]]:
    """Return (truth, prediction, images, share of the truth's images) of the most frequent mistakes."""
    wrong = confusion.counts.copy()
    np.fill_diagonal(wrong, 0)
    shares = confusion.shares
    order = np.lexsort((-shares.ravel(), -wrong.ravel()))[:number]
    places = [divmod(int(place), len(wrong)) for place in order if wrong.ravel()[place]]
    names = confusion.classes
    return [(int(names[r]), int(names[c]), int(wrong[r, c]), float(shares[r, c])) for r, c in places]
