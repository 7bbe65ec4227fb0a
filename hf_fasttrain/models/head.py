"""The classification head: found in a model, kept if its classes are those of the dataset, else zero-initialised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_fasttrain.data.source.classes import match_names
from hf_fasttrain.utils.errors import ModelError, shortened

HeadChoice = Literal["auto", "keep", "new"]


def timm_head_names(model: nn.Module, num_classes: int = 0) -> list[str]:
    """Return the prefixes of the head's parameters from timm's configuration, or else by shape.

    `num_classes` is used if the model has no such attribute.
    """
    config: Any = getattr(model, "default_cfg", None) or {}
    classifier = config.get("classifier")
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    return names or _last_layer_of(model, int(getattr(model, "num_classes", 0) or num_classes))


def transformers_head_names(model: nn.Module) -> list[str]:
    """Return the prefixes of the head's parameters in a classifier of transformers.

    Heads are called classifier, head, fc, dist_head and so on. The head is a sibling of the base model with one output
    per class.
    """
    if isinstance(inner := getattr(model, "timm_model", None), nn.Module):
        return [f"timm_model.{name}" for name in timm_head_names(inner)]
    num_classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    base = getattr(model, "base_model", model)
    children = [(name, child) for name, child in model.named_children() if child is not base]
    heads = [name for name, child in children if _output_layer(child, num_classes) is not None]
    if base is model:  # no base model: the head is the last module
        heads = heads[-1:]
    return heads or _last_layer_of(model, num_classes)


def output_layers(model: nn.Module, head_names: Iterable[str], num_classes: int) -> list[str]:
    """Return the names of the layers that compute the logits: the last one with `num_classes` outputs of each head."""
    modules = dict(model.named_modules())
    layers = {name: _output_layer(modules[name], num_classes) for name in head_names if name in modules}
    return [".".join(filter(None, (name, inner))) for name, inner in layers.items() if inner is not None]


def _last_layer_of(model: nn.Module, num_classes: int) -> list[str]:
    name = _output_layer(model, num_classes)
    return [name] if name else []


def _output_layer(module: nn.Module, num_classes: int) -> str | None:
    """Return the name of the last linear or convolutional layer with `num_classes` outputs, "" for `module`."""
    last = None
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim in (2, 4) and len(weight) == num_classes:
            last = name
    return last


@dataclass(frozen=True)
class WeightsSource:
    """The origin of weights: its name in messages, its class names and its architecture, None if unknown."""

    name: str
    class_names: Sequence[str] | None = None
    architecture: str | None = None


@torch.no_grad()
def zero_output_layers(model: nn.Module, layers: Iterable[str]) -> None:
    """Initialise output layers with zeros, so that all classes are equally likely at first.

    The first loss is that of uniform logits, for any feature size, number of classes and loss, without random numbers.
    The first step changes only the head, towards the classes' mean features; a random head would backpropagate noise
    into the pretrained weights at first.
    """
    for name in layers:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.zero_()


def class_order(theirs: Sequence[str] | None, ours: Sequence[str]) -> list[int] | None:
    """Return the row of each of our classes in the weights' head; None unless both have the same class names.

    Different spellings match: Rose and rose, 7 and 07.
    """
    if theirs is None or len(theirs) != len(ours):
        return None
    matched = match_names(ours, theirs)
    if matched.unknown or len(matched.numbers) != len(ours):
        return None
    return [matched.numbers[name] for name in ours]


def keeps_head(
    choice: HeadChoice, source: WeightsSource, class_names: Sequence[str], *, fits: bool, head_text: str
) -> bool:
    """Return whether the head of weights is kept. Raises ModelError if model.head=keep is impossible.

    `fits`: whether the shapes agree; `head_text`: describes the head in the weights for the message.
    """
    if choice == "keep" and not fits:
        raise ModelError(
            f"model.head=keep: {source.name} has {head_text}, the dataset has {len(class_names)} classes; set "
            "model.head to auto or new, or give weights for these classes"
        )
    return choice == "keep" or (choice == "auto" and fits and class_order(source.class_names, class_names) is not None)


@torch.no_grad()
def reorder_classes(weights: dict[str, Tensor], names: Iterable[str], order: Sequence[int] | None) -> None:
    """Reorder the rows of a head's tensors in place, unless `order` is None."""
    for name in names if order is not None else ():
        assert order is not None
        weights[name] = weights[name][list(order)]


def kept_note(source: WeightsSource, class_names: Sequence[str]) -> str:
    """Return the note on a head that is kept."""
    order = class_order(source.class_names, class_names)
    if order is not None:
        renamed = match_names(class_names, source.class_names or ()).describe()
        written = f", written differently ({renamed})" if renamed else ""
        moved = "" if order == sorted(order) else ", in another order: its rows are reordered"
        return f"model.head: kept, because {source.name} has the same class names{written}{moved}"
    reason = _mismatch_reason(source, class_names)
    return f"model.head=keep: kept, though {reason}; output 0 now means '{class_names[0]}', and so on"


def new_note(
    choice: HeadChoice,
    source: WeightsSource,
    class_names: Sequence[str],
    new: Sequence[str],
    tensors: Mapping[str, Tensor],
    *,
    fits: bool,
    head_text: str,
) -> str:
    """Return the note on a new head; `new` names the model's tensors that were not loaded.

    `fits`: whether the weights' head, described by `head_text`, could have been kept.
    """
    is_unnamed = source.class_names is None
    reason = f"because {_mismatch_reason(source, class_names)}"
    if choice == "new":
        reason = "since model.head=new"
    elif is_unnamed and not fits:
        reason = f"because {source.name} has {head_text}, the dataset has {len(class_names):,} classes"
    hint = "; model.head=keep keeps it as it is" if choice == "auto" and is_unnamed and fits else ""
    return f"model.head: new, all zeros, {reason}: {describe_share(new, tensors)} not loaded{hint}"


def _mismatch_reason(source: WeightsSource, class_names: Sequence[str]) -> str:
    theirs = source.class_names
    if theirs is None:
        return f"{source.name} does not say which classes its head is for"
    if len(theirs) != len(class_names):
        return f"{source.name} is for {len(theirs):,} classes, the dataset has {len(class_names):,}"
    others = [name for name in theirs if name not in set(class_names)] or list(theirs)
    return f"{source.name} is for other classes ({shortened(others, 3)})"


def describe_share(names: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """Return the number of listed tensors, their share of the model's weights, and their names, as text."""
    share = sum(tensors[name].numel() for name in names) / max(1, sum(tensor.numel() for tensor in tensors.values()))
    percent = f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"
    return f"{len(names)} of {len(tensors)} tensors ({percent} of the weights: {shortened(names, 4)})"
