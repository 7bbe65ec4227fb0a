"""Lengths of training time as people write them. The one converter to steps; the loop knows only steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

PATTERN = r"^\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?)\s*$"
CLOCK_PATTERN = PATTERN.replace("steps?", "steps?|minutes?")
MINUTES_PATTERN = PATTERN.replace("epochs?|steps?", "minutes?")


@dataclass(frozen=True)
class Duration:
    """So many epochs (fractions are allowed), optimizer steps, or, where a clock decides, minutes."""

    count: float
    unit: str  # "epochs", "steps" or "minutes"

    @classmethod
    def parse(cls, text: object, *, minutes: bool = False) -> Duration:
        """Read ``90 epochs``, ``0.5 epochs``, ``5000 steps`` or, if allowed, ``10 minutes``; ValueError otherwise."""
        if isinstance(text, Duration):
            return text
        match = re.match(CLOCK_PATTERN if minutes else PATTERN, text) if isinstance(text, str) else None
        if match is None:
            clock = ", '5000 steps' or '10 minutes'" if minutes else " or '5000 steps'"
            raise ValueError(f"must be a number and a unit, like '90 epochs'{clock}")
        if len(match[1]) > 12:
            raise ValueError("is longer than anything trained so far; must be below 10**12")
        unit = f"{match[2].removesuffix('s')}s"
        if unit == "steps" and "." in match[1]:
            raise ValueError("steps must be a whole number, like '5000 steps'")
        return cls(float(match[1]), unit)

    @classmethod
    def parse_minutes(cls, text: object) -> Duration:
        """Read ``10 minutes``; ValueError otherwise."""
        found = text if isinstance(text, Duration) else None
        if isinstance(text, str) and re.match(MINUTES_PATTERN, text):
            found = cls.parse(text, minutes=True)
        if found is None or found.unit != "minutes":
            raise ValueError("must be a number of minutes, like '10 minutes'")
        return found

    def to_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps, at least 1 unless the duration is 0."""
        assert self.unit != "minutes", "a clock's minutes are no number of steps"
        steps = self.count * (steps_per_epoch if self.unit == "epochs" else 1)
        return max(1, round(steps)) if steps > 0 else 0

    def __str__(self) -> str:
        count = int(self.count) if math.floor(self.count) == self.count else self.count
        return f"{count} {self.unit.removesuffix('s') if count == 1 else self.unit}"
