"""Curves of any length as at most 2,000 points that hide nothing: each bucket's mean, least and most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_POINTS = 2000


@dataclass(frozen=True)
class Points:
    """A curve to be drawn. Arrays (P,) float64; a value is nan where nothing is known."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    each: int  # lines that a point stands for
    missing: int  # lines without a finite number

    @property
    def has_band(self) -> bool:
        """Whether a point stands for more than one line."""
        return self.each > 1


def points_of(x: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> Points:
    """Return the curve of `values` (N,) at the ascending steps `x` (N,), in buckets of as many lines each."""
    finite = np.isfinite(values)
    each = max(1, -(-len(values) // most))
    starts = np.arange(0, len(values), each)
    known = np.where(finite, values, np.nan)
    if each == 1:
        return Points(x, known, known, known, 1, int((~finite).sum()))
    number = np.add.reduceat(finite.astype(np.float64), starts)
    number[number == 0] = np.nan
    return Points(
        x=np.add.reduceat(x, starts) / np.add.reduceat(np.ones_like(x), starts),
        mean=np.add.reduceat(np.where(finite, values, 0.0), starts) / number,
        low=np.fmin.reduceat(known, starts),
        high=np.fmax.reduceat(known, starts),
        each=each,
        missing=int((~finite).sum()),
    )
