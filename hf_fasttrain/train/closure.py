"""Support for optimizers whose `step` calls a closure that recomputes the gradients: SAM, ASAM, LBFGS."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_fasttrain.train.optim import inner_optimizers

if TYPE_CHECKING:
    from hf_fasttrain.train.checkpoint_state import LossState


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's `step` needs a closure.

    That is so if the argument has no default (LBFGS), if there are `first_step` and `second_step` (the published SAM
    and ASAM), or if `needs_closure = True`.
    """
    if hasattr(optimizer, "needs_closure"):
        return bool(optimizer.needs_closure)
    step = inspect.unwrap(type(optimizer).step)
    closure = inspect.signature(step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return required or (hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"))


def needs_graph(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer differentiates the gradients, by timm's attribute (adahessian)."""
    return bool(getattr(optimizer, "is_second_order", False))


def twice_differentiable() -> AbstractContextManager[None]:
    """Compute attention with a kernel that has a second derivative: the fused ones have none."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def no_graph_warning() -> Iterator[None]:
    """Silence torch's warning on gradients that keep their graph: the update drops them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*create_graph=True will create a reference cycle")
        yield


@contextmanager
def preserved_buffers(norms: Sequence[nn.Module], loss: LossState | None, optimizer: Any) -> Iterator[None]:
    """Restore running statistics and a loss's buffers afterwards, unless the optimizer has `moves_batch_norm = True`.

    As in the published SAM, statistics then belong to the weights that are kept, not to those it tries.
    """
    if not (norms or loss) or getattr(optimizer, "moves_batch_norm", False):
        yield
        return
    loss_buffers = loss.copy() if loss is not None else []
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
        if loss is not None:
            loss.restore_buffers(loss_buffers)


class Backup:
    """Weights and optimizer state before an update with a closure, which changes both before it calls the closure."""

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._weights = [parameter.detach().clone() for parameter in self._parameters]
        optimizers = [optimizer, *inner_optimizers(optimizer).values()]
        self._states = [(o, {p: _copy(values) for p, values in o.state.items()}) for o in optimizers]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore weights and states."""
        for parameter, weight in zip(self._parameters, self._weights, strict=True):
            parameter.copy_(weight)
        for optimizer, state in self._states:
            optimizer.state.clear()
            optimizer.state.update(state)


def _copy(values: Any) -> Any:
    """Return a copy of a parameter's state; its tensors are copied on their device."""
    if isinstance(values, dict):
        return {name: _copy(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_copy(value) for value in values]
    return values.detach().clone() if isinstance(values, Tensor) else copy.deepcopy(values)
