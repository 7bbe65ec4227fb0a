"""Whether other programs use the machine while a study measures."""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections.abc import Sequence

from hf_fasttrain.utils.environment import num_cores
from hf_fasttrain.utils.format import format_percent

SAMPLE_SECONDS = 0.03  # several time slices of the scheduler
BUSY_SHARE = 0.92  # mean share below which figures are called rough; an idle machine gives 0.97 and more
_BLOCK = bytes(1 << 18)  # hashing it releases the GIL


def free_share() -> float:
    """Return the share of wall-clock time that busy threads, one for each core, spend on a core: 1 if nobody else does.

    Takes SAMPLE_SECONDS. Everything of the caller's own must be suspended or waiting.
    """
    shares: list[float] = []

    def work() -> None:
        start, start_cpu = time.perf_counter(), time.thread_time()
        while (seconds := time.perf_counter() - start) < SAMPLE_SECONDS:
            hashlib.sha256(_BLOCK)
        shares.append((time.thread_time() - start_cpu) / seconds)

    threads = [threading.Thread(target=work) for _ in range(num_cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(1.0, statistics.mean(shares))


def is_busy(shares: Sequence[float]) -> bool:
    """Return whether others used the machine, by what `free_share` has returned."""
    return bool(shares) and statistics.mean(shares) < BUSY_SHARE


def rough_note(shares: Sequence[float]) -> str:
    """Return what to print about figures that were measured while others used the machine; "" if nobody did."""
    if not is_busy(shares):
        return ""
    return (
        "Rough: other programs used the cores meanwhile (busy threads got "
        f"{format_percent(statistics.mean(shares), 0)} of the time). Ratios are of the same rounds; for exact figures, "
        "repeat it on an idle machine."
    )
