"""The classification head: found in a model, kept where its classes are the data set's, else begun at zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_fasttrain.data.source.classes import match_names
from hf_fasttrain.utils.errors import ModelError, shortened

HeadChoice = Literal["auto", "keep", "new"]


# --- finding -----------------------------------------------------------------------------------------------


def timm_head_names(model: nn.Module) -> list[str]:
    """Return the prefixes of the head's parameters as timm's configuration lists them, else found by shape."""
    config: Any = getattr(model, "default_cfg", None) or {}
    listed = config.get("classifier")
    names = [listed] if isinstance(listed, str) else list(listed or ())
    return names or _last_layer_of(model, int(getattr(model, "num_classes", 0)))


def transformers_head_names(model: nn.Module) -> list[str]:
    """Return the prefixes of the head's parameters in a classifier of transformers.

    Its classes call the head classifier, head, fc, dist_head and more. It is what stands beside the base model and
    gives one number for each class.
    """
    if isinstance(inner := getattr(model, "timm_model", None), nn.Module):
        return [f"timm_model.{name}" for name in timm_head_names(inner)]
    num_classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    base = getattr(model, "base_model", model)
    beside = [(name, child) for name, child in model.named_children() if child is not base]
    found = [name for name, child in beside if _output_layer(child, num_classes) is not None]
    if base is model:  # its blocks stand beside each other, the head last
        found = found[-1:]
    return found or _last_layer_of(model, num_classes)


def output_layers(model: nn.Module, head_names: Iterable[str], num_classes: int) -> list[str]:
    """Return the names of the layers that give the logits: the last one with `num_classes` outputs of each head."""
    modules = dict(model.named_modules())
    found = {name: _output_layer(modules[name], num_classes) for name in head_names if name in modules}
    return [".".join(filter(None, (name, inner))) for name, inner in found.items() if inner is not None]


def _last_layer_of(model: nn.Module, num_classes: int) -> list[str]:
    found = _output_layer(model, num_classes)
    return [found] if found else []


def _output_layer(module: nn.Module, num_classes: int) -> str | None:
    """Return the name of the last linear or convolutional layer with `num_classes` outputs, "" for `module`."""
    found = None
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim in (2, 4) and len(weight) == num_classes:
            found = name
    return found


# --- keeping or beginning anew -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where weights come from: how messages call it, its class names and its model's name, None if it has none."""

    name: str
    class_names: Sequence[str] | None = None
    architecture: str | None = None


@torch.no_grad()
def zero_output_layers(model: nn.Module, layers: Iterable[str]) -> None:
    """Set output layers to zero, so that all classes are equally likely at first.

    The first loss is that of uniform logits whatever the features' size, the number of classes and the loss, and needs
    no random numbers. The first step moves the head alone, towards the classes' mean features; a random head would
    send noise through the pretrained weights until then.
    """
    for name in layers:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.zero_()


def class_order(theirs: Sequence[str] | None, ours: Sequence[str]) -> list[int] | None:
    """Return for each of our classes its row in the weights' head; None unless both have the same names.

    Names that mean the same are the same: Rose and rose, 7 and 07.
    """
    if theirs is None or len(theirs) != len(ours):
        return None
    matched = match_names(ours, theirs)
    if matched.unknown or len(matched.numbers) != len(ours):
        return None
    return [matched.numbers[name] for name in ours]


def keeps_head(wish: HeadChoice, source: Source, class_names: Sequence[str], *, fits: bool, found: str) -> bool:
    """Return whether a head of weights is kept; ModelError if model.head=keep asks for what can't be.

    `fits` is whether the shapes agree, `found` what the weights have in the head's place.
    """
    if wish == "keep" and not fits:
        raise ModelError(
            f"model.head=keep: {source.name} has {found}, the data set has {len(class_names)} classes; set model.head "
            "to auto or new, or take weights of these classes"
        )
    return wish == "keep" or (wish == "auto" and fits and class_order(source.class_names, class_names) is not None)


@torch.no_grad()
def reorder_classes(weights: dict[str, Tensor], names: Iterable[str], order: Sequence[int] | None) -> None:
    """Bring the rows of a head's tensors into another order of the classes, if there is one."""
    for name in names if order is not None else ():
        assert order is not None
        weights[name] = weights[name][list(order)]


def kept_note(source: Source, class_names: Sequence[str]) -> str:
    """Return what to say of a head that is kept."""
    order = class_order(source.class_names, class_names)
    if order is not None:
        renamed = match_names(class_names, source.class_names or ()).describe()
        written = f", written differently ({renamed})" if renamed else ""
        moved = "" if order == sorted(order) else ", in another order: its rows are moved"
        return f"model.head: kept, because {source.name} has the same class names{written}{moved}"
    why = _why_not_same(source, class_names)
    return f"model.head=keep: kept, though {why}; output 0 now means '{class_names[0]}', and so on"


def new_note(
    wish: HeadChoice,
    source: Source,
    class_names: Sequence[str],
    new: Sequence[str],
    tensors: Mapping[str, Tensor],
    *,
    fits: bool,
    found: str,
) -> str:
    """Return what to say of a head that begins at zero; `new` names those of a model's tensors that were not loaded.

    `fits` is whether the head that was `found` in the weights could have been kept.
    """
    unnamed = source.class_names is None
    why = f"because {_why_not_same(source, class_names)}"
    if wish == "new":
        why = "as model.head=new asks for"
    elif unnamed and not fits:
        why = f"because {source.name} has {found}, the data set has {len(class_names):,} classes"
    hint = "; model.head=keep takes it over as it is" if wish == "auto" and unnamed and fits else ""
    return f"model.head: new, all zeros, {why}: {share_of(new, tensors)} not loaded{hint}"


def _why_not_same(source: Source, class_names: Sequence[str]) -> str:
    theirs = source.class_names
    if theirs is None:
        return f"{source.name} does not say which classes its head is for"
    if len(theirs) != len(class_names):
        return f"{source.name} is for {len(theirs):,} classes, the data set has {len(class_names):,}"
    others = [name for name in theirs if name not in set(class_names)] or list(theirs)
    return f"{source.name} is for other classes ({shortened(others, 3)})"


def share_of(names: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """Return how many of a model's tensors are listed, their share of its numbers, and their names, as text."""
    share = sum(tensors[name].numel() for name in names) / max(1, sum(tensor.numel() for tensor in tensors.values()))
    percent = f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"
    return f"{len(names)} of {len(tensors)} tensors ({percent} of the weights: {shortened(names, 4)})"
