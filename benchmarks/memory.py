"""Peak memory of other processes, or of this one; Linux only."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

SAMPLE_SECONDS = 0.05
MIB = 1024  # the kernel counts in kB


def process_tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    pids, place = [pid], 0
    while place < len(pids):
        for children in Path(f"/proc/{pids[place]}/task").glob("*/children"):
            try:
                pids += [int(child) for child in children.read_text().split()]
            except OSError:  # a thread that has ended
                continue
        place += 1
    return pids


def kilobytes(file: Path, field: str) -> int:
    """Return a field of one of the kernel's `Name:  12 kB` files; 0 if the process is gone."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def anonymous_files(pids: list[int]) -> int:
    """Return the kilobytes of the in-memory files (memfd) that processes have open, each counted once.

    Pages that are read from them instead of mapped are not in any process's PSS.
    """
    sizes: dict[int, int] = {}
    for descriptor in (place for pid in pids for place in Path(f"/proc/{pid}/fd").glob("*")):
        with suppress(OSError):
            if os.readlink(descriptor).startswith("/memfd:"):
                found = descriptor.stat()
                sizes[found.st_ino] = found.st_blocks // 2
    return sum(sizes.values())


class PeakMemory:
    """Samples the memory of a process and its descendants (PSS and memfd files; shared pages count once) for its peak.

    The page cache of files on disk, which the kernel can reclaim, does not count. A sample walks all page tables (15 ms
    per GB), half a core for large processes, so pause the sampling while you measure time.
    """

    def __init__(self, pid: int, *, every_seconds: float = SAMPLE_SECONDS) -> None:
        self.pid, self.every_seconds, self.peak_mib = pid, every_seconds, 0.0
        self._awake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._awake.set()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._awake.set()
        self._thread.join()

    def pause(self) -> None:
        """Stop sampling."""
        self._awake.clear()

    def resume(self) -> None:
        """Continue sampling."""
        self._awake.set()

    def _sample(self) -> None:
        while not self._ended.wait(self.every_seconds):
            self._awake.wait()
            pids = process_tree(self.pid)
            own = sum(kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss") for pid in pids)
            self.peak_mib = max(self.peak_mib, (own + anonymous_files(pids)) / MIB)


class OwnGrowth:
    """How far this process's resident memory has risen above its size when this object was created."""

    # Not getrusage: its ru_maxrss may be the parent's, from before exec.
    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, that of the imports
        self._start = kilobytes(Path("/proc/self/status"), "VmRSS")

    def peak_mib(self) -> float:
        """Return the growth in MiB."""
        return max(0, kilobytes(Path("/proc/self/status"), "VmHWM") - self._start) / MIB
