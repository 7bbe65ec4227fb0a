"""One process at a time trains in a run folder; the kernel lets go of it when the process dies, however it dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from hf_fasttrain.utils.errors import RunError

LOCK_FILE = ".lock"
_held: dict[Path, tuple[int, bool]] = {}  # folder -> descriptor of its lock, and whether there are locks, here


def hold(folder: Path) -> bool:
    """Hold a folder for this process until `release` or its death; nothing happens if it holds it already.

    Returns False where the file system has no locks. Raises RunError if another process holds the folder, OSError if
    it can't be written. A POSIX record lock: forked loader processes do not inherit it, so that a killed run can be
    resumed at once.
    """
    import fcntl

    place = folder.resolve()
    if place in _held:
        return _held[place][1]
    locked = True
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = _owner(descriptor)
            os.close(descriptor)
            raise RunError(
                f"{folder.parent}: another process is training or writing results in it{owner}; wait for its end, "
                "stop it, or choose another output_dir"
            ) from None
        locked = False
    with suppress(OSError):  # a full disk does not matter: the lock is held, its text is for the message alone
        os.ftruncate(descriptor, 0)
        told = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.write(descriptor, json.dumps(told).encode())
    _held[place] = descriptor, locked
    return locked


def release(folder: Path) -> None:
    """Let go of a folder."""
    descriptor, _ = _held.pop(folder.resolve(), (None, False))
    if descriptor is not None:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    try:
        told = json.loads(os.read(descriptor, 1000))
        return f" (process {told['process']} on {told['host']}, since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
