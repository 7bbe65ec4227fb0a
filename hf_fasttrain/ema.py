"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """Averages parameters and floating-point buffers after each step; other buffers are copied.

    With `warmup`, the decay at update t is at most (1 + t) / (10 + t), so that short runs are not left at their
    initial weights (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup
        averaged, live = self.module.state_dict(), model.state_dict(keep_vars=True)
        names = [name for name, value in averaged.items() if value.is_floating_point()]
        self._averaged = [averaged[name] for name in names]
        self._live = [live[name].detach() for name in names]
        self._copied = [(averaged[n], live[n]) for n in averaged if not averaged[n].is_floating_point()]

    def decay_at(self, num_updates: int) -> float:
        """Return the share of the old average kept by update number `num_updates`, counted from 0."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Move the average towards the model's present weights."""
        torch._foreach_lerp_(self._averaged, self._live, 1 - self.decay_at(num_updates))
        for averaged, live in self._copied:
            averaged.copy_(live)
