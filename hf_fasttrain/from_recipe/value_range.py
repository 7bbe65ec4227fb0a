"""Which values of grey images of more than 8 bits become black and white: one range for all images of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_fasttrain.data.pixels.decode import grey_of
from hf_fasttrain.data.pixels.rgb import ValueRange, default_range
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.from_recipe.auto import decide
from hf_fasttrain.recipe.resolved import ResolvedSettings

KEY = "data.value_range"
SAMPLED = 16  # training images


def resolve_value_range(settings: ResolvedSettings, split: Split) -> ValueRange | None:
    """Return the range of a run, None for the default of each mode; a sample of a split decides it once.

    A range that the user has set clips values beyond it; of any other one they make a bad image.
    """
    is_given = not settings.is_open(KEY)
    found = {} if settings.is_decided(KEY) else _sample(split)
    value = decide(settings, KEY, **found)
    if found:
        settings.note(f"{KEY}=auto: {describe_range(value)} ({settings.decisions[KEY].reason})")
    return None if value == "auto" else ValueRange(value[0], value[1], is_given)


def describe_range(value: ValueRange | list[float] | str | None) -> str:
    """Return which values become black and white."""
    if value is None or value == "auto":
        integers, floats = default_range("I"), default_range("F")
        return f"of integers {integers.low:g} is black and {integers.high:,g} white, of floats {floats.high:g}"
    return f"{value[0]:,g} is black and {value[1]:,g} white"


def _sample(split: Split) -> dict[str, Any]:
    """Return the number, the kind and the extremes of the deep grey images in a sample of a split."""
    rows = np.unique(np.linspace(0, len(split) - 1, min(SAMPLED, len(split)), dtype=np.int64))
    found = [grey for record in split.records(rows) if (grey := grey_of(record)) is not None]
    if not found:
        return {}
    kinds = {grey.kind for grey in found}
    lowest, highest = min(grey.lowest for grey in found), max(grey.highest for grey in found)
    kind = kinds.pop() if len(kinds) == 1 else "both"
    return {"kind": kind, "number": len(found), "lowest": lowest, "highest": highest}
