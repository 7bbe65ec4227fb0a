"""Running statistics of batch norms, which each process has of its own: read, and averaged over the processes."""

from __future__ import annotations

from torch import Tensor, nn

from hf_fasttrain.models.model import batch_norms
from hf_fasttrain.train.distributed import Processes


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> running mean or variance of a model's batch norms, by all names; each process has its own."""
    norms = {id(norm) for norm in batch_norms(model)}
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules(remove_duplicate=False)
        if id(module) in norms
        for name in ("running_mean", "running_var")
        if isinstance(buffer := getattr(module, name), Tensor)
    }


def averaged_statistics(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """Return the means of all processes' running statistics, the model's own left as they are; nothing if alone."""
    if not processes.is_distributed:
        return {}
    return {name: processes.mean(own) for name, own in running_statistics(model).items()}


def average_batch_norm(model: nn.Module, processes: Processes) -> None:
    """Give every process the mean of all processes' running statistics."""
    own = running_statistics(model)
    for name, mean in averaged_statistics(model, processes).items():
        own[name].copy_(mean)
