"""Intervals of metrics, as in result.json, and differences between two runs, with their words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hf_fasttrain.run_folder.result import metric_direction
from hf_fasttrain.utils.format import format_count

RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 0
FEW = 20  # images or groups, of which an interval is too narrow
NO_SPREAD = "is the same in every resample"


@dataclass
class Intervals:
    """The intervals of an evaluation's metrics: percentiles over bootstrap resamples."""

    over: str  # what was drawn: images or groups
    number: int  # of them
    resamples: int
    confidence: float
    seed: int
    metrics: dict[str, list[float]] = field(default_factory=dict)  # name -> [low, high]
    without: dict[str, str] = field(default_factory=dict)  # name -> why it has none

    def add(self, name: str, low: float, high: float) -> None:
        """Add the interval of a metric; one without spread says nothing."""
        if not math.isfinite(low) or not math.isfinite(high):
            self.without[name] = "is NaN or inf in some resamples"
        elif low == high:
            self.without[name] = NO_SPREAD
        else:
            self.metrics[name] = [low, high]


def format_confidence(confidence: float = CONFIDENCE) -> str:
    """Return a confidence as text."""
    return f"{100 * confidence:g} %"


def describe_intervals(intervals: dict[str, Any]) -> str:
    """Return what the intervals of a result.json are, as a sentence."""
    over, number = str(intervals["over"]), int(intervals["number"])
    unit = format_count(number, over.removesuffix("s"))
    if number < 2:
        return f"No intervals: {unit} is too few."
    text = f"{format_confidence(intervals['confidence'])} intervals: bootstrap of {unit}, "
    text += f"{intervals['resamples']:,} resamples."
    if number < FEW:
        text += f" Of fewer than {FEW} {over} they are too narrow."
    return text


@dataclass(frozen=True)
class Difference:
    """How much a metric of a second run is above that of a first one, on the same images."""

    metric: str
    first: float
    second: float
    low: float
    high: float
    over: str
    number: int

    @property
    def is_visible(self) -> bool:
        """Whether the interval excludes no difference."""
        return self.low > 0 or self.high < 0

    def words(self, first: str, second: str) -> str:
        """Return whether the runs, called `first` and `second`, differ."""
        if not self.is_visible:
            return f"no difference can be seen ({self._interval(self.low, self.high)})"
        is_above = self.second > self.first
        ends = (self.low, self.high) if is_above else (-self.high, -self.low)
        direction = metric_direction(self.metric)
        winner = second if is_above == (direction != "min") else first
        by = f"{self._shown(abs(self.second - self.first))}{' points' if self.is_share else ''}"
        return f"{winner} is {'better' if direction else 'higher'} by {by} ({self._interval(*ends)})"

    def _interval(self, low: float, high: float) -> str:
        unit = format_count(self.number, self.over.removesuffix("s"))
        return f"{format_confidence()}: {self._shown(low)} to {self._shown(high)}, {unit}"

    @property
    def is_share(self) -> bool:
        """Whether the metric is shown in percent, as in the report."""
        return "accuracy" in self.metric

    def _shown(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.is_share else f"{value:.4f}"
