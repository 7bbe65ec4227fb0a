"""Pretrained weights: loaded into a model for other classes or another image size, with a note on what is new."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_fasttrain.models.head import (
    HeadChoice,
    WeightsSource,
    class_order,
    describe_share,
    keeps_head,
    kept_note,
    new_note,
    reorder_classes,
    zero_output_layers,
)
from hf_fasttrain.models.weights import convert, is_within, load_fitting
from hf_fasttrain.utils.errors import ModelError

Note = Callable[[str], None]
MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens in a position embedding


@dataclass(frozen=True)
class Head:
    """A model's head: prefixes of its parameters, its output layers, its classes, and the recipe's model.head."""

    names: Sequence[str]
    layers: Sequence[str]
    class_names: Sequence[str]
    choice: HeadChoice = "auto"

    def outputs(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the output layers' tensors; their first dimension is the classes."""
        return [name for name in tensors if is_within(name, self.layers)]


def load_pretrained(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: WeightsSource,
    head: Head,
    note: Note,
    *,
    absent: Sequence[str] = (),
) -> None:
    """Load weights of the same architecture, possibly for other classes or another image size, into a model.

    `absent` names tensors that the weights lack. `note` gets a message on everything that is not loaded. Raises
    ModelError for weights of another model, and for a head that can't be kept with model.head=keep.
    """
    _require_output_layers(model, head)
    weights = convert(weights, model)
    state = model.state_dict()
    for message in resize_positions(weights, state):
        note(f"model.pretrained: {message}")
    outputs = head.outputs(state)
    fits = all(name in weights and weights[name].shape == state[name].shape for name in outputs)
    head_text = _head_in(weights, outputs)
    kept = keeps_head(head.choice, source, head.class_names, fits=fits, head_text=head_text)
    if kept:
        reorder_classes(weights, outputs, class_order(source.class_names, head.class_names))
    new = _drop(weights, state, head, () if kept else head.layers)
    _require_most(state, [name for name in absent if name not in new], source)
    load_fitting(model, weights, source.name, may_lack=[*new, *absent], architecture=source.architecture)
    if kept:
        _note_kept(model, source, head, new, note)
    else:
        zero_output_layers(model, head.layers)
        note(new_note(head.choice, source, head.class_names, new, model.state_dict(), fits=fits, head_text=head_text))
    others = [name for name in absent if name not in new]
    if others:
        note(f"model.pretrained: {describe_share(others, state)} are not in {source.name} and start at random")


def adapt_published_head(model: nn.Module, source: WeightsSource, head: Head, note: Note, *, loaded: bool) -> None:
    """Keep the head that timm has `loaded` with the published weights, or replace it by zeros."""
    _require_output_layers(model, head)
    state = model.state_dict()
    outputs = head.outputs(state)
    head_text = "a head of another number of classes, or none"
    kept = keeps_head(head.choice, source, head.class_names, fits=loaded, head_text=head_text)
    if kept:
        weights = {name: state[name].clone() for name in outputs}
        reorder_classes(weights, outputs, class_order(source.class_names, head.class_names))
        model.load_state_dict(weights, strict=False)
    if kept:
        _note_kept(model, source, head, [], note)
    else:
        zero_output_layers(model, head.layers)
        note(new_note(head.choice, source, head.class_names, outputs, state, fits=loaded, head_text=head_text))


def _note_kept(model: nn.Module, source: WeightsSource, head: Head, new: Sequence[str], note: Note) -> None:
    note(kept_note(source, head.class_names))
    if new:
        note(f"model.head: {describe_share(new, model.state_dict())} are not in {source.name} and start at random")


def _require_output_layers(model: nn.Module, head: Head) -> None:
    if not head.layers and head.choice != "keep":
        raise ModelError(
            f"model.pretrained: in {type(model).__name__} no layer with {len(head.class_names)} outputs was found as "
            "the head; with model.head=keep all weights are loaded as they are"
        )


def _head_in(weights: Mapping[str, Tensor], outputs: Sequence[str]) -> str:
    """Return a description of the weights' head."""
    rows = [len(weights[name]) for name in outputs if name in weights and weights[name].ndim]
    return f"a head for {rows[0]:,} classes" if rows else "no head"


def _drop(weights: dict[str, Tensor], state: Mapping[str, Tensor], head: Head, layers: Sequence[str]) -> list[str]:
    """Remove the tensors of `layers` and misfits of the head from `weights`; return the names that are not loaded."""
    for name in list(weights):
        misfit = name not in state or state[name].shape != weights[name].shape
        if is_within(name, layers) or (misfit and is_within(name, head.names)):
            del weights[name]
    return [name for name in state if name not in weights and is_within(name, [*head.names, *layers])]


def _require_most(state: Mapping[str, Tensor], absent: Sequence[str], source: WeightsSource) -> None:
    if sum(state[name].numel() for name in absent if name in state) > sum(t.numel() for t in state.values()) / 2:
        raise ModelError(f"{source.name}: weights of another model: {describe_share(absent, state)} are not in them")


def resize_positions(weights: dict[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Resize absolute position embeddings on square grids to the model's size; return a message for each."""
    messages = []
    for name, tensor in state.items():
        pretrained = weights.get(name)
        if pretrained is None or pretrained.shape == tensor.shape or not _holds_positions(name):
            continue
        resized = _resized(pretrained, tensor)
        if resized is not None:
            weights[name] = resized
            messages.append(f"{name} is resized from {pretrained.shape[-2]:,} to {tensor.shape[-2]:,} positions")
    return messages


def _holds_positions(name: str) -> bool:
    return any(part in name for part in ("position_embedding", "pos_embed"))


def _resized(pretrained: Tensor, target: Tensor) -> Tensor | None:
    """Return an embedding (1, N, D) or (N, D) resized to the shape of `target`, None if they are not square grids."""
    from timm.layers import resample_abs_pos_embed

    if pretrained.ndim not in (2, 3) or pretrained.ndim != target.ndim or pretrained.shape[-1] != target.shape[-1]:
        return None
    for prefix in range(MAX_PREFIX_TOKENS):
        source_size, target_size = pretrained.shape[-2] - prefix, target.shape[-2] - prefix
        if min(source_size, target_size) >= 1 and _is_square(source_size) and _is_square(target_size):
            table = pretrained.reshape(1, *pretrained.shape[-2:]).float()
            with torch.no_grad():
                resized = resample_abs_pos_embed(table, [math.isqrt(target_size)] * 2, num_prefix_tokens=prefix)
            return resized.reshape(target.shape)
    return None


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
