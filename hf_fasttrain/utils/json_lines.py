"""JSON-lines files: a line is appended completely or not at all, and lines that are cut short are skipped."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_fasttrain.utils.files import NO_LINK, kind_of_file, loads, open_regular

MAX_LINE = 1 << 20  # characters of a line of a JSON-lines file


def append_line(path: Path, text: str) -> None:
    """Append a line completely or not at all: after a failed write the file is truncated again.

    Raises OSError, also for a link.
    """
    data = text.encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):  # a FIFO would take it, and wait for a reader when it is full
            raise OSError(f"{kind_of_file(status.st_mode)}, not a regular file")
        size = status.st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a power loss cut off the last line
            data = b"\n" + data
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
        except OSError:
            partial = os.pread(descriptor, len(data), size)
            if partial and data.startswith(partial):  # no other process has appended since
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a text file without their ends; one of more than MAX_LINE characters comes in pieces.

    Raises OSError, also for a device.
    """
    with open_regular(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="\n")
        rest = ""
        while block := text.read(MAX_LINE):
            *lines, rest = (rest + block).split("\n")
            yield from lines
            if len(rest) > MAX_LINE:
                yield rest
                rest = ""
        if rest:
            yield rest


def parse_line(line: str) -> dict[str, Any] | None:
    """Return the object of a line of a JSON-lines file; None if it is none."""
    try:
        value = loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
