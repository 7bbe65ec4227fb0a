"""Deaths of loader processes: their causes, their number in a run, and when torch's signal handler may raise."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hf_fasttrain.data.loading.waiting import WAITING, WaitCutShort
from hf_fasttrain.utils.errors import LoaderDied, LoaderNotStarted, first_line
from hf_fasttrain.utils.library_errors import is_dead_worker
from hf_fasttrain.utils.private_apis import (
    has_dead_worker,
    is_importing_main_script,
    is_torch_child_handler,
    kill_workers,
    no_torch_child_handler,
    raise_for_dead_workers,
    shut_down_workers,
)
from hf_fasttrain.utils.signals import signal_handler

MAX_DEATHS = 1  # that a run survives
CRASH_REMEDY = "`hf-fasttrain check RECIPE --images` finds rows that make a decoder crash; remove them"
DEATHS_BY_SIGNAL = {  # signal -> description, remedy
    "SIGKILL": (
        "killed by SIGKILL, as the kernel does when memory runs out",
        "lower data.workers or data.cache_gb",
    ),
    "SIGBUS": (
        "a bus error, as when shared memory or a disk is full",
        "give /dev/shm more room (docker run --shm-size) or set data.cache=none",
    ),
    "SIGSEGV": ("it crashed with a segmentation fault", CRASH_REMEDY),
    "SIGABRT": ("it crashed and aborted", CRASH_REMEDY),
}


RUNS_SCRIPT = 97  # exit status of a process that spawn or forkserver has started, and that would train itself
GUARD = (
    "a loader process runs the whole script again, as processes are started by spawn or forkserver here: put the "
    'script\'s code below `if __name__ == "__main__":`, or set data.workers=0'
)


def require_main_script() -> None:
    """End this process if it has been started to load images, and still imports a script that trains."""
    if is_importing_main_script():
        os._exit(RUNS_SCRIPT)  # no error: the script might catch it, and go on


def describe_death(exit_code: int | None) -> tuple[str, str]:
    """Return why a process ended, by its exit code (negative: a signal's number), and a remedy."""
    if exit_code is None or exit_code >= 0:
        return f"it exited with status {exit_code}", "data.workers=0 shows why"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return DEATHS_BY_SIGNAL.get(name, (f"killed by {name}", "lower data.workers"))


class WorkerDeaths:
    """Counts the loader processes that have died since the start of a run, which survives one death.

    `note` is called with a message about the first.
    """

    def __init__(self, note: Callable[[str], None] = lambda text: None) -> None:
        self.note, self.number = note, 0
        self.exit_code: int | None = None  # of the last one

    def add(self, exit_code: int | None) -> None:
        """Count a death. Raises LoaderDied if there were too many, LoaderNotStarted if the script has no guard."""
        if exit_code == RUNS_SCRIPT:
            raise LoaderNotStarted(GUARD)
        self.number, self.exit_code = self.number + 1, exit_code
        description, remedy = describe_death(exit_code)
        if self.number > MAX_DEATHS:
            raise LoaderDied(f"a second loader process died ({description}): {remedy}")
        self.note(
            f"a loader process died ({description}); another one takes over, and nothing is lost. A second death stops "
            f"the run: {remedy}"
        )


class _ChildSignal:
    """Delays torch's reaction to SIGCHLD, which tells a process that one of its children has ended.

    torch's handler raises wherever the main thread is when a process of a DataLoader dies, such as in the middle of an
    update or a save. While training, the signal is only recorded: torch checks its workers at the next wait for data.
    """

    def __init__(self) -> None:
        self._waiting = self._pending = False
        self._user_handler: Any = None  # the user's handler, which is unrelated to loaders

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Restrict torch's handler to waits for batches."""
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGCHLD)
        self._user_handler = previous if callable(previous) and not is_torch_child_handler(previous) else None
        try:
            with no_torch_child_handler(), signal_handler(signal.SIGCHLD, self._handle):
                yield
        finally:
            self._pending, self._user_handler = False, None

    def begin_waiting(self) -> None:
        """Start waiting for a batch. Raises RuntimeError if a process has died."""
        self._waiting = True
        self._check_workers()

    def end_waiting(self) -> None:
        """Stop waiting for a batch."""
        self._waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pending = True
        if self._user_handler is not None:
            self._user_handler(number, frame)
        if self._waiting:
            self._check_workers()

    def _check_workers(self) -> None:
        if self._pending:
            self._pending = False
            raise_for_dead_workers()


CHILD_SIGNAL = _ChildSignal()


def iterate_user_loader(loader: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the batches of a user's loader. Raises LoaderDied if one of its processes has died.

    Closing the generator early ends the loader's processes.
    """
    batches: Iterator[Any] | None = None
    while True:
        try:
            try:
                CHILD_SIGNAL.begin_waiting()
                with WAITING:
                    batches = iter(loader) if batches is None else batches
                    batch = next(batches)
            finally:
                CHILD_SIGNAL.end_waiting()
        except WaitCutShort:
            kill_workers(batches)
            raise
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not is_dead_worker(error) and not has_dead_worker(batches):
                raise
            reason = first_line(error)
        else:
            try:
                yield batch
            except GeneratorExit:
                shut_down_workers(loader, batches)  # which a traceback would keep alive
                raise
            continue
        batches = None  # stops the other processes, which a traceback would keep alive
        raise LoaderDied(  # outside of the handler, which holds torch's traceback
            f"a loader process of {name} died, possibly out of memory ({reason.strip()}): lower its num_workers"
        )
