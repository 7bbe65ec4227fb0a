"""LoRA: small trainable matrices beside frozen layers (peft), and the ordinary model with them merged.

Whatever leaves a training is the ordinary model: `merged_state` goes into checkpoints, `merged_model` is exported.
Only a resumed run needs the matrices themselves, `adapter_state`.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.models.side_effects import preserved_state
from hf_fasttrain.models.weights import is_within
from hf_fasttrain.utils.errors import ModelError, RunError, first_line, nearest, shortened

ADAPTER = "hf_fasttrain"  # peft's name of ours: adapters that a user's model has are left alone
ATTENTION = re.compile(r"attn|attention|xca|token_mixer")  # in the name of an attention module
PROJECTIONS = {  # names of layers in it, by timm and transformers
    *("qkv", "q", "k", "v", "kv", "proj", "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    *("query", "key", "value", "dense", "output"),
}


def require_peft() -> None:
    """Raise RunError unless peft is installed."""
    if importlib.util.find_spec("peft") is None:
        raise RunError("lora needs peft: pip install 'hf_fasttrain[lora]', or leave lora out")


def add_adapters(
    model: nn.Module,
    head: Sequence[str],
    image_size: int,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
) -> list[str]:
    """Freeze a model but its `head`, add trainable adapters to layers in place, and return the names of these layers.

    An adapted layer computes W x + alpha / rank * B A x, with A (rank, inputs) random and B (outputs, rank) zero at
    first. `targets` are ends of names; None: the layers of `_auto_targets`. Raises ModelError if there are none.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = _adaptable_layers(model, head, image_size)
    names = _auto_targets(layers, rank) if targets is None else _named_targets(model, head, layers, targets)
    if not names:
        raise ModelError(
            f"lora.targets=auto: {type(model).__name__} has no layers to adapt with rank {rank}: projections of an "
            "attention, or else 1x1 convolutions and linear layers that are larger than the rank; lower lora.rank, or "
            "leave lora out"
        )
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none"}
    config = LoraConfig(target_modules="|".join(map(re.escape, names)), **options)  # a pattern for whole names
    inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_within(name, head) or f".{ADAPTER}." in name)
    return names


def _adaptable_layers(model: nn.Module, head: Sequence[str], image_size: int) -> dict[str, nn.Module]:
    """Return the linear layers and ungrouped convolutions of a model, but its head, that forward calls as layers.

    Some attentions read the weights of a layer instead, as timm's BEiT does: an adapter would have no effect there.
    """
    called: set[int] = set()
    layers = {name: m for name, m in model.named_modules() if _is_supported(m) and not is_within(f"{name}.", head)}
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(id(layer))) for layer in layers.values()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with preserved_state(model), torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    except Exception as error:  # noqa: BLE001 - whatever a user's model raises
        raise ModelError(
            f"lora: the layers that {type(model).__name__} uses are found by an image of {image_size} px, and it fails "
            f"for that: {first_line(error)}"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    return {name: layer for name, layer in layers.items() if id(layer) in called}


def _is_supported(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _auto_targets(layers: Mapping[str, nn.Module], rank: int) -> list[str]:
    """Return the query, key, value and output projections of attentions; without any, all pointwise layers.

    Those are 1x1 convolutions and linear layers with more inputs and outputs than the rank.
    """
    attention = [name for name in layers if _is_projection(name)]
    return attention or [name for name, layer in layers.items() if _is_pointwise(layer, rank)]


def _is_projection(name: str) -> bool:
    """Return whether a name is that of a projection in an attention module: blocks.0.attn.qkv, but not attn.mlp.fc1."""
    parts = name.split(".")
    inside = [number for number, part in enumerate(parts) if ATTENTION.search(part)]
    return bool(inside) and not PROJECTIONS.isdisjoint(parts[inside[-1] + 1 :])


def _is_pointwise(layer: nn.Module, rank: int) -> bool:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return min(weight.shape[:2]) > rank and weight[0, 0].numel() == 1


def _named_targets(
    model: nn.Module, head: Sequence[str], layers: Mapping[str, nn.Module], targets: Sequence[str]
) -> list[str]:
    """Return the layers whose names are targets or end with them. Raises ModelError for a target without any."""
    for target in targets:
        if _ends_with(layers, target):
            continue
        others = [name for name, _ in model.named_modules() if _ends_with([name], target)]
        what = "is no layer of the model"
        if others:
            is_head = all(is_within(f"{name}.", head) for name in others)
            what = "is the head, which is trained as a whole" if is_head else f"can't be adapted ({others[0]})"
        ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        raise ModelError(
            f"lora.targets: '{target}' {what}.{nearest(target, ends)} Allowed are auto, and names or ends of names of "
            f"linear layers and ungrouped convolutions that are called as layers: {shortened(ends, 10)}"
        )
    return [name for name in layers if any(_ends_with([name], target) for target in targets)]


def _ends_with(names: Sequence[str] | Mapping[str, Any], target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return name -> layer with an adapter of ours; shared layers under all their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if _is_adapted(module)}


def _is_adapted(module: nn.Module) -> bool:
    adapters = getattr(module, "lora_A", None)
    return isinstance(adapters, nn.ModuleDict) and ADAPTER in adapters


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the ordinary model: each adapter is added to the weight of its layer."""
    state, layers = model.state_dict(), adapted_layers(model)
    for name, layer in layers.items():
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        state |= {f"{name}.{key}": tensor for key, tensor in layer.base_layer.state_dict().items()}
        state[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
    return state


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what a merged state dict does not tell: adapters and the original weights of their layers."""
    prefixes = tuple(f"{name}." for name in adapted_layers(model))
    state = model.state_dict() if prefixes else {}
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def load_merged(model: nn.Module, merged: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> None:
    """Load a merged state dict and the adapters in it into a model."""
    names = {f"{name}.{key}" for name, layer in adapted_layers(model).items() for key in layer.base_layer.state_dict()}
    model.load_state_dict({**{name: merged[name] for name in merged if name not in names}, **adapters})


def load_ordinary(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of the ordinary model; adapters, if there are any, add nothing to it then."""
    inner = {
        f"{name}.{key}": f"{name}.base_layer.{key}"
        for name, layer in adapted_layers(model).items()
        for key in layer.base_layer.state_dict()
    }
    adapters = {name: torch.zeros_like(tensor) for name, tensor in adapter_state(model).items()}
    model.load_state_dict({**adapters, **{inner.get(name, name): tensor for name, tensor in state.items()}})


def merged_model(model: nn.Module) -> nn.Module:
    """Return the ordinary model: a copy with merged adapters, or the model itself if it has none."""
    layers = adapted_layers(model)
    if not layers:
        return model
    ordinary = copy.deepcopy(model)
    for name in layers:
        parent, _, key = name.rpartition(".")
        layer: Any = ordinary.get_submodule(name)
        setattr(ordinary.get_submodule(parent), key, layer.base_layer)
    ordinary.load_state_dict(merged_state(model))
    return ordinary
