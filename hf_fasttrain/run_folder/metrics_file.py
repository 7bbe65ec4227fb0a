"""The lines of metrics.jsonl and bad_images.jsonl, checked one by one: a line that is cut short or damaged is skipped.

They may be a million, so that they are checked by hand: pydantic would take longer than reading them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_fasttrain.utils.files import lines_of, parse_line, read_lines

MAX_STEP = 2**53  # exact as a float too
MAX_VALUES = 1000  # of a line
MAX_NAME = 1000  # characters
TEXTS = {"kind", "split", "date", "checkpoint"}


def parse_metrics_line(text: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl; None unless it has a kind, a step, and numbers (an evaluation also its split)."""
    line = parse_line(text)
    if line is None or len(line) > MAX_VALUES:
        return None
    step, kind = line.get("step"), line.get("kind")
    if type(step) is not int or not 0 <= step < MAX_STEP or not isinstance(kind, str):
        return None
    if kind != "evaluation":
        return line
    split = line.get("split")
    if not isinstance(split, str) or len(split) > MAX_NAME:
        return None
    return {key: value for key, value in line.items() if key in TEXTS or _is_number(value)}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the sound lines of a metrics.jsonl; none if there is no such file."""
    if path.is_file() and path.stat().st_size:
        yield from (line for text in lines_of(path) if (line := parse_metrics_line(text)) is not None)


def read_bad_images(path: Path) -> list[dict[str, Any]]:
    """Return the sound lines of a bad_images.jsonl; none if there is no such file. Raises OSError."""
    return [line for line in read_lines(path) if _is_bad_image(line)]


def _is_bad_image(line: dict[str, Any]) -> bool:
    index, substitute = line.get("index"), line.get("substitute", 0)
    numbers = type(index) is int and 0 <= index < MAX_STEP and (substitute is None or type(substitute) is int)
    texts = all(isinstance(line.get(key, ""), str | None) for key in ("path", "error"))
    return numbers and texts and isinstance(line.get("split"), str)
