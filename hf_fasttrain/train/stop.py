"""Requests to stop or to save between steps: signals, a dead launcher, minutes on the clock."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from hf_fasttrain.data.loading.waiting import WAITING
from hf_fasttrain.run_folder.result import Result
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.utils.errors import Interrupted, RunError, Stopped
from hf_fasttrain.utils.limits import start_thread
from hf_fasttrain.utils.signals import SIGNALS

LAUNCHER_GONE = 1000  # used in place of a signal number
MOST_STEPS = 10  # between a signal and the reaction, with several processes
END = b"\0"
TWICE_SECONDS = 0.2  # nobody presses Ctrl-C twice as fast; a child being forked may echo the first one
SECONDS_BETWEEN = 1.0  # that these steps may take
SLOW_WAIT = 60.0
MOST_WAIT = 3.0  # seconds after a signal for which images are still awaited; docker kills after 10


class StopSignals:
    """Remembers the first signal that asks for a stop, while it is entered; a second Ctrl-C ends the process at once.

    `hurry` is called, in a thread of its own, with the name of the signal. That thread hears signals even while the
    main one is in a long operation, where Python's handlers do not run. A launcher that dies (`accelerate launch`
    passes no SIGTERM on) counts as a signal, if it is heeded. Outside of Python's main thread no signals can be caught.
    A wait for images that goes on after the signal ends with WaitCutShort; without one, `slow` is called once, in the
    thread, when it has lasted SLOW_WAIT seconds.
    """

    def __init__(
        self,
        hurry: Callable[[str], None] = lambda name: None,
        slow: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._hurry, self._slow, self._received, self._since = hurry, slow, 0, 0.0
        self._slow_since: float | None = None  # the wait that `slow` was called for
        self._parent: int | None = None
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def heed_launcher(self) -> None:
        """Treat the end of the launcher, this process's parent, as a signal."""
        self._parent = os.getppid()

    @property
    def received(self) -> int:
        """The number of the first signal, LAUNCHER_GONE, or 0."""
        if not self._received and self._parent is not None and os.getppid() != self._parent:
            self._receive(LAUNCHER_GONE)
        return self._received

    def _receive(self, number: int) -> None:
        if not self._received:
            self._received, self._since = number, time.monotonic()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup does
            self._before = {number: signal.signal(number, self._note) for number in heard}
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True)
            start_thread(self._thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.write(self._pipe[1], END)  # to the thread; loader workers may hold a copy of this end
            os.close(self._pipe[1])
            self._pipe = None
            self._thread.join(timeout=1.0)  # it may be about to note a signal, which the next training would obey
        self._received = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_stuck():
            WAITING.cut_short()
        self._receive(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel ends a process that hangs, Python could not

    def _is_stuck(self) -> bool:
        return bool(self._received) and WAITING.seconds(self._since) > MOST_WAIT

    def _listen(self, pipe: int) -> None:
        first: float | None = None  # when Ctrl-C was heard
        is_reported = False
        while (heard := self._heard(pipe)) != END:
            number = heard[0]
            if number not in SIGNALS:
                continue
            now = time.perf_counter()
            if number == signal.SIGINT and first is not None and now - first > TWICE_SECONDS:
                os._exit(Stopped.CTRL_C)
            if number == signal.SIGINT and first is None:
                first = now
            self._receive(number)
            if not is_reported:
                is_reported = True
                self._hurry(signal_name(number))
        os.close(pipe)

    def _heard(self, pipe: int) -> bytes:
        """Wait for the number of a signal, or END; meanwhile interrupt a main thread that waits for images in vain."""
        again = next((number for number in self._before if number != signal.SIGINT), None)
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while not poll.poll(500):  # milliseconds
            if self.received and again is not None and self._is_stuck():
                signal.pthread_kill(threading.main_thread().ident or 0, again)  # its handler raises in that thread
            elif WAITING.seconds(0) > SLOW_WAIT and self._slow_since != WAITING.since:
                self._slow_since = WAITING.since
                self._slow(SLOW_WAIT)
        return os.read(pipe, 1)


_trains: dict[int, str] = {}  # process id -> what trains in it; a process that is forked has an id of its own


@contextmanager
def only_one(output_dir: Path | None) -> Iterator[None]:
    """Let one training at a time run in this process: signals and random states are the process's. RunError if not."""
    running = _trains.get(os.getpid())
    if running is not None:
        raise RunError(f"a Trainer is running in this process already ({running}); end its running() or fit() first")
    _trains[os.getpid()] = f"output_dir {output_dir}" if output_dir else "without output_dir"
    try:
        yield
    finally:
        del _trains[os.getpid()]


def signal_name(number: int) -> str:
    """Return the name of a stop for messages."""
    if number == LAUNCHER_GONE:
        return "the end of the launcher"
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def stopped(number: int, message: str, step: int, result: Result, *, saved: bool) -> Stopped:
    """Return the exception of a run that a signal stopped after a step."""
    kind, status = Stopped, Stopped.RESUMABLE
    if number == signal.SIGINT:
        kind, status = Interrupted, Stopped.CTRL_C
    status = status if saved else Stopped.NOT_WRITTEN
    return kind(message, status=status, cause=signal_name(number), step=step, result=result)


class StopRequest(NamedTuple):
    """The request after a step, the same on every process."""

    stop: int = 0  # number of the signal
    save: bool = False
    on_disk: int = 0  # step of the newest checkpoint that is complete

    def __bool__(self) -> bool:
        return bool(self.stop) or self.save


class StopRequests:
    """Tells at step boundaries whether to save or to stop.

    Alone, at once. Several processes agree every few steps, at most MOST_STEPS and about a second apart: on a stop if
    any of them was signalled, on saving if `minutes` have passed on the main process's clock, and on which checkpoint
    is complete: the main process, which writes them, knows it.
    """

    def __init__(
        self,
        processes: Processes,
        signals: StopSignals,
        minutes: float | None = None,
        on_disk: Callable[[], int] = lambda: 0,
    ) -> None:
        self._on_disk = on_disk
        self.processes, self.signals = processes, signals
        self._seconds = None if minutes is None else 60 * minutes
        self._saved = self._agreed = time.monotonic()
        self._next: int | None = None  # step at which the processes agree next
        self._between = 1

    def saved(self) -> None:
        """Restart the clock of `minutes`."""
        self._saved = time.monotonic()

    def pending(self) -> bool:
        """Return whether this process was signalled; others may not have been."""
        return bool(self.signals.received)

    def at_step(self, step: int) -> StopRequest:
        """Return what is requested after a step; called by all processes after every step."""
        if not self.processes.is_distributed:
            return StopRequest(self.signals.received, self._is_due(), self._on_disk())
        if self._next is not None and step < self._next:
            return StopRequest()
        now = time.monotonic()
        per_step = (now - self._agreed) / self._between
        most = int(max(1, min(MOST_STEPS, SECONDS_BETWEEN / max(per_step, 1e-6)))) if self._next is not None else 1
        main = self.processes.is_main
        stop, save, self._between, on_disk = self.processes.largest(
            self.signals.received, int(main and self._is_due()), most if main else 0, self._on_disk() if main else 0
        )
        self._agreed, self._next = now, step + self._between
        return StopRequest(stop, bool(save), on_disk)

    def now(self) -> int:
        """Return the signal that any process has received so far; called by all processes at the same point."""
        return self.processes.largest(self.signals.received)[0]

    def _is_due(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._saved >= self._seconds
