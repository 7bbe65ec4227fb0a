"""Running out of memory: restores the state before a step is retried."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.utils.private_apis import foreach_copy
from hf_fasttrain.utils.process_memory import relax_memory_limit

if TYPE_CHECKING:
    from hf_fasttrain.data.loading.loader import Step
    from hf_fasttrain.train.checkpoint_state import LossState


def free_cached_memory(device: torch.device) -> None:
    """Free the memory of failed forward and backward passes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError):  # only glibc keeps freed heap memory
        ctypes.CDLL(None).malloc_trim(0)
    relax_memory_limit()


def _size(step: Step) -> int:
    return max(step.image_shape, default=1)


class Memory:
    """Whether steps fit into memory, and the backup that is needed to retry one that did not.

    A forward pass changes a model's buffers (batch-norm statistics and counts); only the update changes parameters and
    optimizer. Random states need no copy: every step seeds them. Copying the buffers takes one fused operation per
    dtype: 0.1 ms per step for ResNet-50 on a CPU, nothing for models without buffers.
    """

    def __init__(
        self,
        buffers: Iterable[Tensor],
        parameters: Sequence[nn.Parameter],
        norms: Sequence[nn.Module],
        processes: Processes,
        loss: LossState | None = None,
    ) -> None:
        self.parameters, self.norms, self.processes = parameters, norms, processes
        self.loss, self._loss_buffers = loss, loss.copy() if loss is not None else []
        self._syncs_in_forward = any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        by_type: dict[torch.dtype, list[Tensor]] = {}  # fused operations need tensors of one dtype
        for buffer in buffers:
            if buffer.numel():
                by_type.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(tensors, [torch.empty_like(buffer) for buffer in tensors]) for tensors in by_type.values()]
        self._fitting_px = 0  # largest image size that has fitted on all processes
        self._phase = "gradients"
        self._weights: list[Tensor] | None = None  # a copy on the host during the first update
        self._has_updated = False

    def is_uncertain(self, step: Step) -> bool:
        """Return whether processes should check that images of this size fit before they exchange gradients.

        They can't check with synchronised batch norm: a process that fails in forward leaves the others waiting.
        """
        return self.processes.is_distributed and _size(step) > self._fitting_px and not self._syncs_in_forward

    def fits(self, step: Step) -> None:
        """Record that a step fits on all processes."""
        self._fitting_px = max(self._fitting_px, _size(step))

    def keep(self) -> None:
        """Back up the buffers before a step."""
        if self._buffers:
            with torch.no_grad():
                for tensors, backup in self._buffers:
                    foreach_copy(backup, tensors)
        if self.loss is not None:
            self._loss_buffers = self.loss.copy()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers, and the weights if it was the first update that failed."""
        for tensors, backup in self._buffers:
            foreach_copy(tensors, backup)
        if self.loss is not None:
            self.loss.restore_buffers(self._loss_buffers)
        for parameter, weight in zip(self.parameters, self._weights or (), strict=False):
            parameter.copy_(weight)
        self._weights, self._phase = None, "gradients"

    def begin_update(self, *, is_state_empty: bool) -> None:
        """Record that the optimizer's step begins; `is_state_empty`: the optimizer has no state yet.

        Memory runs out when that state is created, so the weights are copied to the host before the first update.
        (Fused kernels do not count versions, so there is no other way to know whether they have changed weights.)
        """
        is_first, self._phase = is_state_empty and not self._has_updated, "update"
        if is_first:
            self._phase = "first update"
            self._weights = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    def end_update(self) -> None:
        """Record that the optimizer's step has ended; a later failure can't be undone either."""
        self._weights, self._phase = None, "update"

    def updated(self, *, applied: bool) -> None:
        """Record that an update is complete; `applied`: the optimizer did not skip it and has a state."""
        self._has_updated, self._phase = self._has_updated or applied, "gradients"

    def failed_in(self) -> str:
        """Return the phase in which a step failed: "gradients", "first update" (which `restore` undoes) or "update"."""
        return self._phase
