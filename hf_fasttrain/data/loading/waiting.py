"""Waits for images in the main thread, which a stop signal may cut short: a disk or file server may never answer."""

from __future__ import annotations

import threading
import time
from typing import NoReturn

CLOSING_SECONDS = 10.0


class WaitCutShort(BaseException):
    """A stop signal was received, and images that were awaited did not arrive soon after it.

    Not an Exception: transforms and decoders, within which it may be raised, catch those.
    """


class _Waiting:
    """Since when the main thread has been waiting for images; a context manager that marks a wait.

    It marks those of the main thread alone: signals reach no other one. Each batch is a wait, so no generator makes it.
    """

    def __init__(self) -> None:
        self.since: float | None = None  # monotonic seconds; None: it is not waiting

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.since = time.monotonic()

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self.since = None

    def cut_short(self) -> NoReturn:
        """End the present wait, called by a signal's handler; not again while what awaits the images is closed."""
        self.since = time.monotonic() + CLOSING_SECONDS
        raise WaitCutShort

    def seconds(self, start: float) -> float:
        """Return how long the present wait has lasted since `start` (monotonic seconds); 0 without a wait."""
        return 0.0 if self.since is None else time.monotonic() - max(self.since, start)


WAITING = _Waiting()
