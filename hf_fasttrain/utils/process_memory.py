"""A limit on this process's memory: what is too much fails where it is asked for, before the kernel ends the process.

Linux gives memory away before it has it, and kills a process that uses it. With a limit on its data (RLIMIT_DATA: the
heap and private mappings) the allocation itself fails: training makes the step again in smaller pieces. RLIMIT_AS
would count libraries, shared memory and address space that nothing uses as well; CUDA reserves far more of it than
there is memory, so that with a GPU there is no limit. The limit is the command line's: a library has no business
with the limits of the process that it is imported into.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "linux":
    import resource

SPARE = 5  # a fifth of the room is left for `relax_memory_limit`

_before: int | None = None  # the limit before ours; processes that are forked from this one inherit it
_spare = 0  # bytes that `relax_memory_limit` leaves above what there is


@contextmanager
def limited_memory(room: int) -> Iterator[None]:
    """Let this process take `room` bytes beside what it has; nothing is limited but on Linux.

    Of them a part is kept for `relax_memory_limit`. A lower limit that somebody else has set stays.
    """
    global _before, _spare
    used = _data_bytes()
    if used is None or _before is not None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    spare = max(0, room) // SPARE
    with suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_DATA, (min([used + max(0, room) - spare, *limits]), hard))
        _before, _spare = soft, spare
    try:
        yield
    finally:
        lift_memory_limit()


def relax_memory_limit() -> None:
    """Leave some room below the limit, after memory has run out and before less is tried.

    What the heap has been given is counted though nothing is in it any more. oneDNN makes kernels for another number
    of images, in mappings of their own, and calls one that it got no mapping for: the process crashes.
    """
    used = _data_bytes()
    if _before is not None and used is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = [limit for limit in (_before, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([max(soft, used + _spare), *limits]), hard))


def lift_memory_limit() -> None:
    """Go back to the limit before `limited_memory`; loader processes do, whose memory training does not give back."""
    global _before
    if _before is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_before, hard))
        _before = None


def _data_bytes() -> int | None:
    """Return the bytes that RLIMIT_DATA counts of this process; None where there is no such account."""
    if sys.platform != "linux":
        return None
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), None)
