"""Forward passes without side effects: random states, buffers, attributes and modes are restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_fasttrain.utils.private_apis import buffer_registry, is_compiler_imported


def random_states(device: torch.device) -> tuple[Any, ...]:
    """Return the random states that a forward pass may use, as comparable values."""
    numpy: Any = np.random.get_state()
    on_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes(), on_device, random.getstate(), numpy[1].tobytes(), numpy[2:]


@contextmanager
def seeded_random_states(device: torch.device, seed: int) -> Iterator[None]:
    """Seed all random states within the block, and restore the current ones afterwards."""
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
def preserved_state(module: Any) -> Iterator[None]:
    """Restore buffers and attributes of a module and its submodules afterwards; other objects are not touched."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    attributes = [(vars(m), dict(vars(m))) for m in modules]
    registries = [(registry, dict(registry)) for registry in map(buffer_registry, modules)]
    values = [(b, b.detach().clone()) for _, before in registries for b in before.values() if b is not None]
    try:
        yield
    finally:
        for current, before in (*attributes, *registries):  # a buffer may have been replaced
            for name in current.keys() - before.keys():
                del current[name]
            current.update(before)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


@contextmanager
def eager() -> Iterator[None]:
    """Disable compiling and cuDNN's search for algorithms, for batches of a few images that occur only once."""
    benchmark = torch.backends.cudnn.benchmark
    with ExitStack() as stack:
        if is_compiler_imported():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark


@contextmanager
def undisturbed(model: nn.Module, *others: nn.Module) -> Iterator[None]:
    """Pass a few images through modules, then restore their buffers, attributes and modes and all random states."""
    modes = [(module, module.training) for m in (model, *others) for module in m.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with ExitStack() as stack:
            for m in (model, *others):
                stack.enter_context(preserved_state(m))
            stack.enter_context(seeded_random_states(device, 0))
            stack.enter_context(eager())
            yield
    finally:
        for module, mode in modes:
            module.training = mode
