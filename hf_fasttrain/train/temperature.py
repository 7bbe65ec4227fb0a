"""Temperature scaling (Guo et al., arXiv 1706.04599): the T for which logits / T give the likeliest probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fasttrain.run_folder.schema_calibration import MAX_TEMPERATURE, MIN_TEMPERATURE

PRECISION = 1e-6  # of the temperature's logarithm


def fit_temperature(logits: Tensor, labels: Tensor) -> tuple[float, str]:
    """Return the temperature of finite logits (N, K) with labels (N,), or multi-hot (N, K), and a remark on its limits.

    It minimises the mean negative log-likelihood (multi-label: the binary one over all classes), which is convex in
    1 / T. If everything is predicted correctly the likelihood has no maximum: it grows as T goes to 0. Then T is where
    the mean confidence of n predictions reaches (n + 1) / (n + 2), Laplace's estimate of the accuracy, and at most 1.
    """
    margins = _margins(logits.double(), labels)
    is_multi_label = labels.ndim == 2
    number = margins.numel() if is_multi_label else len(margins)
    if not bool((margins < 0).any()):
        return _of_separable(margins, number, is_multi_label=is_multi_label), (
            "Every prediction is correct, so the likelihood has no maximum: the temperature is set so that the mean "
            f"confidence is at most {number + 1:,} / {number + 2:,}."
        )
    temperature = _minimum(lambda t: _loss(margins / t, is_multi_label=is_multi_label))
    at_limit = min(temperature / MIN_TEMPERATURE, MAX_TEMPERATURE / temperature) < 1 + 1e-3
    remark = (
        f"The temperature is at its limit; allowed are {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}." if at_limit else ""
    )
    return temperature, remark


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much each class (N, K) is on the right side: the label's logit minus others; or signed."""
    if labels.ndim == 2:
        return torch.where(labels > 0.5, logits, -logits)
    return logits.gather(1, labels[:, None].long()) - logits


def _loss(margins: Tensor, *, is_multi_label: bool) -> float:
    losses = F.softplus(-margins) if is_multi_label else torch.logsumexp(-margins, dim=1)
    return float(losses.mean())


def _confidence(margins: Tensor, *, is_multi_label: bool) -> float:
    """Return the mean probability of the right predictions."""
    right = margins.sigmoid() if is_multi_label else torch.logsumexp(-margins, dim=1).neg().exp()
    return float(right.mean())


def _minimum(loss: Callable[[float], float]) -> float:
    from scipy.optimize import minimize_scalar

    limits = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    found = minimize_scalar(lambda x: loss(math.exp(x)), bounds=limits, method="bounded", options={"xatol": PRECISION})
    return min(max(math.exp(found.x), MIN_TEMPERATURE), MAX_TEMPERATURE)


def _of_separable(margins: Tensor, number: int, *, is_multi_label: bool) -> float:
    from scipy.optimize import brentq

    target = (number + 1) / (number + 2)

    def missing(x: float) -> float:
        return target - _confidence(margins / math.exp(x), is_multi_label=is_multi_label)

    if missing(0.0) <= 0:
        return 1.0
    lowest = math.log(MIN_TEMPERATURE)
    return math.exp(brentq(missing, lowest, 0.0, xtol=PRECISION)) if missing(lowest) < 0 else MIN_TEMPERATURE
