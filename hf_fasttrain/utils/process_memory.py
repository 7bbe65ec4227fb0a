"""A limit on this process's memory: too large an allocation fails, instead of the kernel killing the process later.

Linux overcommits: it grants more memory than it has, and kills a process that uses it. With a limit on its data
(RLIMIT_DATA: the heap and private mappings) the allocation itself fails, and training retries the step in smaller
micro-batches. RLIMIT_AS would also count libraries, shared memory and unused address space; CUDA reserves far more of
it than there is memory, so that there is no limit with a GPU. Only the command line sets the limit: a library must not
change the limits of the process that imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "linux":
    import resource

SPARE = 5  # one fifth of the room is reserved for `relax_memory_limit`

_previous: int | None = None  # the limit before ours; forked processes inherit it
_spare = 0  # bytes by which `relax_memory_limit` raises the limit above what is used


@contextmanager
def limited_memory(room: int) -> Iterator[None]:
    """Limit this process to `room` more bytes than it uses now; on Linux only.

    A part of them is reserved for `relax_memory_limit`. A lower limit that is already set stays.
    """
    global _previous, _spare
    used = _data_bytes()
    if used is None or _previous is not None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    spare = max(0, room) // SPARE
    with suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_DATA, (min([used + max(0, room) - spare, *limits]), hard))
        _previous, _spare = soft, spare
    try:
        yield
    finally:
        lift_memory_limit()


def relax_memory_limit() -> None:
    """Raise the limit a little after memory ran out, before the step is retried with less.

    The limit counts heap pages that are already freed. And oneDNN compiles kernels for the new number of images into
    new mappings; if such a mapping fails, it calls the kernel anyway and the process crashes.
    """
    used = _data_bytes()
    if _previous is not None and used is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = [limit for limit in (_previous, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([max(soft, used + _spare), *limits]), hard))


def lift_memory_limit() -> None:
    """Restore the limit from before `limited_memory`; loader processes do, since training can't free their memory."""
    global _previous
    if _previous is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_previous, hard))
        _previous = None


def _data_bytes() -> int | None:
    """Return the bytes that RLIMIT_DATA counts for this process; None if the system does not report it."""
    if sys.platform != "linux":
        return None
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), None)
