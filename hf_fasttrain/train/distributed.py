"""Communication between training processes except gradients: numbers, objects, and errors of the main process."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_fasttrain.utils.errors import UserError
from hf_fasttrain.utils.signals import ignored_signals

Value = TypeVar("Value")
HOST_TIMEOUT = timedelta(hours=2)
_host_groups: dict[Any, Any] = {}  # process group -> group of the same processes over gloo
atexit.register(_host_groups.clear)  # a group that outlives the interpreter may abort the process


def host_group() -> Any:
    """Return the gloo group of all processes, on the host; all processes must make the first call at the same point.

    With NCCL as the backend, the group gets HOST_TIMEOUT: processes wait in it for the main one, which may be writing
    or uploading. gloo's default is half an hour, NCCL's ten minutes.
    """
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _host_groups:
        _host_groups.clear()  # drop groups of destroyed process groups
        _host_groups[world] = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return _host_groups[world]


class Processes:
    """The processes of a run. They communicate over gloo on the host, without waiting for a device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.number, self.index = accelerator.num_processes, accelerator.process_index
        self.is_main, self.is_distributed = accelerator.is_main_process, accelerator.num_processes > 1
        self.is_local_main = accelerator.is_local_main_process  # main process of this machine
        self.has_left_others = False
        if self.is_distributed:
            host_group()  # created by all processes here

    def leave_others(self) -> None:
        """Communicate no more: the others have ended, or this process ends without them."""
        self.number, self.is_distributed, self.has_left_others = 1, False, True

    def largest(self, *numbers: int) -> list[int]:
        """Return the elementwise maximum over processes."""
        return self._all_reduce(dist.ReduceOp.MAX, numbers)

    def sum(self, number: int) -> int:
        """Return the sum over processes."""
        return self._all_reduce(dist.ReduceOp.SUM, (number,))[0]

    def wait(self) -> None:
        """Wait for all processes (a barrier)."""
        if self.is_distributed:
            dist.barrier(group=host_group())

    def wait_for_main(self) -> None:
        """Wait for all processes at the end of a run; only the main process handles signals.

        If another process has exited already, return.
        """
        with ignored_signals() if not self.is_main else nullcontext(), suppress(RuntimeError):
            self.wait()

    def _all_reduce(self, operation: Any, numbers: Sequence[int]) -> list[int]:
        if not self.is_distributed:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(values, operation, group=host_group())
        return [int(value) for value in values]

    def any_process(self, flag: bool) -> bool:
        """Return whether `flag` is set on any process."""
        return bool(self.largest(int(flag))[0])

    def gather(self, values: list[Value]) -> list[Value]:
        """Return the values of all processes, ordered by process."""
        gathered: list[Value] = gather_object(values) if self.is_distributed else values
        return gathered

    def rows_on_main(self, rows: Tensor | None) -> Tensor | None:
        """Return the rows (N, ...) of all processes on the main one, ordered by process; None on the others.

        Rows are on the host; a process without any passes None. They are sent only to the main process.
        """
        if not self.is_distributed:
            return rows
        layouts = self.gather([None if rows is None else (tuple(rows.shape), rows.dtype)])
        if not self.is_main:
            if rows is not None and rows.numel():
                dist.send(rows.contiguous().view(-1).view(torch.uint8), 0, group=host_group())
            return None
        parts = [] if rows is None else [rows]
        for index, layout in enumerate(layouts[1:], start=1):
            if layout is None:
                continue
            part = torch.empty(layout[0], dtype=layout[1])
            if part.numel():
                dist.recv(part.view(-1).view(torch.uint8), index, group=host_group())
            parts.append(part)
        return torch.cat(parts) if parts else None

    def from_local_main(self, value: Any) -> Any:
        """Return the value of this machine's main process."""
        return (
            self.gather([value])[self.index - self._accelerator.local_process_index] if self.is_distributed else value
        )

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over processes of a tensor on the training device."""
        return self._accelerator.reduce(tensor, reduction="sum") if self.is_distributed else tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over processes of a tensor on the training device."""
        return self._accelerator.reduce(tensor, reduction="mean") if self.is_distributed else tensor

    @torch.no_grad()
    def broadcast_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Copy the main process's values into tensors on the training device, on every process."""
        for tensor in tensors if self.is_distributed else ():
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.copy_(values)


def destroy_process_group() -> None:
    """Destroy the process group and end its threads; call it last, when nothing refers to the trainer any more.

    A thread of a gloo group that drops a tensor while the interpreter is shutting down aborts the process. The group's
    destructor waits for its threads, but it runs only when nothing refers to the group, DistributedDataParallel
    included.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a trainer is freed by the garbage collector only: its parts refer to each other
        _host_groups.clear()
        dist.destroy_process_group()


def on_main(function: Callable[[], Value]) -> Value:
    """Run `function` on the main process and return its result on all; its UserError is raised on all processes."""
    from accelerate.state import PartialState

    state = PartialState()
    if state.num_processes == 1:
        return function()
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [(True, function())]
        except UserError as error:
            outcome = [(False, error)]
    dist.broadcast_object_list(outcome, src=0, group=host_group(), device=torch.device("cpu"))
    ok, value = outcome[0]
    if not ok:
        raise value
    return value
