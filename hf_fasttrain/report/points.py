"""Downsampling of curves to at most 2,000 points: mean, minimum and maximum of each bucket, so no spike is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_POINTS = 2000


@dataclass(frozen=True)
class Points:
    """A curve to be drawn. Arrays (P,) float64; nan where a value is missing."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lines_per_point: int
    missing: int  # lines without a finite number

    @property
    def has_band(self) -> bool:
        """Whether a point stands for more than one line."""
        return self.lines_per_point > 1


def downsample(x: np.ndarray, values: np.ndarray, most: int = MAX_POINTS) -> Points:
    """Return the curve of `values` (N,) at the ascending steps `x` (N,), in buckets of equally many lines."""
    finite = np.isfinite(values)
    lines_per_point = max(1, -(-len(values) // most))
    starts = np.arange(0, len(values), lines_per_point)
    known = np.where(finite, values, np.nan)
    if lines_per_point == 1:
        return Points(x, known, known, known, 1, int((~finite).sum()))
    number = np.add.reduceat(finite.astype(np.float64), starts)
    number[number == 0] = np.nan
    return Points(
        x=np.add.reduceat(x, starts) / np.add.reduceat(np.ones_like(x), starts),
        mean=np.add.reduceat(np.where(finite, values, 0.0), starts) / number,
        low=np.fmin.reduceat(known, starts),
        high=np.fmax.reduceat(known, starts),
        lines_per_point=lines_per_point,
        missing=int((~finite).sum()),
    )
