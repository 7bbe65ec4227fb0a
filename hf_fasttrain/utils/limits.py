"""Limits on this process's threads, child processes and open files, and the message when one of them is reached.

A limit is tried out before it is needed, not computed: the container, the user's limits and memory all restrict
threads, other processes share these limits, and OpenBLAS and libgomp end the process when a thread is refused.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from contextlib import suppress

from hf_fasttrain.utils.control_groups import control_groups
from hf_fasttrain.utils.errors import RunError

MOST = 4096  # more threads or files are refused without being tried
NOTABLE = 10_000  # higher limits are not the reason
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
THREADS_PER_WORKER = 3  # of a loader process: the main thread and two that listen
FILES_PER_WORKER = 2  # its pipe, and one that tells of its end
THREAD_REFUSED = "can't start new thread"  # a RuntimeError of Python's that has no class of its own


def require_threads(number: int, purpose: str) -> None:
    """Raise RunError unless `number` more threads can run at the same time; processes count as threads."""
    started = _startable(number) if number <= MOST else 0
    if started < number:
        can = "can't be started" if number > MOST else f"are needed, and {started} can be started"
        raise RunError(f"{purpose}: {number:,} more processes and threads {can}{_thread_advice()}")


def _startable(number: int) -> int:
    """Start threads that wait, and return how many could be started, up to `number`; they end before this returns."""
    release = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(number):
            thread = threading.Thread(target=release.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        pass
    finally:
        release.set()
        for thread in started:
            thread.join()
    return len(started)


def require_threads_of_libraries() -> None:
    """Raise RunError unless the threads can be started that numpy, scipy, pyarrow and torch start by themselves.

    To be called before they are imported. OpenBLAS, of which numpy and scipy have a copy each, starts a thread for each
    further core, and sends SIGINT to its process if it can't.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values = (os.environ.get(name, "").split(",")[0].strip() for name in THREAD_VARIABLES)
    number = next((int(value) for value in values if value.isdecimal() and int(value) > 0), cores)
    require_threads(3 * (min(number, cores) - 1) + 2, "numpy, scipy and torch")


def process_limit(error: BaseException) -> RunError | None:
    """Return the message for an error of fork or spawn that means too many processes; None for others."""
    if isinstance(error, OSError) and error.errno == errno.EAGAIN:
        return RunError(f"too many processes{_thread_advice()}")
    return None


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. Raises RunError if the system refuses it."""
    try:
        thread.start()
    except RuntimeError as error:
        raise (explain_limit(error) or error) from None


def require_files(number: int, purpose: str) -> None:
    """Raise RunError unless `number` more files can be open at the same time."""
    opened: list[int] = []
    try:
        for _ in range(number if number <= MOST else 0):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if not _is_out_of_files(error):
            raise
    finally:
        for descriptor in opened:
            os.close(descriptor)
    if len(opened) < number:
        raise RunError(f"{purpose}: {number:,} more files must be open{_file_advice()}")


def raise_file_limit() -> None:
    """Raise the limit on open files to the highest value that is allowed without privileges; 1,024 is common."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    with suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most) if soft != resource.RLIM_INFINITY else soft, hard))


def explain_limit(error: BaseException) -> RunError | None:
    """Return the message for an error of a thread or file that the system has refused; None for others."""
    if isinstance(error, RuntimeError) and THREAD_REFUSED in str(error):
        return RunError(f"too many threads{_thread_advice()}")
    if isinstance(error, OSError) and _is_out_of_files(error):
        return RunError(f"too many open files{_file_advice()}")
    return None


def _is_out_of_files(error: OSError) -> bool:
    return error.errno in (errno.EMFILE, errno.ENFILE)


def _thread_advice() -> str:
    limits = "; ".join(_thread_limits()) or "the system's limit is reached, or there is no memory for their stacks"
    return (
        f" ({limits}). Raise the limit (ulimit -u, docker run --pids-limit), or lower data.workers (each has "
        f"{THREADS_PER_WORKER} threads), accelerate.cpu_threads or the variable OMP_NUM_THREADS"
    )


def _thread_limits() -> list[str]:
    """Return the limits on processes and threads that may be the reason."""
    found: dict[str, int] = {}
    for folder, _ in control_groups("pids"):
        with suppress(OSError, ValueError):  # "max" means no limit
            limit = int((folder / "pids.max").read_text())
            used = int((folder / "pids.current").read_text())
            found[f"the container's pids.max is {limit:,}, of which {used:,} are in use"] = limit
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        found[f"ulimit -u is {soft:,}"] = soft
    return [text for text, limit in found.items() if limit < NOTABLE]


def _file_advice() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f" (ulimit -n is {soft:,}). Raise the limit (ulimit -n 4096, docker run --ulimit nofile=4096), or lower "
        "data.workers"
    )
