"""All uses of private APIs of libraries: each is a function whose docstring says why no public API will do.

Checked with torch 2.11 and 2.15, accelerate 1.15, datasets 5.2, evaluate 0.4.6, huggingface_hub 2.4, timm 1.0.31,
trackio 0.43 (its source only) and Python 3.11 and 3.12. tests/utils/test_private_apis.py names the function if a
library has changed. Libraries are imported inside the functions: `--help` must not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import multiprocessing.process

    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

COMPILER = "torch._dynamo"  # the module that torch.compile imports; that takes seconds


# --- torch: tensors and modules ----------------------------------------------------------------------------


def foreach_copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors into others of the same type in one fused operation.

    A public copy is one operation for each tensor: for ResNet-50's buffers on a CPU 0.1 ms a step fused.
    """
    import torch

    torch._foreach_copy_(targets, sources)


def foreach_lerp(targets: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Interpolate tensors in place towards `ends` by `weight`, in one fused operation; torch has no public one."""
    import torch

    torch._foreach_lerp_(targets, ends, weight)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` has wrapped, or the module itself.

    The wrapper's parameters have other names, and torch has no public way back to the module within.
    """
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def buffer_registry(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary of a module's buffers, in which they can be replaced and removed.

    `named_buffers` returns a copy without the buffers that are None; `register_buffer` calls the user's hooks.
    """
    return module._buffers


def saved_tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (registry, key) of the tensors of one module that its state dict holds: registry[key] is the tensor.

    A state dict holds the current tensors, and moving a module replaces them: only the registry has the later ones.
    Calling `state_dict` in each update would be slow.
    """
    for registry in (module._parameters, module._buffers):
        for key, tensor in registry.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield registry, key


def has_gradient_hooks(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has hooks that run after its gradient is accumulated; only registering is public."""
    return bool(parameter._post_accumulate_grad_hooks)


def batch_norm_class() -> type[nn.Module]:
    """Return the class of all modules that keep running statistics of their batches.

    A list of the public subclasses would miss those of timm and of users.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    return _BatchNorm


def dropout_class() -> type[nn.modules.dropout._DropoutNd]:
    """Return the class of all dropouts, those of users included; only its subclasses are public."""
    from torch.nn.modules.dropout import _DropoutNd

    return _DropoutNd


def is_memory_free(memory: Tensor) -> bool:
    """Return whether nothing but one list and the caller refers to a tensor's storage; False if torch can't say.

    Autograd's graph may hold the memory without any Python object that could be counted.
    """
    import torch

    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(memory.untyped_storage()._cdata) <= 2


def antialiased_filters() -> dict[str, Callable[..., Any]]:
    """Return name -> torch's 8-bit antialiased resize, which writes into an existing tensor.

    `torch.nn.functional.interpolate` allocates its result, which would have to be copied into the batch.
    """
    import torch

    aten = torch.ops.aten
    return {"bilinear": aten._upsample_bilinear2d_aa.out, "bicubic": aten._upsample_bicubic2d_aa.out}


@contextmanager
def intercepted_operations(handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Call `handle(operation, args, kwargs)` in place of each of torch's operations within the block, backwards too.

    Public hooks see modules, not the operations of functions.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Intercepting(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # else the first operation imports the compiler

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handle(func, args, kwargs or {})

    with Intercepting():
        yield


def argument_names(operation: Any) -> list[str]:
    """Return the names of the arguments of one of torch's operations; its signature is public in no other form."""
    return [argument.name for argument in operation._schema.arguments]


# --- torch: compiling and loss scaling ---------------------------------------------------------------------


def is_compiler_imported() -> bool:
    """Return whether torch's compiler is imported; any public call would import it, which takes seconds."""
    return COMPILER in sys.modules


def raise_recompile_limit(limit: int) -> None:
    """Allow `limit` compiled variants of a function; further shapes would run uncompiled.

    `torch.compiler.config` has the first of these settings only in some versions, and the second in none.
    """
    from torch._dynamo import config  # slow to import

    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 16 * config.recompile_limit)


def has_loss_scale(scaler: torch.amp.GradScaler) -> bool:
    """Return whether a scaler has already scaled a loss. `get_scale` returns the initial scale before that too."""
    return scaler._scale is not None


def set_first_loss_scale(scaler: torch.amp.GradScaler, scale: float) -> None:
    """Set a scaler's initial scale; accelerate has already created the scaler, and `update` needs a scaled loss."""
    scaler._init_scale = scale


# --- torch: DataLoader's processes -------------------------------------------------------------------------


def is_torch_child_handler(handler: object) -> bool:
    """Return whether a handler of SIGCHLD is torch's, which raises in the main thread at any point of the program."""
    from torch.utils.data._utils import signal_handling

    return getattr(handler, "__module__", None) == signal_handling.__name__


@contextmanager
def no_torch_child_handler() -> Iterator[None]:
    """Keep torch from setting its SIGCHLD handler when the first DataLoader starts worker processes.

    There is no public switch, and the handler would raise in the middle of an update or a save.
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


def has_dead_worker(iterator: Any, seconds: float = 1.0) -> bool:
    """Return whether a process of an iterator over a DataLoader has died, or does within `seconds`.

    A process that is killed first closes its connections: torch, which receives a batch by one of them, then raises
    ConnectionError or EOFError and finds the process still alive. Only the iterator knows its processes.
    """
    sentinels = [worker.sentinel for worker in getattr(iterator, "_workers", ())]
    return bool(sentinels) and bool(wait(sentinels, seconds))


def shut_down_workers(loader: Any, iterator: Any = None) -> None:
    """End the worker processes of an iterator over a DataLoader, and those that the DataLoader keeps for its next one.

    The public way is to drop the last reference, which a traceback may hold, or a DataLoader with persistent workers.
    """
    kept: Any = getattr(loader, "_iterator", None)
    each: Any
    for each in (iterator, kept):
        if hasattr(each, "_shutdown_workers"):
            each._shutdown_workers()
    if hasattr(kept, "_shutdown_workers"):
        loader._iterator = None


def kill_workers(iterator: Any) -> None:
    """Kill the worker processes of an iterator over a DataLoader that no longer answer.

    torch would wait five seconds for each of them, and then forever at exit: a stopped process takes no SIGTERM.
    """
    for process in getattr(iterator, "_workers", ()):
        process.kill()
        process.join(1.0)
        if process.is_alive():
            forget_child(process)


def would_start_persistent_workers(loader: Any) -> bool:
    """Return whether the next iteration over a DataLoader starts worker processes that stay for those after it."""
    return getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is None


# --- accelerate, datasets, evaluate, huggingface_hub, timm, trackio ----------------------------------------


def reset_precision(precision: str) -> None:
    """Allow this process another mixed precision than its last run had; the process group stays.

    accelerate keeps the first precision for the whole process, and raises an error for another one.
    """
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()


def replace_prepared(accelerator: Accelerator, old: nn.Module, new: nn.Module) -> None:
    """Replace a prepared model in an accelerator, which would keep the old wrapper and its gradient buckets."""
    models = accelerator._models
    models[:] = [new if model is old else model for model in models]


def dataset_fingerprint(dataset: Any) -> str:
    """Return the fingerprint of a dataset, which changes with its content; datasets has no public access to it."""
    return str(dataset._fingerprint)


def dataset_indices(dataset: Any) -> Any:
    """Return the pyarrow table of row numbers of a filtered, shuffled or selected dataset, None for all rows in order.

    `flatten_indices` would write all images again.
    """
    return dataset._indices


def reset_metric(module: Any) -> None:
    """Reset a metric of evaluate after an error: it would keep the predictions that were added before."""
    module.data = module.writer = module.buf_writer = None


def hub_client_factory() -> Callable[[], Any]:
    """Return the default factory of huggingface_hub's HTTP client; only `set_client_factory` is public."""
    from huggingface_hub.utils._http import default_client_factory

    return default_client_factory


def timm_weights_filter(model: nn.Module) -> Callable[..., Any] | None:
    """Return timm's function that converts older weights to a model's parameter names and sizes, None if there is none.

    timm applies it only to weights that it loads itself.
    """
    found: Callable[..., Any] | None = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return found


def let_timm_posterize_by(posterize: Callable[..., Any]) -> None:
    """Let timm's policies call `posterize(image, bits, **rest)`.

    timm 1.0.31 keeps 0 bits of 0.3 % of the images of rand-m9-mstd0.5-inc1, for which Pillow 13 raises ValueError.
    """
    from timm.data import auto_augment

    for name in auto_augment.NAME_TO_OP:
        if name.startswith("Posterize"):
            auto_augment.NAME_TO_OP[name] = posterize


def trackio_last_step(run: Any) -> int:
    """Return the last step stored in a trackio run, -1 for none; a killed run may have lost some that were logged."""
    return int(getattr(run, "_next_step", 0)) - 1


def silence_libtiff() -> None:
    """Keep the libtiff that Pillow uses from printing warnings and errors to this process's standard error.

    Pillow has no switch, though it raises what matters. Where libtiff is linked into Pillow there is nothing to find.
    """
    import ctypes

    from PIL import _imaging

    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(_imaging.__file__)  # already loaded; symbols of the libraries that it needs are found too
        for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)


# --- Python ------------------------------------------------------------------------------------------------


def let_forkserver_exit() -> None:
    """Close the pipe that keeps this process's fork server alive, so that the server exits with its own parent.

    Every process of the server inherits the pipe to start further ones, and no public API closes it.
    """
    import os
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


def is_importing_main_script() -> bool:
    """Return whether spawn or forkserver has started this process, and it still imports the program's main script."""
    import multiprocessing

    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))


def forget_child(process: multiprocessing.process.BaseProcess) -> None:
    """Let this process exit before a child that can't be killed: Python waits for each at exit, without a limit."""
    from multiprocessing import process as module

    module._children.discard(process)  # type: ignore[attr-defined]
