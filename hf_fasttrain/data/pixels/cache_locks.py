"""Locks of caches on disk: a process that has one open holds a shared lock on its description, so that it stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl as fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ABOUT_FILE = "about.json"


class OpenFiles:
    """Owns file descriptors: closes them when it is deleted, in the process that opened them only."""

    def __init__(self, *files: int) -> None:
        self.files, self.owner = files, os.getpid()

    def __del__(self) -> None:
        if self.owner == os.getpid():
            for file in self.files:
                os.close(file)


def lock_shared(folder: Path) -> OpenFiles | None:
    """Return the open lock that marks a cache as in use; None if it has no description or the disk has no locks.

    The lock is not that of the index, which belongs to a process and not to an open file.
    """
    try:
        file = os.open(folder / ABOUT_FILE, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return None
    lock = OpenFiles(file)
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        return None
    return lock


@contextmanager
def lock_for_removal(folder: Path) -> Iterator[bool]:
    """Yield whether a cache may be deleted: no process has it open, nor can one open it meanwhile.

    A folder without a description is a cache that was being created; False where the disk has no locks.
    """
    if fcntl is None:
        yield True
        return
    try:
        file = os.open(folder / ABOUT_FILE, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(file)


def is_in_use(folder: Path) -> bool:
    """Return whether a process has a cache open, as far as locks can tell."""
    with lock_for_removal(folder) as may_go:
        return not may_go
