"""The lock of a run folder: one process at a time trains in it. The kernel releases it if the process dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from hf_fasttrain.run_folder.file_names import LOCK_FILE
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import NO_LINK

_locks: dict[Path, tuple[int, bool]] = {}  # folder -> descriptor of its lock file, and whether it is really locked


def acquire(folder: Path) -> bool:
    """Lock a folder for this process until `release` or its death; does nothing if it is locked already.

    Returns False if the file system has no locks. Raises RunError if another process has the lock, OSError if the file
    can't be written. It is a POSIX record lock: forked loader processes do not inherit it, so that a killed run can be
    resumed at once.
    """
    import fcntl

    path = folder.resolve()
    if path in _locks:
        return _locks[path][1]
    locked = True
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner_text = _describe_owner(descriptor)
            os.close(descriptor)
            raise RunError(
                f"{folder.parent}: another process is training or writing results in it{owner_text}; wait for its end, "
                "stop it, or choose another output_dir"
            ) from None
        locked = False
    with suppress(OSError):  # a full disk does not matter: the text is only for the message of others
        os.ftruncate(descriptor, 0)
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.write(descriptor, json.dumps(owner).encode())
    _locks[path] = descriptor, locked
    return locked


def release(folder: Path) -> None:
    """Unlock a folder."""
    descriptor, _ = _locks.pop(folder.resolve(), (None, False))
    if descriptor is not None:
        os.close(descriptor)


def _describe_owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.read(descriptor, 1000))
        return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
