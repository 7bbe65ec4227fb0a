"""Loader processes: they answer requests, the answers come in the requests' order, and one that dies is replaced."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import cycle, islice
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.multiprocessing

from hf_fasttrain.data.loading.worker_deaths import Deaths
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import reason
from hf_fasttrain.utils.process_memory import lift_memory_limit

CHECK_SECONDS = 5.0  # between two looks whether the training process is still there
END_SECONDS = 5.0  # for a process to finish its batch when it is told to end

# A child forked between the two ends of another one's pipe would hold that one's end open, and hide its death.
_STARTING = threading.Lock()
_index: int | None = None


def worker_index() -> int | None:
    """Return which of a loader's processes this one is; None if it is none of them."""
    return _index


class Workers:
    """Processes that answer each request with `work(request)`, up to `ahead` requests each ahead of the reader.

    Each has a pipe of its own and shares no lock with others, so that the death of one is noticed where its answer is
    waited for, and at once. It is replaced, and what it was asked is asked again; `deaths` counts, and raises
    LoaderDied when it has been too often. The processes start with `start`, or with the first requests.
    """

    def __init__(self, work: Callable[[Any], Any], number: int, ahead: int, deaths: Deaths) -> None:
        self.work, self.number, self.ahead, self.deaths = work, number, ahead, deaths
        self._owner = os.getpid()
        self._workers: list[_Worker] = []

    def answers(self, requests: Iterable[Any], *, keep: bool = False) -> Iterator[Any]:
        """Ask all requests, and return an iterator over their answers; one pass at a time.

        Requests are taken in this thread until enough are under way, then one for each answer that is read. The
        processes end with the pass, unless they are to be kept for the next one.
        """
        self.start()
        for index in range(self.number):
            while self._workers[index].asked:  # an earlier pass was left before its end
                self._answer_of(index)
        coming = iter(requests)
        for worker, request in zip(cycle(self._workers), islice(coming, self.ahead * self.number), strict=False):
            worker.ask(request)
        return self._pass(coming, keep)

    def _pass(self, coming: Iterator[Any], keep: bool) -> Iterator[Any]:
        try:
            for index in cycle(range(self.number)):
                if not self._workers[index].asked:
                    return
                answer = self._answer_of(index)
                for request in islice(coming, 1):
                    self._workers[index].ask(request)
                if isinstance(answer, _Failed):
                    raise RuntimeError(f"a loader process failed:\n{answer.traceback}")
                yield answer
        finally:
            if not keep:
                self.close()

    def _answer_of(self, index: int) -> Any:
        while True:
            try:
                return self._workers[index].answer()
            except (EOFError, OSError):  # its end of the pipe is closed
                self._replace(index)

    def _replace(self, index: int) -> None:
        dead = self._workers[index]
        self.deaths.add(dead.exit_code())
        self._workers[index] = self._begin(index)
        for request in dead.asked:
            self._workers[index].ask(request)

    def start(self) -> None:
        """Start the processes that are not there yet; RunError if the system has none to give."""
        while len(self._workers) < self.number:
            self._workers.append(self._begin(len(self._workers)))

    def _begin(self, index: int) -> _Worker:
        try:
            return _Worker(self.work, index)
        except OSError as error:
            refused = RunError(
                f"loader process {index + 1} of {self.number} could not be started: {reason(error)}; lower data.workers"
            )
            refused.on_every_process = False
            raise refused from None

    def close(self) -> None:
        """End the processes; each finishes what it is making."""
        if os.getpid() != self._owner:  # a fork has this object too, and must not end its siblings
            return
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.tell_to_end()
        until = time.monotonic() + END_SECONDS
        for worker in workers:
            worker.end(until)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


class _Worker:
    """A process as the training process sees it, with the requests that it has not answered yet."""

    def __init__(self, work: Callable[[Any], Any], index: int) -> None:
        context = torch.multiprocessing.get_context()
        self.asked: deque[Any] = deque()
        with _STARTING:
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, work, index), daemon=True)
            try:
                self._process.start()
            except BaseException:
                self._connection.close()
                raise
            finally:
                theirs.close()

    def ask(self, request: Any) -> None:
        """Send a request; a process that is dead is noticed when it should answer."""
        self.asked.append(request)
        with suppress(OSError):
            self._connection.send(request)

    def answer(self) -> Any:
        """Wait for the answer to the oldest request; EOFError or OSError if the process is dead."""
        answer = self._connection.recv()
        self.asked.popleft()
        return answer

    def exit_code(self) -> int | None:
        """Return the exit code of a process whose end of the pipe is closed."""
        self._connection.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode

    def tell_to_end(self) -> None:
        """Tell the process to end."""
        with suppress(OSError):
            self._connection.send(None)

    def end(self, until: float) -> None:
        """Wait for the end of a process that was told to; kill it at the time `until`."""
        with suppress(EOFError, OSError):
            while self._process.is_alive() and (left := until - time.monotonic()) > 0:
                if self._connection in wait([self._connection, self._process.sentinel], left):
                    self._connection.recv()  # it may stand still because nobody has read this
        self._process.join(max(0.0, until - time.monotonic()))
        self.exit_code()


# --- in the processes --------------------------------------------------------------------------------------


class _Failed(NamedTuple):
    """Comes back instead of an answer; not every exception can be sent."""

    traceback: str


def _serve(connection: Connection, work: Callable[[Any], Any], index: int) -> None:
    global _index
    _index = index
    _leave_signals_to_training()
    lift_memory_limit()  # it counts what training has, of which this process has a copy
    torch.set_num_threads(1)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ended = threading.Event()
    threading.Thread(target=_listen, args=(connection, requests, ended, os.getppid()), daemon=True).start()
    while (request := requests.get()) is not None and not ended.is_set():
        with suppress(OSError):  # the training process is gone, as the thread will hear too
            connection.send(_answered(work, request))


def _answered(work: Callable[[Any], Any], request: Any) -> Any:
    try:
        return work(request)
    except Exception:  # noqa: BLE001 - raised again by the reader
        return _Failed(traceback.format_exc())


def _listen(connection: Connection, requests: queue.SimpleQueue[Any], ended: threading.Event, parent: int) -> None:
    """Take requests while others are being worked on: two that both wait for the other to read would wait for ever."""
    with suppress(EOFError, OSError):
        while True:
            if connection.poll(CHECK_SECONDS):
                if (request := connection.recv()) is None:
                    break
                requests.put(request)
            elif os.getppid() != parent:  # siblings may hold its end of the pipe open
                os._exit(1)
    ended.set()
    requests.put(None)


def _leave_signals_to_training() -> None:
    """Let a worker outlive signals that a terminal or a scheduler sends to all processes of a run.

    Training finishes its step after them, and needs its images for that. Only its own SIGTERM, by which it cleans up,
    ends a worker; a worker whose parent is gone ends by itself.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # training's handler means nothing here
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_training_says, args=(os.getppid(),), daemon=True).start()


def _end_when_training_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
