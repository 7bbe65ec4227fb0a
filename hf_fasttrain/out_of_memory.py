"""Running out of device memory: how it is recognised, and what is put back before a step is made again."""

from __future__ import annotations

import gc

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn


class MemoryShort(RuntimeError):
    """Some process has run out of memory in a step, before any gradient was exchanged."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is that of a device, or of the host, without memory for the batch."""
    if isinstance(error, MemoryShort | torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and (should_reduce_batch_size(error) or "not enough memory" in str(error))


def free_cached_memory(device: torch.device) -> None:
    """Give back what failed forwards and backwards have left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Undo:
    """A model's buffers (batch-norm statistics and counts) as they were before a step.

    Forwards change them; parameters and optimizer change in the update alone. Random states need no copy: every step
    seeds them. Costs one fused copy a step: 0.1 ms for ResNet-50 on a CPU, nothing for models without buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = [buffer for buffer in model.buffers() if buffer.numel()]
        self._kept = [torch.empty_like(buffer) for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the present values."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Go back to the values that were kept."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)
