"""Loader processes, which answer requests in order; one that dies is replaced."""

from __future__ import annotations

import gc
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.multiprocessing

from hf_fasttrain.data.loading.waiting import WaitCutShort
from hf_fasttrain.data.loading.worker_deaths import WorkerDeaths
from hf_fasttrain.utils.errors import LoaderNotStarted, RunError
from hf_fasttrain.utils.files import reason
from hf_fasttrain.utils.limits import explain_limit, process_limit, start_thread
from hf_fasttrain.utils.private_apis import forget_child
from hf_fasttrain.utils.process_memory import lift_memory_limit

CHECK_SECONDS = 5.0  # between two checks that the training process is still alive
END_SECONDS = 2.0  # for a process to finish its batch before it is killed
KILL_SECONDS = 1.0  # for a killed process to be gone; one that waits for a disk or file server may stay

# A child forked while another one's pipe is set up would hold that pipe open, and hide the other one's death.
_STARTING = threading.Lock()
_index: int | None = None


def worker_index() -> int | None:
    """Return the index of this loader process; None in any other process."""
    return _index


class Workers:
    """Processes that answer each request with `work(request)`, each up to `ahead` requests ahead of the consumer.

    Each has its own pipe and shares no lock with others, so the death of one is noticed at once, where its answer is
    awaited. It is replaced, and its pending requests are sent again; `deaths` counts the deaths and raises LoaderDied
    when there are too many. The processes start at `start`, or with the first requests.
    """

    def __init__(self, work: Callable[[Any], Any], number: int, ahead: int, deaths: WorkerDeaths) -> None:
        self.work, self.number, self.ahead, self.deaths = work, number, ahead, deaths
        self._owner = os.getpid()
        self._workers: list[_Worker] = []

    def answers(self, requests: Iterable[Any], *, keep: bool = False) -> Iterator[Any]:
        """Return an iterator over the answers to all requests; one pass at a time.

        First `ahead` requests per process are sent, then one more for each answer that is read. The processes stop at
        the end of the pass, unless `keep`.
        """
        self.start()
        for index in range(self.number):
            while self._workers[index].pending:  # an earlier pass was abandoned before its end
                self._answer_of(index)
        remaining = iter(requests)
        for worker, request in zip(cycle(self._workers), islice(remaining, self.ahead * self.number), strict=False):
            worker.send(request)
        return self._pass(remaining, keep)

    def _pass(self, requests: Iterator[Any], keep: bool) -> Iterator[Any]:
        try:
            for index in cycle(range(self.number)):
                if not self._workers[index].pending:
                    return
                answer = self._answer_of(index)
                for request in islice(requests, 1):
                    self._workers[index].send(request)
                if isinstance(answer, _Failure):
                    raise RuntimeError(f"a loader process failed:\n{answer.traceback}")
                if isinstance(answer, _NotStarted):
                    raise self._not_started(index, answer.reason)
                yield answer
        finally:
            if isinstance(sys.exception(), WaitCutShort):
                self.close(seconds=0.0)  # they don't answer
            elif not keep and not sys.is_finalizing():  # then modules are being emptied, and the processes are daemons
                self.close()

    def _answer_of(self, index: int) -> Any:
        while True:
            try:
                return self._workers[index].answer()
            except (EOFError, OSError):  # its end of the pipe is closed
                self._replace(index)

    def _replace(self, index: int) -> None:
        if not self._workers:  # closed by another thread
            raise EOFError
        dead = self._workers[index]
        self.deaths.add(dead.exit_code())
        self._workers[index] = self._start_worker(index)
        for request in dead.pending:
            self._workers[index].send(request)

    def start(self) -> None:
        """Start the processes that are not running; LoaderNotStarted if the system refuses, and then none is left."""
        try:
            while len(self._workers) < self.number:
                self._workers.append(self._start_worker(len(self._workers)))
        except BaseException:
            self.close()
            raise

    def _start_worker(self, index: int) -> _Worker:
        try:
            return _Worker(self.work, index)
        except (OSError, RuntimeError) as error:
            limit = process_limit(error) or explain_limit(error)
            if limit is None and not isinstance(error, OSError):
                raise
            why = str(limit) if limit else f"{reason(error)}; data.workers=0 needs none"
            raise self._not_started(index, why) from None

    def _not_started(self, index: int, why: str) -> LoaderNotStarted:
        return LoaderNotStarted(f"loader process {index + 1} of {self.number} could not be started: {why}")

    def close(self, seconds: float = END_SECONDS) -> None:
        """Stop the processes; each gets so many seconds to finish its current request before it is killed."""
        if os.getpid() != self._owner:  # a forked child has a copy of this object, and must not stop its siblings
            return
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.request_stop()
        deadline = time.monotonic() + seconds
        for worker in workers:
            worker.wait(deadline)
        for worker in workers:
            worker.kill()
        deadline = time.monotonic() + KILL_SECONDS
        for worker in workers:
            worker.close(deadline)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


@contextmanager
def _hidden_from_collector() -> Iterator[None]:
    """Keep all present objects out of the garbage collections of a process that is forked within.

    A collection writes to each object that it looks at, which would copy the pages that the processes share.
    """
    if gc.get_freeze_count():  # by the user's program, for good
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Worker:
    """The training process's handle on a loader process, with its unanswered requests."""

    def __init__(self, work: Callable[[Any], Any], index: int) -> None:
        context = torch.multiprocessing.get_context()
        self.pending: deque[Any] = deque()
        with _STARTING:
            self._connection, child_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(child_end, work, index), daemon=True)
            try:
                with _hidden_from_collector():
                    self._process.start()
            except BaseException:
                self._connection.close()
                raise
            finally:
                child_end.close()

    def send(self, request: Any) -> None:
        """Send a request; a dead process is noticed when its answer is awaited."""
        self.pending.append(request)
        with suppress(OSError):
            self._connection.send(request)

    def answer(self) -> Any:
        """Wait for the answer to the oldest request; EOFError or OSError if the process is dead."""
        answer = self._connection.recv()
        self.pending.popleft()
        return answer

    def exit_code(self) -> int | None:
        """Return the exit code of a process whose end of the pipe is closed."""
        self._process.join(END_SECONDS)
        self.kill()
        self.close(time.monotonic() + KILL_SECONDS)
        return self._process.exitcode

    def request_stop(self) -> None:
        """Ask the process to stop."""
        poll = select.poll()
        with suppress(OSError):
            poll.register(self._connection, select.POLLOUT)
            if poll.poll(0):  # otherwise it is full
                self._connection.send(None)

    def wait(self, deadline: float) -> None:
        """Wait until the process has stopped, at most until `deadline` (monotonic seconds)."""
        with suppress(EOFError, OSError):
            while self._process.is_alive() and (left := deadline - time.monotonic()) > 0:
                if self._connection in wait([self._connection, self._process.sentinel], left):
                    self._connection.recv()  # it may be blocked because this was not read

    def kill(self) -> None:
        """Kill the process if it is alive."""
        if self._process.is_alive():
            self._process.kill()

    def close(self, deadline: float) -> None:
        """Wait until the process is gone, at most until `deadline`; the kernel may kill it later.

        A process that waits for a disk or a file server is only killed when that answers.
        """
        self._connection.close()
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            forget_child(self._process)


class _Failure(NamedTuple):
    """Sent instead of an answer; an exception itself may not be picklable."""

    traceback: str


class _NotStarted(NamedTuple):
    """Sent instead of all answers by a process that the system has refused its threads."""

    reason: str


def _serve(connection: Connection, work: Callable[[Any], Any], index: int) -> None:
    global _index
    _index = index
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ended = threading.Event()
    listener = threading.Thread(target=_listen, args=(connection, requests, ended, os.getppid()), daemon=True)
    try:
        _leave_signals_to_training()
        start_thread(listener)
    except RunError as error:
        with suppress(EOFError, OSError):
            connection.send(_NotStarted(str(error)))
            while connection.poll(CHECK_SECONDS) and connection.recv() is not None:
                pass  # with requests unread, its end would reset the connection before the message is read
        return
    lift_memory_limit()  # it counts the memory of the training process, which this one has a copy of
    torch.set_num_threads(1)
    if (opencv := sys.modules.get("cv2")) is not None:  # of a user's transform
        opencv.setNumThreads(0)
    while (request := requests.get()) is not None and not ended.is_set():
        with suppress(OSError):  # the training process is gone, which the thread will notice too
            connection.send(_run(work, request))


def _run(work: Callable[[Any], Any], request: Any) -> Any:
    try:
        return work(request)
    except Exception:  # noqa: BLE001 - raised again by the reader
        return _Failure(traceback.format_exc())


def _listen(connection: Connection, requests: queue.SimpleQueue[Any], ended: threading.Event, parent: int) -> None:
    """Receive requests while others are processed: otherwise both ends could wait for the other to read, forever."""
    with suppress(EOFError, OSError):
        while True:
            if connection.poll(CHECK_SECONDS):
                if (request := connection.recv()) is None:
                    break
                requests.put(request)
            elif os.getppid() != parent:  # siblings may hold the parent's end of the pipe open
                os._exit(1)
    ended.set()
    requests.put(None)


def _leave_signals_to_training() -> None:
    """Ignore signals that a terminal or a scheduler sends to all processes of a run.

    Training still finishes its step after them, and needs images for that. Only a SIGTERM from the training process
    itself ends a worker; a worker whose parent is gone ends by itself.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the handler of the training process makes no sense here
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        start_thread(threading.Thread(target=_end_on_parents_sigterm, args=(os.getppid(),), daemon=True))


def _end_on_parents_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
