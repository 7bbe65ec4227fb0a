"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.utils.errors import RunError, shortened
from hf_fasttrain.utils.private_apis import foreach_copy, foreach_lerp, saved_tensors, uncompiled

TensorRef = tuple[dict[str, Any], str]  # (a module's tensors by name, one of the names)


class Ema:
    """Averages parameters and floating-point buffers after each step; other buffers are copied.

    With `warmup`, the decay at update t is at most (1 + t) / (10 + t), so that short runs are not dominated by
    their initial weights (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup
        self.attach(model)

    @torch.no_grad()
    def attach(self, model: nn.Module) -> None:
        """Average the weights of `model`, on its device; call it again after moving the model.

        Raises RunError if `model` has other tensors than the copied one.
        """
        averages, sources = _tensor_refs(self.module), _tensor_refs(model)
        _require_same(averages, sources)
        for name, ref in averages.items():
            _match_layout(_tensor(ref), _tensor(sources[name]))
        tensors = _unique({name: _tensor(ref) for name, ref in averages.items()})
        names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        self._averages = [tensors[name] for name in names]
        # Live tensors are looked up in each update: moving a module makes new ones, even from "cpu" to "cpu:0".
        self._sources = [sources[name] for name in names]
        self._copies: dict[
            torch.dtype, tuple[list[Tensor], list[TensorRef]]
        ] = {}  # a fused copy needs tensors of one type
        for name in sorted(tensors.keys() - set(names)):
            copies, refs = self._copies.setdefault(tensors[name].dtype, ([], []))
            copies.append(tensors[name])
            refs.append(sources[name])

    def decay_at(self, num_updates: int) -> float:
        """Return the decay of update `num_updates`, counted from 0."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Update the average with the model's current weights."""
        weights = [registry[key] for registry, key in self._sources]
        foreach_lerp(self._averages, weights, 1 - self.decay_at(num_updates))
        for copies, refs in self._copies.values():
            foreach_copy(copies, [_tensor(ref) for ref in refs])

    def slow_note(self, num_updates: int) -> str | None:
        """Return a note if the average covers more updates than the training has, else None."""
        horizon = round(1 / (1 - self.decay), 6) if self.decay < 1 else float("inf")
        if self.warmup or horizon <= num_updates:
            return None
        return (
            f"the moving average covers {horizon:,.0f} updates (ema.decay={self.decay:g}), but training makes only "
            f"{num_updates:,}: the averaged weights, which are evaluated and saved, still contain "
            f"{self.decay**num_updates:.0%} of the initial weights; set ema.warmup=true (in Python: "
            "Ema(..., warmup=True)) or a lower ema.decay"
        )


def _tensor_refs(model: nn.Module) -> dict[str, TensorRef]:
    """Return name -> reference of the tensors in a state dict; those of shared modules once."""
    refs: dict[str, TensorRef] = {}
    for prefix, module in uncompiled(model).named_modules():
        for registry, key in saved_tensors(module):
            refs[f"{prefix}.{key}".lstrip(".")] = registry, key
    return refs


def _unique(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor under one name only: a shared tensor must not be averaged twice in an update."""
    names = {(tensor.data_ptr(), tensor.shape, tensor.stride()): name for name, tensor in tensors.items()}
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    return {name: tensors[name] for name in {**dict.fromkeys(names.values()), **dict.fromkeys(empty)}}


def _tensor(ref: TensorRef) -> Tensor:
    registry, key = ref
    tensor: Tensor = registry[key]
    return tensor


def _require_same(averages: dict[str, TensorRef], sources: dict[str, TensorRef]) -> None:
    names = averages.keys() & sources.keys()
    different = sorted(
        {*(averages.keys() ^ sources.keys()), *(n for n in names if _shape(averages[n]) != _shape(sources[n]))}
    )
    if different:
        raise RunError(
            f"ema averages another model: {len(different)} tensors are not in both or differ in shape "
            f"({shortened(different, 3)}); create it from the model that is trained: ema=Ema(model, decay)"
        )


def _shape(ref: TensorRef) -> torch.Size:
    return _tensor(ref).shape


def _match_layout(tensor: Tensor, source: Tensor) -> None:
    """Move a tensor to the device, type and memory layout of another one."""
    if (tensor.device, tensor.dtype, tensor.stride()) != (source.device, source.dtype, source.stride()):
        tensor.data = torch.empty_like(source).copy_(tensor)
