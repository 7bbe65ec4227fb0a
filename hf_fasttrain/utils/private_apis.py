"""Every use of a library's private API in this package: each is a function that says why no public one will do.

Looked at with torch 2.11 and 2.15, accelerate 1.15, datasets 5.2, evaluate 0.4.6, huggingface_hub 2.4, timm 1.0.31,
trackio 0.43 (its source only) and Python 3.11 and 3.12. tests/test_private_apis.py fails with the function's name where
a library has changed. Libraries are imported within the functions: what answers `--help` imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

COMPILER = "torch._dynamo"  # the module that torch.compile imports; that takes seconds


# --- torch: tensors and modules ----------------------------------------------------------------------------


def foreach_copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors into others of the same type by one fused operation.

    A public copy is one operation for each tensor: for ResNet-50's buffers on a CPU 0.1 ms a step fused.
    """
    import torch

    torch._foreach_copy_(targets, sources)


def foreach_lerp(targets: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move tensors towards others, by `weight` of the way, in one fused operation; torch has no public one."""
    import torch

    torch._foreach_lerp_(targets, ends, weight)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` has wrapped, or the module itself.

    The wrapper's parameters have other names, and torch has no public way back to the module within.
    """
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def buffer_registry(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary of a module's own buffers, in which they can be put back and taken out.

    `named_buffers` gives a copy, without the empty places; `register_buffer` calls hooks of the user's.
    """
    return module._buffers


def saved_tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (registry, key) of the tensors of one module that its state dict holds: registry[key] is the tensor.

    A state dict gives the tensors of now, and moving a module replaces them; only a registry leads to those of later.
    `state_dict` itself would be gone through in each update.
    """
    for registry in (module._parameters, module._buffers):
        for key, tensor in registry.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield registry, key


def has_gradient_hooks(parameter: nn.Parameter) -> bool:
    """Return whether something acts as soon as a parameter's gradient is there; only registering is public."""
    return bool(parameter._post_accumulate_grad_hooks)


def batch_norm_class() -> type[nn.Module]:
    """Return the class of all modules that keep running statistics of their batches.

    Its public subclasses would have to be listed, and timm's and users' own ones would be missed.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    return _BatchNorm


def dropout_class() -> type[nn.modules.dropout._DropoutNd]:
    """Return the class of all dropouts, those of users included; only its subclasses are public."""
    from torch.nn.modules.dropout import _DropoutNd

    return _DropoutNd


def is_memory_free(memory: Tensor) -> bool:
    """Return whether only one list and this call's caller refer to a tensor's memory; False where torch can't say.

    Autograd's graph may hold the memory without any Python object that could be counted.
    """
    import torch

    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(memory.untyped_storage()._cdata) <= 2


def antialiased_filters() -> dict[str, Callable[..., Any]]:
    """Return name -> torch's 8-bit antialiased resize into memory that is there already.

    `torch.nn.functional.interpolate` allocates its result, which would then be copied into the batch.
    """
    import torch

    aten = torch.ops.aten
    return {"bilinear": aten._upsample_bilinear2d_aa.out, "bicubic": aten._upsample_bicubic2d_aa.out}


# --- torch: compiling and loss scaling ---------------------------------------------------------------------


def is_compiler_imported() -> bool:
    """Return whether torch's compiler is imported; asking it anything public would import it, for seconds."""
    return COMPILER in sys.modules


def raise_recompile_limit(limit: int) -> None:
    """Let the compiler make code for `limit` shapes of a function, instead of running the rest uncompiled.

    `torch.compiler.config` has the first of these settings only in some versions, and the second in none.
    """
    from torch._dynamo import config  # slow to import

    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 16 * config.recompile_limit)


def has_loss_scale(scaler: torch.amp.GradScaler) -> bool:
    """Return whether a scaler has scaled a loss yet. `get_scale` gives its first scale before that too."""
    return scaler._scale is not None


def set_first_loss_scale(scaler: torch.amp.GradScaler, scale: float) -> None:
    """Set the scale that a scaler begins with; accelerate has made it already, and `update` needs a scaled loss."""
    scaler._init_scale = scale


# --- torch: DataLoader's processes -------------------------------------------------------------------------


def is_torch_child_handler(handler: object) -> bool:
    """Return whether a handler of SIGCHLD is torch's, which raises wherever the main thread is."""
    from torch.utils.data._utils import signal_handling

    return getattr(handler, "__module__", None) == signal_handling.__name__


@contextmanager
def no_torch_child_handler() -> Iterator[None]:
    """Let torch set no handler of SIGCHLD: the first DataLoader that starts processes sets it unless this says it has.

    There is no public switch, and the handler raises in the middle of an update, or of a save.
    """
    from torch.utils.data._utils import signal_handling

    before, signal_handling._SIGCHLD_handler_set = signal_handling._SIGCHLD_handler_set, True
    try:
        yield
    finally:
        signal_handling._SIGCHLD_handler_set = before


def raise_for_dead_workers() -> None:
    """Raise RuntimeError if a DataLoader's process has died, as torch's handler of SIGCHLD does."""
    from torch._C import _error_if_any_worker_fails

    _error_if_any_worker_fails()


# --- accelerate, datasets, evaluate, huggingface_hub, timm, trackio ----------------------------------------


def reset_precision(precision: str) -> None:
    """Let this process have another mixed precision than its last run had; the process group stays.

    accelerate keeps the first one for the whole process, and raises for another.
    """
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()


def replace_prepared(accelerator: Accelerator, old: nn.Module, new: nn.Module) -> None:
    """Let an accelerator know a model in another wrapper; it would keep the old one and its buckets of gradients."""
    models = accelerator._models
    models[:] = [new if model is old else model for model in models]


def dataset_fingerprint(dataset: Any) -> str:
    """Return what changes when a data set does; datasets reckons it, and shows it to nobody."""
    return str(dataset._fingerprint)


def dataset_indices(dataset: Any) -> Any:
    """Return the pyarrow table of the rows that a filtered, shuffled or selected data set has, None for all in order.

    `flatten_indices` would write the images anew.
    """
    return dataset._indices


def forget_metric_data(module: Any) -> None:
    """Let a metric of evaluate begin anew after it has raised: it would go on from what it was given before."""
    module.data = module.writer = module.buf_writer = None


def hub_client_factory() -> Callable[[], Any]:
    """Return what makes huggingface_hub's own HTTP client; `set_client_factory` is public, its default is not."""
    from huggingface_hub.utils._http import default_client_factory

    return default_client_factory


def timm_weights_filter(model: nn.Module) -> Callable[..., Any] | None:
    """Return the function by which timm brings older weights to a model's names and sizes, None if it has none.

    timm applies it to weights that it loads itself only.
    """
    found: Callable[..., Any] | None = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return found


def trackio_last_step(run: Any) -> int:
    """Return the last step that a trackio run holds, -1 for none; a killed one holds less than was sent."""
    return int(getattr(run, "_next_step", 0)) - 1


# --- Python ------------------------------------------------------------------------------------------------


def let_forkserver_exit() -> None:
    """Close what keeps the fork server alive that has started this process, so that it ends with its own parent.

    Python hands it to every process of the server, for them to start others by it, and nothing public closes it.
    """
    import os
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
