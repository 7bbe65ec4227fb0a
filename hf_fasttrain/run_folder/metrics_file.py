"""The lines of metrics.jsonl and bad_images.jsonl, checked one by one: a line that is cut short or damaged is skipped.

They may be a million, so that they are checked by hand: pydantic would take longer than reading them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hf_fasttrain.utils.files import NO_LINK, open_regular
from hf_fasttrain.utils.json_lines import MAX_LINE, lines_of, parse_line

BLOCK = 1 << 16  # bytes that are read at once, from the end
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


def last_steps(path: Path, kinds: Collection[str]) -> dict[str, int]:
    """Return the step of the last sound line of each kind in a metrics.jsonl, 0 without one; read from its end."""
    found: dict[str, int] = {}
    for _, data in _lines_from_end(path):
        if len(found) == len(kinds):
            break
        if any(f'"{kind}"'.encode() in data for kind in kinds if kind not in found):
            line = parse_metrics_line(data.decode(errors="replace"))
            if line is not None and line["kind"] in kinds:
                found.setdefault(line["kind"], line["step"])
    return {kind: found.get(kind, 0) for kind in kinds}


def evaluation_at(path: Path, step: int) -> dict[str, Any] | None:
    """Return the first evaluation after `step` steps in a metrics.jsonl, None without one; read from its end."""
    found = None
    for _, data in _lines_from_end(path):
        line = parse_metrics_line(data.decode(errors="replace"))
        if line is not None and line["step"] < step:
            break
        if line is not None and line["step"] == step and line["kind"] == "evaluation":
            found = line
    return found


def drop_lines_after(path: Path, step: int) -> None:
    """Cut a metrics.jsonl after its last sound line of at most `step`: lines are in that order.

    Raises OSError, also for a link.
    """
    for start, data in _lines_from_end(path):
        line = parse_metrics_line(data.decode(errors="replace"))
        if line is not None and line["step"] <= step:
            end = start + len(data)
            break
    else:
        end = 0
    if path.is_file() and path.stat().st_size > end:
        descriptor = os.open(path, os.O_WRONLY | NO_LINK)
        try:
            os.ftruncate(descriptor, end)
        finally:
            os.close(descriptor)


def _lines_from_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (position in the file, line with its newline) of a file, the last line first.

    Of a longer line than MAX_LINE only a piece that can't be parsed is yielded.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    with open_regular(path) as file:
        position, rest = file.seek(0, os.SEEK_END), b""  # the part of a line whose beginning has not been read
        while position:
            size = min(BLOCK, position)
            position -= size
            file.seek(position)
            data = file.read(size) + rest
            stop = len(data)
            while (newline := data.rfind(b"\n", 0, stop - 1)) >= 0:
                yield position + newline + 1, data[newline + 1 : stop]
                stop = newline + 1
            rest = data[:stop] if stop <= MAX_LINE else b"!" + data[stop - 1 : stop]
        yield 0, rest


def read_bad_images(path: Path) -> list[dict[str, Any]]:
    """Return the sound lines of a bad_images.jsonl; none if there is no such file. Raises OSError."""
    return read_new_bad_images(path, 0)[0]


def read_new_bad_images(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Return the sound lines of a bad_images.jsonl from the byte `start` on, and the byte to go on from.

    A last line without its end is read, but also the next time: its process may still be writing it. Raises OSError.
    """
    found: list[dict[str, Any]] = []
    if not path.is_file() or path.stat().st_size <= start:
        return found, start
    with open_regular(path) as file:
        file.seek(start)
        while data := file.readline(MAX_LINE):
            line = parse_line(data.decode(errors="replace"))
            if line is not None and _is_bad_image(line):
                found.append(line)
            if data.endswith(b"\n") or len(data) == MAX_LINE:
                start += len(data)
    return found, start


def _is_bad_image(line: dict[str, Any]) -> bool:
    index, substitute = line.get("index"), line.get("substitute", 0)
    numbers = type(index) is int and 0 <= index < MAX_STEP and (substitute is None or type(substitute) is int)
    texts = all(isinstance(line.get(key, ""), str | None) for key in ("path", "error"))
    return numbers and texts and isinstance(line.get("split"), str)
