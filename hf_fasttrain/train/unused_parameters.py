"""Finds the parameters that forward does not use, before the first step, with forward and backward of two images.

DistributedDataParallel waits for the gradient of each parameter; if one is missing, others stay unsynchronised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_fasttrain.data.loading.prefetch import Batch
from hf_fasttrain.data.loading.trees import map_leaves, num_images, rows
from hf_fasttrain.models.side_effects import eager, preserved_state, random_states, seeded_random_states
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.loss import Loss, loss_input
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.utils.errors import shortened
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.private_apis import has_gradient_hooks

TWO_ROWS = [0, -1]  # two images, as batch norm needs
MAX_ATTEMPTS = 4  # if forward is random or misses a parameter: layers may be skipped at random


@dataclass(frozen=True)
class ParameterUse:
    """Names of the parameters that got a gradient in no attempt, and in some attempts but not in all."""

    never: list[str]
    sometimes: list[str]

    def never_note(self, number: int) -> str:
        """Return a note on the parameters that are never used; the model has `number` trainable ones."""
        return (
            f"forward does not use {len(self.never):,} of the model's {number:,} trainable parameters "
            f"({shortened(self.never, 3)}): they are frozen"
        )

    def sometimes_note(self) -> str:
        """Return a note on the parameters that are not always used."""
        return (
            f"forward does not always use {shortened(self.sometimes, 3)}: DDP searches for unused parameters in each "
            "step, which takes time"
        )


@dataclass(frozen=True)
class _Attempt:
    used: list[bool]  # by parameter; empty for a process without images
    is_random: bool = False
    failed: bool = False


def find_parameter_use(
    model: nn.Module, loss: Loss, parameters: dict[str, nn.Parameter], batch: Batch | None, processes: Processes
) -> ParameterUse | None:
    """Return which `parameters` get no gradient in training mode, None if that could not be determined.

    `batch` is a micro-batch of the next step, None for a process without one. Noise of the same shape is passed through
    `model`, with the batch's targets if the loss is needed. Called by all processes, which agree on the result. A
    gradient of zeros counts as a gradient. Buffers, gradients and random states do not change.
    """
    used, unused = np.zeros(len(parameters), bool), np.zeros(len(parameters), bool)
    for seed in range(MAX_ATTEMPTS):
        attempt = _Attempt([]) if batch is None else _attempt(model, loss, list(parameters.values()), batch, seed)
        used_flags = attempt.used or [False] * len(parameters)
        unused_flags = [not is_used for is_used in attempt.used] or [False] * len(parameters)
        failed, is_random, *flags = processes.largest(attempt.failed, attempt.is_random, *used_flags, *unused_flags)
        if failed:
            return None
        used |= np.array(flags[: len(parameters)], bool)
        unused |= np.array(flags[len(parameters) :], bool)
        if not unused.any() and not (is_random and processes.is_distributed):
            break
    if not used.any():
        return None
    names = np.array(list(parameters))
    return ParameterUse(names[unused & ~used].tolist(), names[unused & used].tolist())


def _attempt(model: nn.Module, loss: Loss, parameters: Sequence[nn.Parameter], batch: Batch, seed: int) -> _Attempt:
    """Run forward and backward once; errors are left to the step, which reports them better or does not fail."""
    is_random = False

    def total() -> Tensor:
        nonlocal is_random
        images = map_leaves(_noise_like, rows(batch[0], TWO_ROWS, number))
        states = random_states(device)
        outputs = loss_input(model(images))
        is_random = random_states(device) != states
        if isinstance(outputs, Tensor) and not has_parameters:
            return outputs.sum()  # a loss depends on all of a tensor or on nothing
        return loss(outputs, rows(batch[1], TWO_ROWS, number))

    number = num_images(batch[0])
    device = parameters[0].device
    has_parameters = isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters())
    try:
        with seeded_random_states(device, seed), preserved_state(model), preserved_state(loss), eager():
            return _Attempt(_get_gradient(total, parameters), is_random)
    except Exception as error:  # noqa: BLE001 - a user's model may fail on noise or two images in any way
        has_no_memory = is_out_of_memory(error)
    if has_no_memory:
        free_cached_memory(device)  # outside of the handler, which keeps tensors alive
    return _Attempt([], failed=True)


def _get_gradient(total: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Return which parameters get a gradient of `total()`; their `grad` is restored.

    With a complete backward, since `torch.autograd.grad` does not support reentrant gradient checkpointing.
    """
    if any(map(has_gradient_hooks, parameters)):
        raise RuntimeError("gradient hooks may have side effects")
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        total().backward()
        return [parameter.grad is not None for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _noise_like(leaf: Any) -> Any:
    """Return noise with the shape of a floating-point tensor; other values of a batch are returned as they are."""
    return torch.randn_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
