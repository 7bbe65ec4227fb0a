"""Durations as people write them (`90 epochs`, `5000 steps`), and their conversion to steps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

PATTERN = r"^\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?)\s*$"
CLOCK_PATTERN = PATTERN.replace("steps?", "steps?|minutes?")
MINUTES_PATTERN = PATTERN.replace("epochs?|steps?", "minutes?")
PERCENT_PATTERN = r"^\s*(\d+(?:\.\d+)?)\s*%\s*$"


class MissingUnit(ValueError):
    """A number was given where a number and a unit are needed; the message proposes what to write."""


@dataclass(frozen=True)
class Duration:
    """A number of epochs (fractions are allowed), optimizer steps, wall-clock minutes, or percent of the training."""

    count: float
    unit: str  # "epochs", "steps", "minutes" or "percent"

    @classmethod
    def parse(cls, text: object, *, minutes: bool = False) -> Duration:
        """Read ``90 epochs``, ``0.5 epochs``, ``5000 steps`` or, if allowed, ``10 minutes``; ValueError otherwise.

        Here and below the error is a MissingUnit for a number without its unit.
        """
        if isinstance(text, Duration):
            return text
        match = re.match(CLOCK_PATTERN if minutes else PATTERN, text) if isinstance(text, str) else None
        if match is None:
            _require_unit(text, ("epochs", "steps", *(["minutes"] if minutes else [])))
            clock = ", '5000 steps' or '10 minutes'" if minutes else " or '5000 steps'"
            raise ValueError(f"must be a number and a unit, like '90 epochs'{clock}")
        if len(match[1]) > 12:
            raise ValueError("must be below 10**12")
        unit = f"{match[2].removesuffix('s')}s"
        if unit == "steps" and "." in match[1]:
            raise ValueError("must be a whole number of steps, like '5000 steps'")
        return cls(float(match[1]), unit)

    @classmethod
    def parse_minutes(cls, text: object) -> Duration:
        """Read ``10 minutes``; ValueError otherwise."""
        duration = text if isinstance(text, Duration) else None
        if isinstance(text, str) and re.match(MINUTES_PATTERN, text):
            duration = cls.parse(text, minutes=True)
        if duration is None or duration.unit != "minutes":
            _require_unit(text, ("minutes",))
            raise ValueError("must be a number of minutes, like '10 minutes'")
        return duration

    @classmethod
    def parse_part(cls, text: object) -> Duration:
        """Read a part of the training: ``0``, ``5%``, ``500 steps`` or ``1 epoch``; ValueError otherwise."""
        if isinstance(text, Duration):
            return text
        if text == "0" or (isinstance(text, int | float) and text == 0 and not isinstance(text, bool)):
            return cls(0, "steps")
        if isinstance(text, str) and (match := re.match(PERCENT_PATTERN, text)):
            if float(match[1]) >= 100:
                raise ValueError("must be below 100%")
            return cls(float(match[1]), "percent")
        if isinstance(text, str) and re.match(PATTERN, text):
            return cls.parse(text)
        _require_unit(text, ("percent", "epochs", "steps"))
        raise ValueError("must be 0, a share of the training like '5%', or a number and a unit, like '1 epoch'")

    def to_steps(self, steps_per_epoch: int, num_steps: int = 0) -> int:
        """Return the number of optimizer steps, at least 1 unless the duration is 0; `num_steps` is 100 %."""
        assert self.unit != "minutes", "minutes are not a number of steps"
        steps_per_unit = {"epochs": steps_per_epoch, "percent": num_steps / 100}.get(self.unit, 1)
        steps = self.count * steps_per_unit
        return max(1, round(steps)) if steps > 0 else 0

    def __str__(self) -> str:
        count = int(self.count) if math.floor(self.count) == self.count else self.count
        if self.unit == "percent":
            return f"{count}%"
        return f"{count} {self.unit.removesuffix('s') if count == 1 else self.unit}"


def _require_unit(value: object, units: Sequence[str]) -> None:
    """Raise MissingUnit for a number above 0, or the text of one, that could be meant in one of the units."""
    try:
        count = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        return
    if not 0 < count < 10**12:
        return
    whole = count.is_integer()
    possible = {"epochs": True, "minutes": True, "steps": whole, "percent": count < 100}
    counts = {"percent": round(100 * count, 6) if count < 1 else count}
    forms = [f"'{Duration(counts.get(unit, count), unit)}'" for unit in units if possible[unit]]
    if forms:
        choices = " or ".join(filter(None, (", ".join(forms[:-1]), forms[-1])))
        raise MissingUnit(f"a number needs a unit; write {choices}")
