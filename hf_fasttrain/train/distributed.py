"""What several training processes tell each other beside gradients: small numbers, and a main process's mistakes."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_fasttrain.utils.errors import UserError

Value = TypeVar("Value")
HOST_TIMEOUT = timedelta(hours=2)
_host_groups: dict[Any, Any] = {}  # process group -> that of the same processes over gloo
atexit.register(_host_groups.clear)  # one that is left until the interpreter is gone may abort the process


def host_group() -> Any:
    """Return the group in which all processes meet over gloo on the host; all of them call it first at the same place.

    Whoever waits in it for the main process, which may be writing or uploading, waits for HOST_TIMEOUT where there is
    NCCL too, whose own limit is ten minutes; gloo's is half an hour.
    """
    whole = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return whole
    if whole not in _host_groups:
        _host_groups.clear()  # those of process groups that are gone
        _host_groups[whole] = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return _host_groups[whole]


class Processes:
    """The processes of a run. They meet over gloo on the host, so that no device is waited for; alone, nobody is."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.number, self.index = accelerator.num_processes, accelerator.process_index
        self.is_main, self.is_distributed = accelerator.is_main_process, accelerator.num_processes > 1
        self.is_local_main = accelerator.is_local_main_process  # of those on this machine
        if self.is_distributed:
            host_group()  # made by all processes at this place

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest of all processes' numbers, one by one."""
        return self._reduced(dist.ReduceOp.MAX, numbers)

    def sum(self, number: int) -> int:
        """Return the sum of all processes' numbers."""
        return self._reduced(dist.ReduceOp.SUM, (number,))[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.is_distributed:
            dist.barrier(group=host_group())

    def _reduced(self, operation: Any, numbers: Sequence[int]) -> list[int]:
        if not self.is_distributed:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(values, operation, group=host_group())
        return [int(value) for value in values]

    def any_process(self, flag: bool) -> bool:
        """Return whether `flag` is set on any process."""
        return bool(self.largest(int(flag))[0])

    def gather(self, values: list[Value]) -> list[Value]:
        """Return the values of all processes, in their order."""
        gathered: list[Value] = gather_object(values) if self.is_distributed else values
        return gathered

    def from_local_main(self, value: Any) -> Any:
        """Return the value of this machine's main process."""
        return (
            self.gather([value])[self.index - self._accelerator.local_process_index] if self.is_distributed else value
        )

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors, which lie on the training device."""
        return self._accelerator.reduce(tensor, reduction="sum") if self.is_distributed else tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of all processes' tensors, which lie on the training device."""
        return self._accelerator.reduce(tensor, reduction="mean") if self.is_distributed else tensor

    @torch.no_grad()
    def broadcast_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the main process's values of tensors that lie on the training device."""
        for tensor in tensors if self.is_distributed else ():
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


def on_main(work: Callable[[], Value]) -> Value:
    """Return what `work` gives on the main process; a UserError there is raised on every process."""
    from accelerate.state import PartialState

    state = PartialState()
    if state.num_processes == 1:
        return work()
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [(True, work())]
        except UserError as error:
            outcome = [(False, error)]
    dist.broadcast_object_list(outcome, src=0, group=host_group(), device=torch.device("cpu"))
    ok, value = outcome[0]
    if not ok:
        raise value
    return value
