"""Signals that ask a process to stop, answered for a while and put back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


@contextmanager
def handled(number: int, handler: Any) -> Iterator[None]:
    """Let a handler, or SIG_IGN, answer a signal for a while; outside of the main thread nothing can be changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does, unless it is ignored."""
    ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    with nullcontext() if ignored else handled(signal.SIGTERM, signal.default_int_handler):
        yield


def ignore_signals(status: int) -> None:
    """Let nothing disturb a process that has saved its state and only has to end with `status`; Ctrl-C ends it so."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: os._exit(status))
