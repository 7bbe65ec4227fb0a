"""Temporary handlers of the signals that stop a process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


@contextmanager
def signal_handler(number: int, handler: Any) -> Iterator[None]:
    """Set a signal's handler (or SIG_IGN) within the block; outside of the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does, unless it is ignored."""
    ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    with nullcontext() if ignored else signal_handler(signal.SIGTERM, signal.default_int_handler):
        yield


@contextmanager
def ignored_signals() -> Iterator[None]:
    """Ignore the signals that stop a process within the block."""
    with ExitStack() as handlers:
        for number in SIGNALS:
            handlers.enter_context(signal_handler(number, signal.SIG_IGN))
        yield


def ignore_signals(status: int) -> None:
    """Ignore further signals in a process that has saved its state and is about to exit; Ctrl-C exits with `status`."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: os._exit(status))
