"""Finds the parameters that forward does not use, before the first step, by forwards and backwards of two images.

DistributedDataParallel waits for the gradient of each parameter: one that never comes leaves gradients unsynchronised.
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

TWO = [0, -1]  # images: batch norm needs as many
TRIES = 4  # where forward draws random numbers or misses a parameter: layers may be skipped at random


@dataclass(frozen=True)
class ParameterUse:
    """Names of the parameters that got a gradient in no try, and in some tries but not in all."""

    never: list[str]
    sometimes: list[str]

    def never_note(self, number: int) -> str:
        """Return a note on the parameters that are never used; the model has `number` trainable ones."""
        return (
            f"forward does not use {len(self.never):,} of the model's {number:,} trainable parameters "
            f"({shortened(self.never, 3)}): frozen, they stay as they are"
        )

    def sometimes_note(self) -> str:
        """Return a note on the parameters that are not always used."""
        return (
            f"forward does not always use {shortened(self.sometimes, 3)}: the processes search for unused parameters "
            "in each step, which takes time"
        )


@dataclass(frozen=True)
class _Try:
    used: list[bool]  # by parameter; empty for a process without images
    is_random: bool = False
    failed: bool = False


def find_use(
    model: nn.Module, loss: Loss, parameters: dict[str, nn.Parameter], batch: Batch | None, processes: Processes
) -> ParameterUse | None:
    """Return which `parameters` get no gradient in training mode, None if that could not be determined.

    `batch` is a micro-batch of the step that comes, None for a process that has none: noise of its kind goes through
    `model`, and its targets are used if the loss is needed. Called by all processes, which agree on the answer. A
    gradient of zeros is one. Buffers, gradients and random states stay as they were.
    """
    used, missed = np.zeros(len(parameters), bool), np.zeros(len(parameters), bool)
    for seed in range(TRIES):
        attempt = _Try([]) if batch is None else _attempt(model, loss, list(parameters.values()), batch, seed)
        gets = attempt.used or [False] * len(parameters)
        lacks = [not is_used for is_used in attempt.used] or [False] * len(parameters)
        failed, is_random, *flags = processes.largest(attempt.failed, attempt.is_random, *gets, *lacks)
        if failed:
            return None
        used |= np.array(flags[: len(parameters)], bool)
        missed |= np.array(flags[len(parameters) :], bool)
        if not missed.any() and not (is_random and processes.is_distributed):
            break
    if not used.any():
        return None
    names = np.array(list(parameters))
    return ParameterUse(names[missed & ~used].tolist(), names[missed & used].tolist())


def _attempt(model: nn.Module, loss: Loss, parameters: Sequence[nn.Parameter], batch: Batch, seed: int) -> _Try:
    """Make a forward and a backward; what fails here is left to the step, which says it better or does not fail."""
    is_random = False

    def total() -> Tensor:
        nonlocal is_random
        images = map_leaves(_noise_like, rows(batch[0], TWO, number))
        before = random_states(device)
        outputs = loss_input(model(images))
        is_random = random_states(device) != before
        if isinstance(outputs, Tensor) and not has_parameters:
            return outputs.sum()  # a loss reaches all of a tensor or nothing
        return loss(outputs, rows(batch[1], TWO, number))

    number = num_images(batch[0])
    device = parameters[0].device
    has_parameters = isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters())
    try:
        with seeded_random_states(device, seed), preserved_state(model), preserved_state(loss), eager():
            return _Try(_get_gradient(total, parameters), is_random)
    except Exception as error:  # noqa: BLE001 - whatever noise and two images may bring about in a user's model
        short = is_out_of_memory(error)
    if short:
        free_cached_memory(device)  # outside of the handler, which holds what failed
    return _Try([], failed=True)


def _get_gradient(total: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Return which parameters get a gradient of `total()`; their `grad` is restored.

    By a whole backward: `torch.autograd.grad` does not see into gradient checkpointing of the older kind.
    """
    if any(map(has_gradient_hooks, parameters)):
        raise RuntimeError("hooks on gradients may train")
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
    """Return noise of the shape of a tensor of fractions; what else a batch has stays."""
    return torch.randn_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
