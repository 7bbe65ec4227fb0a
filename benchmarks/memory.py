"""What memory other processes, or this one, take at most; Linux only, elsewhere there are no figures."""

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
    """Return the kilobytes of the files in memory (memfd) that processes have open, each once.

    What is read from them instead of mapped is in no process's PSS.
    """
    sizes: dict[int, int] = {}
    for descriptor in (place for pid in pids for place in Path(f"/proc/{pid}/fd").glob("*")):
        with suppress(OSError):
            if os.readlink(descriptor).startswith("/memfd:"):
                found = descriptor.stat()
                sizes[found.st_ino] = found.st_blocks // 2
    return sum(sizes.values())


class PeakMemory:
    """The most memory that a process and its descendants had at once, shared pages counted once: PSS and memfd files.

    Not counted is the page cache of files on disk, which the kernel takes back when it needs to. A sample walks all
    page tables (15 ms for each GB), half a core for big processes: pause it while a clock runs.
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
        """Take no samples from now on."""
        self._awake.clear()

    def resume(self) -> None:
        """Take samples again."""
        self._awake.set()

    def _sample(self) -> None:
        while not self._ended.wait(self.every_seconds):
            self._awake.wait()
            pids = process_tree(self.pid)
            own = sum(kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss") for pid in pids)
            self.peak_mib = max(self.peak_mib, (own + anonymous_files(pids)) / MIB)


class OwnGrowth:
    """How far the resident memory of this process rose above where it was when this was made."""

    # Not getrusage: its ru_maxrss may be the parent's, from before exec.
    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, that of the imports
        self._start = kilobytes(Path("/proc/self/status"), "VmRSS")

    def peak_mib(self) -> float:
        """Return the growth in MiB."""
        return max(0, kilobytes(Path("/proc/self/status"), "VmHWM") - self._start) / MIB
