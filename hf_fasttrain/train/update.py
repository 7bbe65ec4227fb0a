"""The update of a step: clips the gradients, steps the optimizer, updates the moving average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_fasttrain.train.clipping import Clip
from hf_fasttrain.train.closure import Backup, needs_closure, preserved_buffers
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.out_of_memory import Memory
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.private_apis import has_loss_scale

MIN_LOSS_SCALE = 2.0**-8  # of fp16; with a smaller one, the forward pass itself overflows


class Update:
    """Applies updates with an optimizer (with fp16, Accelerate's wrapper). Only fp16 waits for the device."""

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Any,
        parameters: Sequence[nn.Parameter],
        memory: Memory,
        *,
        clip_norm: float | None = None,
        ema: Ema | None = None,
    ) -> None:
        self.accelerator, self.optimizer, self.parameters, self.memory = accelerator, optimizer, parameters, memory
        self._trainable = parameters  # shared: it changes when parameters are frozen or unfrozen
        self.clip_norm, self.ema = clip_norm, ema
        self.needs_closure = needs_closure(optimizer)
        self._backup: Backup | None = None  # while an optimizer calls its closure
        self.clip: Clip | None = None  # clipping other than by the norm
        self._ignored: Sequence[nn.Parameter] = ()
        self.grad_norm: Tensor | None = None  # of the last update, on the device; None: fp16 without clipping
        self.skipped = False  # whether fp16's last gradients overflowed
        self._scale: float | None = None  # fp16's loss scale after the last update

    def __call__(self, number: int, step: int, recompute: Callable[[], Tensor]) -> None:
        """Apply update `number` for step index `step`; `skipped` is set if fp16 overflows.

        `recompute()` computes the step's gradients again and returns its loss, for an optimizer with a closure.
        """
        scaler = self.accelerator.scaler
        self.grad_norm = self._clip()
        if scaler is not None and self._scale is None:
            self._scale = scaler.get_scale()
        if self.needs_closure:
            self._step_with_closure(recompute)
        else:
            self.memory.begin_update(is_state_empty=not self.optimizer.state)
            self.optimizer.step()
            self.memory.end_update()
        self.skipped = scaler is not None and self._has_skipped(scaler, step)
        if self.ema is not None and not self.skipped:
            self.ema.update(number)
        self.memory.updated(applied=not self.skipped)
        self.zero_grad()

    def _step_with_closure(self, recompute: Callable[[], Tensor]) -> None:
        """Step an optimizer that changes the weights, calls a closure for their gradients, and changes them again."""

        def closure() -> Tensor:
            self.zero_grad()
            with torch.enable_grad(), preserved_buffers(self.memory.norms, self.memory.loss, self.optimizer):
                loss = recompute()
            self._clip()
            return loss

        self._backup = Backup(self.optimizer)
        self.optimizer.step(closure)
        self.memory.end_update()
        self._backup = None

    def ignore(self, parameters: Sequence[nn.Parameter]) -> None:
        """Ignore and drop the gradients of parameters that the optimizer does not have."""
        ignored = {id(parameter) for parameter in parameters}
        self._ignored = parameters
        self.parameters = [p for p in self._trainable if id(p) not in ignored] if ignored else self._trainable

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._ignored:
            parameter.grad = None

    def _clip(self) -> Tensor | None:
        """Clip the gradients if `clip_norm` or `clip` is set, and return their norm before clipping."""
        is_scaled = self.accelerator.scaler is not None
        if self.clip_norm is not None:
            clip = self.accelerator.clip_grad_norm_ if is_scaled else torch.nn.utils.clip_grad_norm_
            return clip(self.parameters, self.clip_norm)
        if is_scaled and self.clip is None:
            return None
        if is_scaled:
            self.accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip is not None:
            self.clip(self.parameters)
        return norm

    def _has_skipped(self, scaler: Any, step: int) -> bool:
        """Return whether fp16's last step overflowed, which reduces its loss scale; waits for the device.

        Accelerate's flag misses updates that a fused optimizer skips in its kernel.
        """
        previous, self._scale = self._scale, scaler.get_scale()
        if self._scale < MIN_LOSS_SCALE:
            raise RunError(
                f"fp16 overflows at step {step + 1} even with a loss scale of {self._scale}; set "
                "accelerate.mixed_precision=bf16 or no, or lower optimizer.lr; the checkpoints have not changed"
            )
        return previous is not None and self._scale < previous

    def undo(self) -> None:
        """Undo a failed step: drop its gradients, and revert its update if it was the first one."""
        self.zero_grad()
        if self._backup is not None:
            self._backup.restore()
            self._backup = None
        elif self.memory.failed_in() == "first update":
            self.optimizer.state.clear()  # it may be incomplete
        scaler = self.accelerator.scaler
        if scaler is not None and has_loss_scale(scaler):  # it has none before the first loss
            scaler.update(scaler.get_scale())  # resets its state: it may have unscaled the dropped gradients
        self.memory.restore()
