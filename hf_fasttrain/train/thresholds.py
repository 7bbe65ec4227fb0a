"""Thresholds of classes, where an image may have several: those that give the best F1 on the evaluation split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DEFAULT = 0.5


def tune_thresholds(logits: Tensor, labels: Tensor) -> list[float]:
    """Return for each class the probability from which it is predicted so that its F1 is largest; logits (N, K).

    Candidates are the middles between neighbouring probabilities of the images (Lipton et al., arXiv 1402.1892, for
    what the best threshold is). Of equal F1, the candidate nearest to 0.5 is taken. A class that no image has keeps
    0.5, since its F1 is 0 with any threshold.
    """
    return [_best(logits[:, number].double().sigmoid(), labels[:, number] > 0.5) for number in range(logits.shape[1])]


def _best(scores: Tensor, has_class: Tensor) -> float:
    """Return the threshold of one class from the probabilities (N,) and whether images have the class (N,)."""
    if not bool(has_class.any()):
        return DEFAULT
    scores, order = scores.sort(descending=True)
    right = has_class[order].double().cumsum(0)
    last = torch.cat([scores[:-1] > scores[1:], torch.ones(1, dtype=torch.bool)])  # of images with equal scores
    f1 = (2 * right / (torch.arange(1, len(scores) + 1) + right[-1]))[last]
    lowest = scores[last]  # that is predicted
    below = torch.cat([lowest[1:], torch.zeros(1, dtype=scores.dtype)])
    middle = (lowest + below) / 2
    thresholds = torch.where(middle > below, middle, lowest)
    ties = (f1 >= f1.max()).nonzero().flatten()
    nearest = (thresholds[ties] - DEFAULT).abs().argmin()
    return float(thresholds[ties[nearest]])


def beyond(logits: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return logits (N, K) minus those of the thresholds (K,) of probabilities: a class is predicted from 0 on."""
    limits = torch.tensor(thresholds, dtype=torch.float64, device=logits.device)
    return logits.double() - torch.logit(limits)
