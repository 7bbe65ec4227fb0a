"""What must be set or known before torch is imported: how long waiting threads spin, and the rank of this process.

libgomp, which PyTorch's wheels for Linux contain, reads its environment variables when it is loaded. Only our commands,
benchmarks and tests call `limit_spinning`, as the first thing: a program that imports the package sets its own
environment.
"""

from __future__ import annotations

import os
import sys

# If any of them is set, the user has decided.
USER_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# libgomp's own count is 300,000 where there are no more threads than cores: beside one busy process training kept 0.2
# to 0.3 of its speed. Sleeping at once cost 17 to 45 % where nothing ran beside it. 1,000 cost 3 to 11 %, and was 1.2
# to 2.1 times as fast as unset beside a busy process. No count measured has both: see
# benchmarks/threads.py, table in docs/benchmarks/threads.md.
SPIN_COUNT = 1000


def limit_spinning() -> None:
    """Make waiting OpenMP threads sleep soon, unless the user has set how they wait or torch is already loaded."""
    if "torch" in sys.modules or any(name in os.environ for name in USER_VARIABLES):
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def launched_rank() -> int:
    """Return the rank of this process among all that were launched."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0  # what is no number is refused before anything is launched
