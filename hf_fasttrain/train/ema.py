"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.utils.errors import RunError, shortened
from hf_fasttrain.utils.private_apis import foreach_copy, foreach_lerp, saved_tensors, uncompiled

Place = tuple[dict[str, Any], str]  # a module's own tensors by name, and which of them


class Ema:
    """Averages parameters and floating-point buffers after each step; other buffers are copied.

    With `warmup`, the decay at update t is at most (1 + t) / (10 + t), so that short runs are not left at their
    initial weights (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup
        self.attach(model)

    @torch.no_grad()
    def attach(self, model: nn.Module) -> None:
        """Average the weights of `model`, and lie where they lie; to be called again after the model was moved.

        Raises RunError if `model` is not the one that was copied.
        """
        averaged, live = _places(self.module), _places(model)
        _require_same(averaged, live)
        for name, place in averaged.items():
            _lie_like(_tensor(place), _tensor(live[name]))
        tensors = _each_once({name: _tensor(place) for name, place in averaged.items()})
        names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        self._averaged = [tensors[name] for name in names]
        # Live tensors are looked up in each update: moving a module makes new ones, even from "cpu" to "cpu:0".
        self._live = [live[name] for name in names]
        self._copied: dict[torch.dtype, tuple[list[Tensor], list[Place]]] = {}  # a fused copy takes tensors of a type
        for name in sorted(tensors.keys() - set(names)):
            copies, places = self._copied.setdefault(tensors[name].dtype, ([], []))
            copies.append(tensors[name])
            places.append(live[name])

    def decay_at(self, num_updates: int) -> float:
        """Return the share of the old average kept by update number `num_updates`, counted from 0."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Move the average towards the model's present weights."""
        live = [registry[key] for registry, key in self._live]
        foreach_lerp(self._averaged, live, 1 - self.decay_at(num_updates))
        for copies, places in self._copied.values():
            foreach_copy(copies, [_tensor(place) for place in places])

    def slow_note(self, num_updates: int) -> str | None:
        """Return what to say if the average looks back over more updates than the training makes, else None."""
        horizon = round(1 / (1 - self.decay), 6) if self.decay < 1 else float("inf")
        if self.warmup or horizon <= num_updates:
            return None
        return (
            f"the moving average looks back over {horizon:,.0f} updates (ema.decay={self.decay:g}), and training makes "
            f"{num_updates:,}: {self.decay**num_updates:.0%} of the weights that are evaluated and saved are those it "
            "began with; set ema.warmup=true (in Python: Ema(..., warmup=True)) or a lower ema.decay"
        )


def _places(model: nn.Module) -> dict[str, Place]:
    """Return name -> place of the tensors that a state dict holds; those of shared modules once."""
    found: dict[str, Place] = {}
    for prefix, module in uncompiled(model).named_modules():
        for registry, key in saved_tensors(module):
            found[f"{prefix}.{key}".lstrip(".")] = registry, key
    return found


def _each_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by one of their names: a shared one must not be averaged twice in an update."""
    names = {(tensor.data_ptr(), tensor.shape, tensor.stride()): name for name, tensor in tensors.items()}
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    return {name: tensors[name] for name in {**dict.fromkeys(names.values()), **dict.fromkeys(empty)}}


def _tensor(place: Place) -> Tensor:
    registry, key = place
    tensor: Tensor = registry[key]
    return tensor


def _require_same(averaged: dict[str, Place], live: dict[str, Place]) -> None:
    names = averaged.keys() & live.keys()
    other = sorted({*(averaged.keys() ^ live.keys()), *(n for n in names if _shape(averaged[n]) != _shape(live[n]))})
    if other:
        raise RunError(
            f"ema averages another model: {len(other)} tensors are not in both or differ in shape "
            f"({shortened(other, 3)}); make it from the model that is trained: ema=Ema(model, decay)"
        )


def _shape(place: Place) -> torch.Size:
    return _tensor(place).shape


def _lie_like(tensor: Tensor, live: Tensor) -> None:
    """Move a tensor to the device, type and memory layout of another one."""
    if (tensor.device, tensor.dtype, tensor.stride()) != (live.device, live.dtype, live.stride()):
        tensor.data = torch.empty_like(live).copy_(tensor)
