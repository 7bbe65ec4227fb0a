"""Standard streams that are closed, full, or can't encode a text: no output must end a command or a training."""

from __future__ import annotations

import io
import os
import sys
from typing import IO, Any

STANDARD = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


def repair_standard_streams() -> None:
    """Make the standard streams of this process usable for any text.

    A closed stream becomes the null device. Otherwise the next file that is opened would get its number, and what
    libraries write to stdout or stderr would land in a checkpoint. Characters that a stream's encoding lacks are
    written as escapes (``\\xfc``).
    """
    for number, name, mode in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Write what was printed so far. Raises OSError once: the interpreter's own flush at exit finds the null device."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


class PrintableStream:
    """Writes to a text stream; characters that its encoding lacks are written as escapes."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text. Raises OSError."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
