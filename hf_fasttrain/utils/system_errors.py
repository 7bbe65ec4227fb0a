"""Errors of the system that no function expects, such as a folder without permission: the command line's messages."""

from __future__ import annotations

import errno
import os
import resource

from hf_fasttrain.utils.errors import RunError, Stopped, first_line
from hf_fasttrain.utils.library_errors import is_out_of_memory, loader_out_of_memory
from hf_fasttrain.utils.limits import explain_limit

NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)  # a disk that is full or fails
ADVICE = {
    errno.EACCES: f"give user {os.getuid()} access, or use another path",
    errno.EPERM: f"give user {os.getuid()} access, or use another path",
    errno.ELOOP: "a symbolic link leads back to itself; remove it, or use another path",
    errno.EROFS: "use a path that can be written to",
    errno.ENOSPC: "free some space, or use another disk",
    errno.EDQUOT: "free some space, or use another disk",
}


def explain_system_error(error: BaseException) -> RunError | None:
    """Return the message for an error of the system: files, memory, threads. None for other errors."""
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        what = next(iter(str(error).splitlines()), "")
        return RunError(
            f"out of memory{f': {what}' if what else ''}; end other programs, or use a smaller model or image"
        )
    if isinstance(error, ImportError):
        return _explain_import(error)
    limit = explain_limit(error)
    if limit is not None or not isinstance(error, OSError) or error.errno is None:
        return limit
    paths = " -> ".join(
        os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)
    )
    advice = ADVICE.get(error.errno)
    what = error.strerror or first_line(error)
    explained = RunError(f"{paths or 'the system reports'}: {what}{f'; {advice}' if advice else ''}")
    if error.errno in NOT_WRITTEN:
        explained.status = Stopped.NOT_WRITTEN
    return explained


def _explain_import(error: ImportError) -> RunError | None:
    """Return the message for a library that the loader found no memory for; None for others."""
    library = loader_out_of_memory(error)
    if library is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limit = "" if soft == resource.RLIM_INFINITY else f" (ulimit -v is {soft >> 10:,} kB)"
    return RunError(f"no memory to load {library}{limit}; raise it (ulimit -v unlimited) or end other programs")
