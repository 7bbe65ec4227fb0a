"""A thread that goes through an iterator ahead of its reader."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class BackgroundIterator:
    """Goes through `items` in a thread, `depth` ahead of its reader, and hands on what `work` makes of each.

    The copy to the device has begun before the reader asks for it, even where the reader waits for the device in
    every step, as fp16's scale makes it do. What fails in the thread is raised by the reader.
    """

    def __init__(self, items: Iterator[Any], work: Callable[[Any], Any], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[Any, BaseException | None] | None] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items, work), name="batches ahead", daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[Any], work: Callable[[Any], Any]) -> None:
        try:
            for item in items:
                if not self._put((work(item), None)):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            self._put((None, error))

    def _put(self, thing: tuple[Any, BaseException | None] | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(thing, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Any]:
        while (got := self._queue.get()) is not None:
            made, error = got
            if error is not None:
                raise error
            yield made

    def stop(self) -> None:
        """End the thread; what it has ahead is dropped."""
        self._stopped.set()
        self._thread.join(timeout=10)
