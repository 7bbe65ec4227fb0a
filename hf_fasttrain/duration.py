"""Lengths of training time as people write them. The one converter to steps; the loop knows only steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

PATTERN = r"^\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?)\s*$"


@dataclass(frozen=True)
class Duration:
    """So many epochs (fractions are allowed) or optimizer steps."""

    count: float
    unit: str  # "epochs" or "steps"

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read ``90 epochs``, ``1 epoch``, ``0.5 epochs`` or ``5000 steps``; raise ValueError otherwise."""
        if isinstance(text, Duration):
            return text
        match = re.match(PATTERN, text) if isinstance(text, str) else None
        if match is None:
            raise ValueError("must be a number and a unit, like '90 epochs' or '5000 steps'")
        if len(match[1]) > 12:
            raise ValueError("is longer than anything trained so far; must be below 10**12")
        unit = "epochs" if match[2].startswith("epoch") else "steps"
        if unit == "steps" and "." in match[1]:
            raise ValueError("steps must be a whole number, like '5000 steps'")
        return cls(float(match[1]), unit)

    def to_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps, at least 1 unless the duration is 0."""
        steps = self.count * (steps_per_epoch if self.unit == "epochs" else 1)
        return max(1, round(steps)) if steps > 0 else 0

    def __str__(self) -> str:
        count = int(self.count) if math.floor(self.count) == self.count else self.count
        return f"{count} {self.unit.removesuffix('s') if count == 1 else self.unit}"
