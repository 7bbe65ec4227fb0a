"""Forwards that leave no trace: random states, buffers, attributes and modes are as they were before them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_fasttrain.utils.private_apis import buffer_registry


def random_states(device: torch.device) -> tuple[Any, ...]:
    """Return the random states that a forward may draw from, comparable."""
    numpy: Any = np.random.get_state()
    on_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes(), on_device, random.getstate(), numpy[1].tobytes(), numpy[2:]


@contextmanager
def random_states_kept(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the random states, and put back the present ones afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def unchanged(module: Any) -> Iterator[None]:
    """Put back the buffers and attributes of a module and those within it; what is no module is left alone."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    attributes = [(vars(each), dict(vars(each))) for each in modules]
    registries = [(registry, dict(registry)) for registry in map(buffer_registry, modules)]
    values = [(b, b.detach().clone()) for _, before in registries for b in before.values() if b is not None]
    try:
        yield
    finally:
        for live, before in (*attributes, *registries):  # a buffer may have been replaced
            for name in live.keys() - before.keys():
                del live[name]
            live.update(before)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
