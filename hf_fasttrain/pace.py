"""How fast training goes and what its loss is, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Pace:
    """Counts steps, images, losses and seconds; the clock runs while training and stands while evaluating or saving.

    `waited` returns the loader's seconds of waiting so far. The device is waited for only when the clock is stopped
    and in `lap`.
    """

    def __init__(self, device: torch.device, waited: Callable[[], float]) -> None:
        self.device, self._waited = device, waited
        self.images, self.train_seconds, self.wait_seconds = 0, 0.0, 0.0  # of the whole run
        self._since: float | None = None
        self._wait_mark = 0.0
        self._new_lap()

    def _new_lap(self) -> None:
        self._losses: list[Tensor] = []
        self._images: list[int] = []
        self._seconds = self._wait = 0.0

    def add(self, loss: Tensor, num_images: int) -> None:
        """Count a step: this process's part of its mean loss (0-d), and its images on all processes."""
        self._losses.append(loss)
        self._images.append(num_images)
        self.images += num_images

    def lap(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return what happened since the last lap; `add_up` sums a tensor over processes."""
        loss = float(add_up(self._total_loss())) / max(1, sum(self._images))
        self._mark()
        seconds = max(self._seconds, 1e-9)
        values = {
            "loss": loss,  # mean over the images
            "images_per_second": sum(self._images) / seconds,
            "data_wait_fraction": min(1.0, self._wait / seconds),
            "seconds_per_step": seconds / max(1, len(self._images)),
        }
        self._new_lap()
        return values

    def _total_loss(self) -> Tensor:
        """Return the sum of the losses of all images in this lap, as far as this process had them."""
        if not self._losses:
            return torch.zeros((), device=self.device)
        images = torch.tensor(self._images, dtype=torch.float32).to(self.device, non_blocking=True)
        return (torch.stack(self._losses).float() * images).sum()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the clock."""
        self._start()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let the clock stand, if it runs."""
        if self._since is None:
            yield
            return
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        self._since, self._wait_mark = time.perf_counter(), self._waited()

    def _stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._mark()
        self._since = None

    def _mark(self) -> None:
        if self._since is None:
            return
        now, waited = time.perf_counter(), self._waited()
        seconds, wait = now - self._since, waited - self._wait_mark
        self.train_seconds, self._seconds = self.train_seconds + seconds, self._seconds + seconds
        self.wait_seconds, self._wait = self.wait_seconds + wait, self._wait + wait
        self._since, self._wait_mark = now, waited
