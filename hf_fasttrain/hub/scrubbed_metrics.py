"""metrics.jsonl as it is pushed: a copy without local paths, which the pushes of a training extend by its new lines."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from hf_fasttrain.run_folder.file_names import METRICS_FILE, STAGING_FOLDER
from hf_fasttrain.run_folder.scrub import Scrubber
from hf_fasttrain.utils.clean import without_secrets
from hf_fasttrain.utils.files import NO_LINK
from hf_fasttrain.utils.json_lines import MAX_LINE

POSITION_FILE = "metrics.position"  # how far the copy goes
_POSITION = re.compile(r"(\d{1,18}) (\d{1,18}) ([0-9a-f]{32}) ([0-9a-f]{32})\n")
BLOCK = 1 << 16


class _Position(NamedTuple):
    """The lines that are scrubbed: bytes of the file and of the copy, digests of those of the file and the scrubber."""

    read: int
    written: int
    digest: str
    scrubber: str


@contextmanager
def folder_of_copy(run: Path | None) -> Iterator[Path]:
    """Yield the folder of the scrubbed copy: within a run that is training, or a temporary one."""
    if run is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        (run / STAGING_FOLDER).mkdir(exist_ok=True)
        yield run / STAGING_FOLDER


def scrubbed_copy(source: Path, folder: Path, scrub: Scrubber) -> Path:
    """Return a copy of a metrics.jsonl in `folder`, line by line without local paths and tokens.

    Lines that an earlier call has scrubbed there are only read, to see that they are still the same: a resumed run has
    cut the file and written other lines. Memory does not grow with the file. Raises OSError.
    """
    copy = folder / METRICS_FILE
    descriptor = os.open(copy, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
    with source.open("rb") as lines, os.fdopen(descriptor, "r+b") as out:
        known = _read_position(folder / POSITION_FILE)
        hashed = _continue(lines, out, known) if known and known.scrubber == scrub.digest else None
        _extend(lines, out, hashed or xxhash.xxh3_128(), scrub, folder / POSITION_FILE)
    return copy


def _continue(lines: BinaryIO, out: BinaryIO, known: _Position) -> xxhash.xxh3_128 | None:
    """Go to the known position in both files; None, and to their beginnings, if a file was changed before it."""
    hashed, left = xxhash.xxh3_128(), known.read
    while left and (block := lines.read(min(BLOCK, left))):
        hashed.update(block)
        left -= len(block)
    if left or hashed.hexdigest() != known.digest or out.seek(0, os.SEEK_END) < known.written:
        lines.seek(0)
        out.seek(0)
        return None
    out.seek(known.written)
    return hashed


def _extend(lines: BinaryIO, out: BinaryIO, hashed: xxhash.xxh3_128, scrub: Scrubber, position: Path) -> None:
    """Append what is new of the file to the copy. A last line without its end is not counted: it may be continued.

    The copy ends before a line of more than MAX_LINE bytes: no run writes one, and it might not fit into memory.
    """
    with suppress(FileNotFoundError):
        position.unlink()  # it is wrong from here on
    out.truncate()
    partial = b""
    for line in iter(lambda: lines.readline(MAX_LINE), b""):
        if not line.endswith(b"\n"):
            partial = line
            break
        hashed.update(line)
        out.write(_scrubbed(line, scrub))
    reached = _Position(lines.tell() - len(partial), out.tell(), hashed.hexdigest(), scrub.digest)
    out.write(_scrubbed(partial, scrub) if len(partial) < MAX_LINE else b"")
    out.flush()
    _write_position(position, reached)


def _scrubbed(line: bytes, scrub: Scrubber) -> bytes:
    pieces = map(scrub.json, line.splitlines(keepends=True))  # at \r too
    return b"".join(without_secrets(piece.decode(errors="replace")).encode() for piece in pieces)


def _read_position(path: Path) -> _Position | None:
    try:
        with path.open(encoding="ascii") as file:
            match = _POSITION.fullmatch(file.read(200))
    except (OSError, ValueError):
        return None
    return match and _Position(int(match[1]), int(match[2]), match[3], match[4])


def _write_position(path: Path, position: _Position) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_LINK, 0o666)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(" ".join(map(str, position)) + "\n")
