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
from hf_fasttrain.data.loading.worker_deaths import require_main_script
from hf_fasttrain.run_folder.result import Result
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.utils.errors import Interrupted, RunError, Stopped
from hf_fasttrain.utils.limits import start_thread
from hf_fasttrain.utils.signals import SIGNALS

LAUNCHER_GONE = 1000  # used instead of a signal number
MAX_STEPS = 10  # from a signal to the stop, with several processes
END = b"\0"
MIN_PRESS_SECONDS = 0.2  # between two Ctrl-C; a child that is being forked may repeat the first one at once
MAX_SECONDS = 1.0  # for MAX_STEPS
SLOW_WAIT = 60.0
MOST_WAIT = 3.0  # seconds after a signal for which images are still awaited; docker kills after 10


class StopSignals:
    """Records the first signal that asks for a stop, within its `with` block; a second Ctrl-C ends the process.

    `on_signal` is called with the name of the signal in a separate thread, which receives signals even while the main
    thread is in a long operation, where Python's handlers do not run. After `watch_launcher`, the death of the launcher
    counts as a signal (`accelerate launch` does not forward SIGTERM). Signals can be caught only in the main thread.
    A wait for images that goes on after the signal ends with WaitCutShort; without a signal, `on_slow_data` is called
    once, in the thread, when the wait has lasted SLOW_WAIT seconds.
    """

    def __init__(
        self,
        on_signal: Callable[[str], None] = lambda name: None,
        on_slow_data: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._on_signal, self._on_slow_data, self._received, self._since = on_signal, on_slow_data, 0, 0.0
        self._slow_since: float | None = None  # the wait that `on_slow_data` was called for
        self._parent: int | None = None
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def watch_launcher(self) -> None:
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
            numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores SIGHUP
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True)
            start_thread(self._thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.write(self._pipe[1], END)  # ends the thread; loader workers may have a copy of this file descriptor
            os.close(self._pipe[1])
            self._pipe = None
            self._thread.join(timeout=1.0)  # it may be about to record a signal, which would stop the next training
        self._received = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_stuck():
            WAITING.cut_short()
        self._receive(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel can end a process that hangs, Python can't

    def _is_stuck(self) -> bool:
        return bool(self._received) and WAITING.seconds(self._since) > MOST_WAIT

    def _listen(self, pipe: int) -> None:
        first_press: float | None = None  # time of the first Ctrl-C
        is_reported = False
        while (byte := self._read_pipe(pipe)) != END:
            number = byte[0]
            if number not in SIGNALS:
                continue
            now = time.perf_counter()
            if number == signal.SIGINT and first_press is not None and now - first_press > MIN_PRESS_SECONDS:
                os._exit(Stopped.CTRL_C)
            if number == signal.SIGINT and first_press is None:
                first_press = now
            self._receive(number)
            if not is_reported:
                is_reported = True
                self._on_signal(signal_name(number))
        os.close(pipe)

    def _read_pipe(self, pipe: int) -> bytes:
        """Wait for the number of a signal, or END; meanwhile interrupt a main thread that waits for images in vain."""
        repeated = next((number for number in self._previous if number != signal.SIGINT), None)
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while not poll.poll(500):  # milliseconds
            if self.received and repeated is not None and self._is_stuck():
                signal.pthread_kill(threading.main_thread().ident or 0, repeated)  # its handler raises in that thread
            elif WAITING.seconds(0) > SLOW_WAIT and self._slow_since != WAITING.since:
                self._slow_since = WAITING.since
                self._on_slow_data(SLOW_WAIT)
        return os.read(pipe, 1)


_running: dict[int, str] = {}  # process id -> description of the training in it


@contextmanager
def exclusive_training(output_dir: Path | None) -> Iterator[None]:
    """Raise RunError if a training is running in this process: signals and random states belong to the process."""
    require_main_script()
    running = _running.get(os.getpid())
    if running is not None:
        raise RunError(f"a Trainer is running in this process already ({running}); end its running() or fit() first")
    _running[os.getpid()] = f"output_dir {output_dir}" if output_dir else "without output_dir"
    try:
        yield
    finally:
        del _running[os.getpid()]


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
    """The requests after a step, the same on every process."""

    stop: int = 0  # number of the signal
    save: bool = False
    on_disk: int = 0  # step of the newest complete checkpoint

    def __bool__(self) -> bool:
        return bool(self.stop) or self.save


class StopRequests:
    """Decides at step boundaries whether to save or to stop.

    A single process decides after every step. Several processes agree every few steps, at most MAX_STEPS and about a
    second apart: to stop if any of them received a signal, to save if `minutes` have passed on the main process's
    clock, and on the newest complete checkpoint, which only the main process knows.
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
        self._saved_at = self._agreed_at = time.monotonic()
        self._next_step: int | None = None  # step at which the processes agree next
        self._interval = 1

    def saved(self) -> None:
        """Restart the clock of `minutes`."""
        self._saved_at = time.monotonic()

    def pending(self) -> bool:
        """Return whether this process has received a signal; others may not have."""
        return bool(self.signals.received)

    def at_step(self, step: int) -> StopRequest:
        """Return the requests after a step; called by all processes after every step."""
        if not self.processes.is_distributed:
            return StopRequest(self.signals.received, self._is_due(), self._on_disk())
        if self._next_step is not None and step < self._next_step:
            return StopRequest()
        now = time.monotonic()
        seconds_per_step = (now - self._agreed_at) / self._interval
        interval = (
            int(max(1, min(MAX_STEPS, MAX_SECONDS / max(seconds_per_step, 1e-6)))) if self._next_step is not None else 1
        )
        is_main = self.processes.is_main
        stop, save, self._interval, on_disk = self.processes.largest(
            self.signals.received,
            int(is_main and self._is_due()),
            interval if is_main else 0,
            self._on_disk() if is_main else 0,
        )
        self._agreed_at, self._next_step = now, step + self._interval
        return StopRequest(stop, bool(save), on_disk)

    def now(self) -> int:
        """Return the signal that any process has received so far; called by all processes at the same point."""
        return self.processes.largest(self.signals.received)[0]

    def _is_due(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds
