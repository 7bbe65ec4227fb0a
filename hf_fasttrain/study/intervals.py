"""Medians with distribution-free intervals: the noise of a shared machine is not normal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hf_fasttrain.utils.format import format_interval

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A median, and an interval that holds the true one with probability `confidence`."""

    median: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return format_interval(self.median, self.low, self.high)


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Return the median of independent values, with an interval between two of them.

    The true median lies between the k-th smallest and the k-th largest of n values with probability
    1 - 2 P(Binomial(n, 1/2) < k) (the sign test's interval; Conover, Practical Nonparametric Statistics, 3.2). The
    largest k that keeps `confidence` is used; for 5 values or fewer it is the whole range, with a lower confidence.
    """
    ordered, n = sorted(values), len(values)
    if not n:
        raise ValueError("no values to estimate from")
    cut = 1
    while 2 * (cut + 1) <= n and coverage(n, cut + 1) >= confidence:
        cut += 1
    return Estimate(statistics.median(ordered), ordered[cut - 1], ordered[n - cut], coverage(n, cut))


def coverage(n: int, k: int) -> float:
    """Return the probability that a median lies between the k-th smallest and the k-th largest of n values."""
    return max(0.0, 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n)


def paired_ratio(of: Sequence[float], to: Sequence[float]) -> Estimate:
    """Return the median of `of[i] / to[i]`: pairs are of the same round, so that drift cancels."""
    return estimate([a / b for a, b in zip(of, to, strict=True)])
