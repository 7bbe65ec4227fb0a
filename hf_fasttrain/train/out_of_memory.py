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
    """Free the memory that failed forwards and backwards have left."""
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

    Forwards change a model's buffers (batch-norm statistics and counts); parameters and optimizer change in the update
    alone. Random states need no copy: every step seeds them. The copy of the buffers is a fused operation for each
    type of them: 0.1 ms a step for ResNet-50 on a CPU, nothing for models without buffers.
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
        self.loss, self._of_loss = loss, loss.copy() if loss is not None else []
        self._meets_in_forward = any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        by_type: dict[torch.dtype, list[Tensor]] = {}  # a fused operation takes tensors of one type
        for buffer in buffers:
            if buffer.numel():
                by_type.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(live, [torch.empty_like(buffer) for buffer in live]) for live in by_type.values()]
        self._fits_px = 0  # image size for which all processes have had enough memory
        self._failed_in = "gradients"
        self._weights: list[Tensor] | None = None  # on the host, while the first update is made
        self._has_updated = False

    def is_uncertain(self, step: Step) -> bool:
        """Return whether several processes do not know yet that images of this size fit, and can find out.

        Synchronised batch norm meets in the forward, where a process that fails leaves the others waiting.
        """
        return self.processes.is_distributed and _size(step) > self._fits_px and not self._meets_in_forward

    def fits(self, step: Step) -> None:
        """Record that a step fits on all processes."""
        self._fits_px = max(self._fits_px, _size(step))

    def keep(self) -> None:
        """Back up the buffers before a step."""
        if self._buffers:
            with torch.no_grad():
                for live, backup in self._buffers:
                    foreach_copy(backup, live)
        if self.loss is not None:
            self._of_loss = self.loss.copy()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers before the step, and the weights if its update was the first."""
        for live, backup in self._buffers:
            foreach_copy(live, backup)
        if self.loss is not None:
            self.loss.put_back(self._of_loss)
        for parameter, weight in zip(self.parameters, self._weights or (), strict=False):
            parameter.copy_(weight)
        self._weights, self._failed_in = None, "gradients"

    def begin_update(self, *, empty: bool) -> None:
        """Record that the optimizer's step begins; `empty` if it has no state yet.

        Making that state is where memory runs out: for the first update the weights are kept on the host. (Fused
        kernels change weights without counting their versions, so that nothing else tells whether they have.)
        """
        first, self._failed_in = empty and not self._has_updated, "update"
        if first:
            self._failed_in = "first update"
            self._weights = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    def end_update(self) -> None:
        """Record that the optimizer's step has ended: what comes after it can't be undone either."""
        self._weights, self._failed_in = None, "update"

    def updated(self, *, applied: bool) -> None:
        """Record that an update is complete; `applied`: the optimizer has not skipped it, and has made its state."""
        self._has_updated, self._failed_in = self._has_updated or applied, "gradients"

    def failed_in(self) -> str:
        """Return where a step has failed: "gradients", "first update" (which `restore` undoes), or "update"."""
        return self._failed_in
