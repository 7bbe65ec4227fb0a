"""Running statistics of batch norms, which differ between processes, and their averages over the processes."""

from __future__ import annotations

from torch import Tensor, nn

from hf_fasttrain.models.model import batch_norms, has_trained_weight
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.utils.errors import shortened
from hf_fasttrain.utils.private_apis import batch_norm_class


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> running mean or variance of this process; shared modules appear under all their names."""
    norms = {id(norm) for norm in batch_norms(model)}
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules(remove_duplicate=False)
        if id(module) in norms
        for name in ("running_mean", "running_var")
        if isinstance(buffer := getattr(module, name), Tensor)
    }


def averaged_statistics(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """Return the running statistics averaged over processes, without changing the model; empty with one process."""
    if not processes.is_distributed:
        return {}
    return {name: processes.mean(value) for name, value in running_statistics(model).items()}


def average_batch_norm(model: nn.Module, processes: Processes) -> None:
    """Replace the running statistics on every process by their mean over the processes."""
    statistics = running_statistics(model)
    for name, mean in averaged_statistics(model, processes).items():
        statistics[name].copy_(mean)


def frozen_norms_note(model: nn.Module) -> str | None:
    """Return a note on batch norms with frozen weights, as those of a teacher within the model; None without any."""
    norms = {name: each for name, each in model.named_modules() if isinstance(each, batch_norm_class())}
    frozen = [name for name, norm in norms.items() if not has_trained_weight(norm)]
    if not frozen:
        return None
    return (
        f"{len(frozen):,} of {len(norms):,} batch norms have frozen weights ({shortened(frozen, 3)}): in training they "
        "use their running statistics, as in evaluation, and do not change them"
    )
