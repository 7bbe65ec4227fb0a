"""Clipping of gradients other than by their norm: by value, and adaptively by the norm of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

Clip = Callable[[Sequence[nn.Parameter]], None]  # changes the parameters' gradients


def clip_by_value(largest: float) -> Clip:
    """Return a clipping of every element of the gradients to the range from -largest to largest."""
    return lambda parameters: torch.nn.utils.clip_grad_value_(parameters, largest)


def clip_adaptively(factor: float, head: Sequence[nn.Parameter] = ()) -> Clip:
    """Return timm's adaptive clipping (AGC, arXiv 2102.06171), without the head, as in timm and the paper.

    The gradient of each unit (a row of a weight) has at most `factor` times the norm of its weights.
    """
    from timm.utils.agc import adaptive_clip_grad

    head_ids = {id(parameter) for parameter in head}
    return lambda parameters: adaptive_clip_grad([p for p in parameters if id(p) not in head_ids], factor)
