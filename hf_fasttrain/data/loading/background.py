"""A thread that reads an iterator ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hf_fasttrain.utils.limits import start_thread


class BackgroundIterator:
    """Iterates over `work(item)` for `items`, computed in a thread, `depth` results ahead of the consumer.

    So the copy to the device starts before the consumer needs the batch, even if the consumer waits for the device in
    every step, as it does with fp16's loss scale. An exception in the thread is raised in the consumer.
    """

    def __init__(self, items: Iterator[Any], work: Callable[[Any], Any], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[Any, BaseException | None] | None] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items, work), name="batches ahead", daemon=True)
        start_thread(self._thread)

    def _run(self, items: Iterator[Any], work: Callable[[Any], Any]) -> None:
        try:
            for item in items:
                if not self._put((work(item), None)):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            self._put((None, error))

    def _put(self, result: tuple[Any, BaseException | None] | None) -> bool:
        """Return whether the result was queued; False once the iterator is stopped."""
        while not self._stopped.is_set():
            try:
                self._queue.put(result, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Any]:
        while (entry := self._queue.get()) is not None:
            result, error = entry
            if error is not None:
                raise error
            yield result

    def stop(self, seconds: float = 10.0) -> None:
        """Stop the thread, which gets so many seconds for its present result, and drop what was not consumed."""
        self._stopped.set()
        self._thread.join(seconds)
