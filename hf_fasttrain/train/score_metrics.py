"""Metrics of all scores of a split, not of counts: the area under the ROC curve, and mean average precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.run_folder.result import SCORE_METRICS, TUNED_METRICS
from hf_fasttrain.train.user_metrics import UserMetrics
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.format import format_bytes, format_count

COPIES = 2  # of the scores at the peak: the batches, and all of them joined


class ScoreMetrics(UserMetrics):
    """Metrics of SCORE_METRICS: means over the classes that some images have and others don't, each against the rest.

    They are scikit-learn's `roc_auc_score` and `average_precision_score` (macro) of softmax's probabilities, or, if an
    image may have several classes, of the logits. Classes that all or none of the images have are left out. The main
    process holds N x K scores in float32.
    """

    def choose(self, names: Iterable[str]) -> None:
        """Compute those of `names` that are metrics of scores, from the next pass on."""
        self.functions = {name: FUNCTIONS[name] for name in names if name in FUNCTIONS}


def _columns(logits: Tensor, labels: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (N,) whether an image has the class, and its score, of each class that some have and some have not."""
    values = logits.numpy()
    rest = torch.logsumexp(logits.double(), dim=1).numpy() if labels.ndim == 1 else None
    for number in range(logits.shape[1]):
        has_class = (labels == number if labels.ndim == 1 else labels[:, number] > 0.5).numpy()
        if has_class.any() and not has_class.all():
            column = values[:, number]
            yield has_class, column if rest is None else np.exp(column.astype(np.float64) - rest)


def _mean(logits: Tensor, labels: Tensor, score: Callable[[np.ndarray, np.ndarray], float]) -> float:
    values = [score(has_class, scores) for has_class, scores in _columns(logits, labels)]
    if not values:
        raise RunError("it needs a class that some images have and others have not")
    return float(np.mean(values))


def auroc(logits: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve of each class against the rest, averaged."""
    from sklearn.metrics import roc_auc_score

    return _mean(logits, labels, roc_auc_score)


def mean_average_precision(logits: Tensor, labels: Tensor) -> float:
    """Return the average precision of each class against the rest, averaged."""
    from sklearn.metrics import average_precision_score

    return _mean(logits, labels, average_precision_score)


FUNCTIONS = dict(zip(SCORE_METRICS, (auroc, mean_average_precision), strict=True))


def require_memory(names: Iterable[str], num_images: int, num_classes: int, free: int) -> None:
    """Raise RunError if the scores of an evaluation don't fit into `free` bytes."""
    needs_all = (*SCORE_METRICS, *TUNED_METRICS)
    chosen, needed = [name for name in names if name in needs_all], COPIES * 4 * num_images * num_classes
    if chosen and needed > free:
        raise RunError(
            f"{'evaluate.thresholds=tuned' if set(chosen) <= set(TUNED_METRICS) else 'evaluate.metrics'}: "
            f"{', '.join(chosen)} needs all scores of {format_count(num_images, 'image')} x "
            f"{num_classes:,} classes, {format_bytes(needed)} of memory; {format_bytes(free)} are free: "
            "lower evaluate.max_images, or leave it out"
        )
