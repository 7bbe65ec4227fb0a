"""Optimizers whose `step` calls a closure that gives the step's gradients once more: SAM, ASAM, LBFGS."""

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


def wants_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's `step` can't do without a closure.

    Where the argument has no default (LBFGS), where the optimizer has the two halves of a step (`first_step` and
    `second_step`, as the published SAM and ASAM have them), or `needs_closure = True`.
    """
    if hasattr(optimizer, "needs_closure"):
        return bool(optimizer.needs_closure)
    step = inspect.unwrap(type(optimizer).step)
    closure = inspect.signature(step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return required or (hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"))


def wants_graph(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer differentiates the gradients, as timm marks it (adahessian)."""
    return bool(getattr(optimizer, "is_second_order", False))


def twice_differentiable() -> AbstractContextManager[None]:
    """Let attention be computed by a kernel that has a second derivative: the fused ones have none."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def kept_graph() -> Iterator[None]:
    """Let backward keep its graph in the gradients without a warning: the update drops them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*create_graph=True will create a reference cycle")
        yield


@contextmanager
def still_buffers(norms: Sequence[nn.Module], loss: LossState | None, optimizer: Any) -> Iterator[None]:
    """Restore running statistics and a loss's buffers afterwards, unless the optimizer has `moves_batch_norm = True`.

    The published SAM does so: statistics are of the weights that are kept, not of those that it tries.
    """
    if not (norms or loss) or getattr(optimizer, "moves_batch_norm", False):
        yield
        return
    of_loss = loss.copy() if loss is not None else []
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        if loss is not None:
            loss.put_back(of_loss)


class Backup:
    """Weights and optimizer state before an update with a closure, which changes both before it calls the closure."""

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._weights = [parameter.detach().clone() for parameter in self._parameters]
        optimizers = [optimizer, *inner_optimizers(optimizer).values()]
        self._states = [(each, {p: _copied(values) for p, values in each.state.items()}) for each in optimizers]

    @torch.no_grad()
    def restore(self) -> None:
        """Put weights and states back."""
        for parameter, weight in zip(self._parameters, self._weights, strict=True):
            parameter.copy_(weight)
        for optimizer, state in self._states:
            optimizer.state.clear()
            optimizer.state.update(state)


def _copied(values: Any) -> Any:
    """Return a copy of a parameter's state; its tensors are copied on their device."""
    if isinstance(values, dict):
        return {name: _copied(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_copied(value) for value in values]
    return values.detach().clone() if isinstance(values, Tensor) else copy.deepcopy(values)
