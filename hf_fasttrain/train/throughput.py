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
        self.device, self._loader_seconds = device, waited
        self.images, self.train_seconds, self.wait_seconds = 0, 0.0, 0.0  # of the whole run
        self._started_at: float | None = None
        self._wait_mark = self._loss = 0.0
        self._recent_seconds = self._recent_steps = 0.0
        self._new_lap()

    def _new_lap(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._images: list[int] = []  # of each loss
        # The step loss's values for the log, by name: parts of means with their steps' images; images that had one.
        self._values: dict[str, tuple[list[Tensor], list[int]]] = {}
        self._value_images: dict[str, float] = {}
        self._step_numbers: list[int] = []  # number, within the lap, of each loss's step
        self._steps = self._num_images = 0  # including skipped steps
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

        `values`: name -> (this process's part of a mean for the log, share of the step's images in it). Values of a
        step that fp16 skipped are ignored: they may be NaN or inf.
        """
        self.images += num_images
        self._steps, self._num_images = self._steps + 1, self._num_images + num_images
        if skipped:
            return
        self._losses.append(loss)
        self._step_numbers.append(self._steps)
        self._images.append(num_images)
        if grad_norm is not None:
            self._norms.append(grad_norm)
        for name, (value, share) in values.items() if values else ():
            parts, images = self._values.setdefault(name, ([], []))
            parts.append(value)
            images.append(num_images)
            self._value_images[name] = self._value_images.get(name, 0.0) + share * num_images

    @property
    def has_steps(self) -> bool:
        """Whether there were steps since the last lap; the same on all processes."""
        return self._steps > 0

    def first_loss(self, reduce_sum: Callable[[Tensor], Tensor]) -> float | None:
        """Return the mean loss of the current lap's first step, None if there is none; called by all processes."""
        return float(reduce_sum(torch.stack(self._losses[:1]).float().sum())) if self._losses else None

    def lap(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return loss, gradient norm and speed since the last lap; `reduce_sum` sums a tensor over processes.

        If the loss is NaN or inf on any process, the lap is kept for `first_not_finite`.
        """
        loss, norm = self._totals(reduce_sum)
        self._update_clock()
        seconds = max(self._seconds, 1e-9)
        fading = math.exp(-seconds / RECENT_SECONDS)
        self._recent_seconds = fading * self._recent_seconds + seconds
        self._recent_steps = fading * self._recent_steps + self._steps
        values = {
            "loss": loss / sum(self._images) if self._images else self._loss,  # mean over the images
            **({"grad_norm": norm} if self._norms else {}),  # of the last step
            "images_per_second": self._num_images / seconds,
            "data_wait_fraction": min(1.0, self._wait / seconds),
            "seconds_per_step": seconds / max(1, self._steps),
        }
        if math.isfinite(values["loss"]):
            self._loss = values["loss"]
            self._new_lap()
        return values

    @property
    def recent_seconds_per_step(self) -> float:
        """Seconds per step over about the last minute, as an exponentially weighted mean."""
        return self._recent_seconds / max(1.0, self._recent_steps)

    def _totals(self, reduce_sum: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Return the sum of the losses of all images in this lap, nan if a norm is not finite; and the last norm."""
        scalars = [scalar.float() for scalar in (*self._losses, *self._norms)]
        values = torch.stack(scalars).tolist() if scalars else []
        losses, norms = values[: len(self._losses)], values[len(self._losses) :]
        local = float(sum(loss * images for loss, images in zip(losses, self._images, strict=True)))
        total = float(reduce_sum(torch.tensor(local, device=self.device)))
        return total if all(map(math.isfinite, norms)) else math.nan, norms[-1] if norms else 0.0

    def first_not_finite(self, reduce_sum: Callable[[Tensor], Tensor]) -> NotFinite | None:
        """Return the first step of the lap with NaN or inf; called by all processes."""
        losses = reduce_sum(torch.stack(self._losses).float()).tolist()
        norms = torch.stack(self._norms).tolist() if self._norms else [None] * len(losses)
        for number, loss, norm in zip(self._step_numbers, losses, norms, strict=True):
            if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
                return NotFinite(self._steps - number, loss, norm)
        return None

    def save(self, state: State) -> None:
        """Write the totals of the run into a state."""
        state.images, state.train_seconds, state.wait_seconds = self.images, self.train_seconds, self.wait_seconds

    def restore(self, state: State) -> None:
        """Continue counting from a state."""
        self.images, self.train_seconds, self.wait_seconds = state.images, state.train_seconds, state.wait_seconds

    def means(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, float]:
        """Return the current lap's means of the step loss's values; call it before `lap`, on all processes.

        `gather` joins lists of all processes. A value is averaged over the images for which it was returned.
        """
        local = {}
        for name, (parts, images_of_parts) in self._values.items():
            products = zip(torch.stack(parts).tolist(), images_of_parts, strict=True)
            local[name] = sum(part * images for part, images in products), self._value_images[name]
        sums: dict[str, float] = {}
        images: dict[str, float] = {}
        for process_sums in gather([local]):
            for name, (total, count) in process_sums.items():
                sums[name] = sums.get(name, 0.0) + total
                images[name] = images.get(name, 0.0) + count
        return {name: sums[name] / images[name] for name in sums}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the clock."""
        self._start()
        try:
            yield
        except BaseException:
            self._started_at = None  # don't synchronise a device that may have failed: that would hide the error
            raise
        self._stop()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock if it is running."""
        if self._started_at is None:
            yield
            return
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        self._started_at, self._wait_mark = time.perf_counter(), self._loader_seconds()

    def _stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._update_clock()
        self._started_at = None

    def _update_clock(self) -> None:
        if self._started_at is None:
            return
        now, waited = time.perf_counter(), self._loader_seconds()
        seconds, wait = now - self._started_at, waited - self._wait_mark
        self.train_seconds, self._seconds = self.train_seconds + seconds, self._seconds + seconds
        self.wait_seconds, self._wait = self.wait_seconds + wait, self._wait + wait
        self._started_at, self._wait_mark = now, waited
