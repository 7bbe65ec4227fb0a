"""Speed, loss and gradient norm of training, measured without waiting for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fasttrain.train.checkpoint_state import State

RECENT_SECONDS = 60.0  # after which a lap counts 1/e in the time that is left


@dataclass(frozen=True)
class NotFinite:
    """The first step of a lap whose loss or gradient norm is NaN or inf."""

    steps_ago: int  # 0: the last step
    loss: float
    grad_norm: float | None

    def __str__(self) -> str:
        if math.isfinite(self.loss):
            return f"the gradients' norm is {self.grad_norm}"
        return f"the loss is {self.loss}"


class Throughput:
    """Counts steps, images, losses and seconds; the clock stops while evaluating or saving.

    `waited` returns the loader's seconds of waiting so far. The device is waited for only when the clock is stopped
    and in `lap`.
    """

    def __init__(self, device: torch.device, waited: Callable[[], float]) -> None:
        self.device, self._waited = device, waited
        self.images, self.train_seconds, self.wait_seconds = 0, 0.0, 0.0  # of the whole run
        self._since: float | None = None
        self._wait_mark = self._loss = 0.0
        self._recent_seconds = self._recent_steps = 0.0
        self._new_lap()

    def _new_lap(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._images: list[int] = []  # of each loss
        self._values: dict[str, Tensor] = {}  # sums over the images of what the step loss has returned for the log
        self._of_value: dict[str, float] = {}  # over how many images
        self._at: list[int] = []  # which step of the lap each loss is of
        self._steps = self._seen = 0  # steps and images, skipped ones too
        self._seconds = self._wait = 0.0

    def add(
        self,
        loss: Tensor,
        num_images: int,
        grad_norm: Tensor | None = None,
        values: Mapping[str, tuple[Tensor, float]] | None = None,
        *,
        skipped: bool = False,
    ) -> None:
        """Count a step: this process's part of its mean loss (0-d), its images on all processes, its gradients' norm.

        `values`: this process's part of means for the log, and of how much of the step's images. All of a step that
        fp16 skipped may be NaN or inf, and is ignored.
        """
        self.images += num_images
        self._steps, self._seen = self._steps + 1, self._seen + num_images
        if skipped:
            return
        self._losses.append(loss)
        self._at.append(self._steps)
        self._images.append(num_images)
        if grad_norm is not None:
            self._norms.append(grad_norm)
        for name, (value, share) in values.items() if values else ():
            total = self._values.get(name)
            self._values[name] = value * num_images if total is None else total.add_(value, alpha=num_images)
            self._of_value[name] = self._of_value.get(name, 0.0) + share * num_images

    @property
    def has_steps(self) -> bool:
        """Whether there were steps since the last lap; the same on all processes."""
        return self._steps > 0

    def first_loss(self, add_up: Callable[[Tensor], Tensor]) -> float | None:
        """Return the mean loss of the present lap's first step, None if there is none; called by all processes."""
        return float(add_up(torch.stack(self._losses[:1]).float().sum())) if self._losses else None

    def lap(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return what happened since the last lap; `add_up` sums a tensor over processes.

        If the loss is NaN or inf on any process, the lap is kept for `first_not_finite`.
        """
        loss, norm = self._totals(add_up)
        self._mark()
        seconds = max(self._seconds, 1e-9)
        fading = math.exp(-seconds / RECENT_SECONDS)
        self._recent_seconds = fading * self._recent_seconds + seconds
        self._recent_steps = fading * self._recent_steps + self._steps
        values = {
            "loss": loss / sum(self._images) if self._images else self._loss,  # mean over the images
            **({"grad_norm": norm} if self._norms else {}),  # of the last step
            "images_per_second": self._seen / seconds,
            "data_wait_fraction": min(1.0, self._wait / seconds),
            "seconds_per_step": seconds / max(1, self._steps),
        }
        if math.isfinite(values["loss"]):
            self._loss = values["loss"]
            self._new_lap()
        return values

    @property
    def recent_seconds_per_step(self) -> float:
        """Seconds per step in the laps of about the last minute; older ones fade away."""
        return self._recent_seconds / max(1.0, self._recent_steps)

    def _totals(self, add_up: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Return the sum of the losses of all images in this lap, nan if a norm is not finite; and the last norm."""
        numbers = [number.float() for number in (*self._losses, *self._norms)]
        read = torch.stack(numbers).tolist() if numbers else []
        losses, norms = read[: len(self._losses)], read[len(self._losses) :]
        local = float(sum(loss * images for loss, images in zip(losses, self._images, strict=True)))
        total = float(add_up(torch.tensor(local, device=self.device)))
        return total if all(map(math.isfinite, norms)) else math.nan, norms[-1] if norms else 0.0

    def first_not_finite(self, add_up: Callable[[Tensor], Tensor]) -> NotFinite | None:
        """Return the first step of the lap with NaN or inf; called by all processes."""
        losses = add_up(torch.stack(self._losses).float()).tolist()
        norms = torch.stack(self._norms).tolist() if self._norms else [None] * len(losses)
        for at, loss, norm in zip(self._at, losses, norms, strict=True):
            if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
                return NotFinite(self._steps - at, loss, norm)
        return None

    def save(self, state: State) -> None:
        """Write the totals of the run into a state."""
        state.images, state.train_seconds, state.wait_seconds = self.images, self.train_seconds, self.wait_seconds

    def restore(self, state: State) -> None:
        """Continue counting from a state."""
        self.images, self.train_seconds, self.wait_seconds = state.images, state.train_seconds, state.wait_seconds

    def means(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, float]:
        """Return the present lap's means of the step loss's values, before `lap`; called by all processes.

        `gather` joins lists of all processes. A value is averaged over the images for which it was returned.
        """
        names = list(self._values)
        numbers = torch.stack(list(self._values.values())).tolist() if names else []
        local = {name: (number, self._of_value[name]) for name, number in zip(names, numbers, strict=True)}
        sums: dict[str, float] = {}
        images: dict[str, float] = {}
        for each in gather([local]):
            for name, (number, count) in each.items():
                sums[name] = sums.get(name, 0.0) + number
                images[name] = images.get(name, 0.0) + count
        return {name: sums[name] / images[name] for name in sums}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the clock."""
        self._start()
        try:
            yield
        except BaseException:
            self._since = None  # don't synchronise a device that may have failed: that would hide the error
            raise
        self._stop()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock, if it runs."""
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
