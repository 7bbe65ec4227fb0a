"""Optimizers by timm's names, with parameter groups for weight decay and per-layer learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_fasttrain.models.layers import is_norm, layer_numbers
from hf_fasttrain.utils.errors import RecipeError, RunError, nearest, shortened, shown

INNER = "inner"  # key for the states of optimizers inside an optimizer
# Tokens and position tables, by the names that timm and transformers give them.
TOKEN_NAMES = {"pos_embed", "cls_token", "dist_token", "reg_token", "position_embeddings", "distillation_token"}


def undecayed_names(model: nn.Module) -> set[str]:
    """Return the names of parameters without weight decay.

    Those are the parameters of norm layers, biases, and what the model itself lists (timm: position embeddings,
    class tokens, relative-position tables).
    """
    names = set(getattr(model, "no_weight_decay", set)())
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if is_norm(module) or name == "bias" or name.endswith("_bias") or name in TOKEN_NAMES:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def build_param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    head_names: Sequence[str] = (),
    backbone_lr_scale: float = 1.0,
    layer_decay: float | None = None,
    names: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups with `lr`, `lr_scale` and `weight_decay` for the parameters that require gradients.

    `head_names` are prefixes of the head's parameters. `layer_decay` needs a model of timm or transformers.
    `names` are those of the parameters to group; by default those that require gradients.
    """
    undecayed = undecayed_names(model)
    scale_of = _lr_scales(model, head_names, backbone_lr_scale, layer_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if name not in names if names is not None else not parameter.requires_grad:
            continue
        scale, decay = scale_of(name), 0.0 if name in undecayed else weight_decay
        empty: dict[str, Any] = {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
        groups.setdefault((scale, decay), empty)["params"].append(parameter)
    return list(groups.values())


def _lr_scales(
    model: nn.Module, head_names: Sequence[str], backbone_lr_scale: float, layer_decay: float | None
) -> Callable[[str], float]:
    if layer_decay is None:
        return lambda name: 1.0 if has_prefix(name, head_names) else backbone_lr_scale
    layers = layer_numbers(model, "optimizer.layer_decay")
    deepest = max(layers.values())
    return lambda name: layer_decay ** (deepest - layers[name])


def has_prefix(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether a parameter's name is one of the prefixes, or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def require_optimizer(name: str, args: Mapping[str, Any]) -> None:
    """Raise RecipeError for an optimizer that timm does not know, and for arguments that have separate keys."""
    from timm.optim import list_optimizers

    known = [str(known) for known in list_optimizers()]
    if name.lower() not in known:
        raise RecipeError(
            f"optimizer.name is '{name}', which timm does not know.{nearest(name, known)} "
            f"Some of its {len(known)} are {shortened(known, 20)}"
        )
    reserved = sorted({"lr", "weight_decay", "momentum", "params"} & args.keys())
    if reserved:
        raise RecipeError(f"optimizer.args: {', '.join(reserved)} has its own key; set it as optimizer.<name> instead")


def build_optimizer(
    name: str, param_groups: list[dict[str, Any]], *, momentum: float, args: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return timm's optimizer of that name, or torch's fused implementation.

    Raises RecipeError for an unknown name or argument. For ResNet-50's parameters on two cores, fused AdamW takes
    22 ms, the default implementation 59 ms.
    """
    from timm.optim import create_optimizer_v2

    require_optimizer(name, args)
    options: dict[str, Any] = {
        "lr": param_groups[0]["lr"],
        "weight_decay": 0.0,
        "momentum": momentum,
        **_fused(name),
        **args,
    }
    try:
        return create_optimizer_v2(param_groups, opt=name, filter_bias_and_bn=False, **options)
    except (TypeError, ValueError, IndexError, KeyError, AssertionError, ImportError, RuntimeError) as error:
        raise RecipeError(f"optimizer {name} can't be built with optimizer.args={args}: {error}") from None


def state_share(name: str, *, momentum: float, args: dict[str, Any]) -> float:
    """Return the bytes that an optimizer stores per byte of parameters, from a few updates of a small matrix."""
    side = 256
    matrix = nn.Parameter(torch.zeros(side, side))
    optimizer = build_optimizer(name, [{"params": [matrix], "lr": 1e-3}], momentum=momentum, args=args)
    for _ in range(2):
        matrix.grad = torch.zeros_like(matrix)
        if getattr(optimizer, "is_second_order", False):  # it differentiates the gradient
            (matrix.grad,) = torch.autograd.grad(matrix.square().sum(), matrix, create_graph=True)
        optimizer.step()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in (state.values() if isinstance(state, dict) else ())
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values()) / matrix.nbytes


def _fused(name: str) -> dict[str, bool]:
    return {"fused": True} if name.lower() in {"adam", "adamw", "sgd", "nesterov", "momentum"} else {}


def replace_parameters(
    optimizer: torch.optim.Optimizer, before: dict[str, nn.Parameter], current: dict[str, nn.Parameter]
) -> None:
    """Replace the parameters in `before` by the current ones of the same name, after the model was moved."""
    new = {id(old): current[name] for name, old in before.items() if current.get(name, old) is not old}
    for group in optimizer.param_groups if new else ():
        for old in group["params"]:
            if id(old) in new and old in optimizer.state:
                optimizer.state[new[id(old)]] = optimizer.state.pop(old)
        group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]


def require_model_parameters(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Raise RunError for an optimizer that would train nothing: with other parameters only, or with frozen ones.

    It may have more parameters than these, and need not have all of them.
    """
    model_ids = set(map(id, parameters.values()))
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = [parameters[name] for name in names_not_optimized(optimizer, parameters)]
    unknown = [parameter for parameter in optimized if id(parameter) not in model_ids]
    if not any(parameter.requires_grad for parameter in optimized):
        raise RunError(
            f"optimizer: none of its {len(optimized):,} parameters requires gradients, so nothing would be trained; "
            "call requires_grad_() on those to train"
        )
    is_old_model = bool(missing) and sorted(p.shape for p in unknown) == sorted(p.shape for p in missing)
    if is_old_model or (missing and len(unknown) == len(optimized)):
        raise RunError(
            f"the optimizer holds {len(unknown):,} parameters that are not the model's, and not {len(missing):,} that "
            f"are ({shortened(names_not_optimized(optimizer, parameters), 3)}): it was created before the model was "
            "changed, or for another model; create it from model.parameters() of the model that is trained"
        )


def unknown_parameters(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return an optimizer's trainable parameters that are not among `parameters`."""
    known_ids = set(map(id, parameters))
    return [
        p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and id(p) not in known_ids
    ]


def names_not_optimized(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> list[str]:
    """Return the names of the trainable parameters that an optimizer does not have."""
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [name for name, p in parameters.items() if p.requires_grad and id(p) not in optimized]


def inner_optimizers(optimizer: Any) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers in an optimizer's attributes that have their own state (SAM's base optimizer)."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, torch.optim.Optimizer) and value.state is not getattr(optimizer, "state", None)
    }


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of an optimizer and of its inner optimizers."""
    inner = {name: inner_optimizer.state_dict() for name, inner_optimizer in inner_optimizers(optimizer).items()}
    return {**optimizer.state_dict(), **({INNER: inner} if inner else {})}


def keep_lr_ratios(optimizer: torch.optim.Optimizer) -> float:
    """Set each group's `lr_scale`, its lr relative to that of the first group, and return the latter."""
    lr = float(optimizer.param_groups[0]["lr"])
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", float(group["lr"]) / lr)
    return lr


def has_lr(optimizer: torch.optim.Optimizer, lr: float) -> bool:
    """Return whether the lr of each group is `lr` times its `lr_scale`."""
    return all(math.isclose(group["lr"], lr * group.get("lr_scale", 1.0)) for group in optimizer.param_groups)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, base: float) -> None:
    """Set the lr of each group to `lr` times its `lr_scale`, which new groups get first."""
    scale_new_groups(optimizer, lr, base)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def scale_new_groups(optimizer: torch.optim.Optimizer, lr: float, base: float) -> None:
    """Set `lr_scale` of groups that were added during training; the schedule is now at `lr` and started from `base`.

    The lr that a group was added with counts as its lr at the start: its ratio to `base` is kept.
    """
    for group in optimizer.param_groups:
        if "lr_scale" not in group:
            group["lr_scale"] = float(group["lr"]) / base
            group["lr"] = lr * group["lr_scale"]


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state from a file, and give each tensor the memory layout of its parameter.

    Fused kernels iterate over parameter and state in parallel, and would otherwise pair the wrong elements. Sums (as
    in LBFGS) round differently in unaligned memory, and tensors in a file are unaligned.
    """
    inner = {
        name: (inner_optimizer, inner_optimizer.param_groups)
        for name, inner_optimizer in inner_optimizers(optimizer).items()
    }
    groups, options = optimizer.param_groups, [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({key: value for key, value in state.items() if key != INNER})
    try:
        _require_valid_state(optimizer, options)
    except ValueError:  # reset the optimizer: an older checkpoint may fit
        for group, before in zip(optimizer.param_groups, options, strict=True):
            group.update(before)
        optimizer.state.clear()
        raise
    for name, (inner_optimizer, inner_groups) in inner.items():
        is_shared = len(inner_groups) == len(groups) and all(a is b for a, b in zip(inner_groups, groups, strict=True))
        restore_optimizer(inner_optimizer, state[INNER][name])
        if is_shared:  # as in the published SAM, which sets the lr of both
            inner_optimizer.param_groups = optimizer.param_groups
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            values[name] = _with_layout(value, parameter)


# Optimizers of torch with the same state for each parameter, and the state's tensors that have a parameter's shape.
PLAIN_OPTIMIZERS = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
    torch.optim.Adagrad, torch.optim.Adamax,
)  # fmt: skip
SHAPED = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum", "exp_inf"}


def _require_valid_state(optimizer: torch.optim.Optimizer, options: list[dict[str, Any]]) -> None:
    """Raise ValueError for a loaded state with which the next step would fail; `options` are the groups' before."""
    for number, (group, before) in enumerate(zip(optimizer.param_groups, options, strict=True)):
        for key in before.keys() - {"params"}:
            if not _is_alike(group.setdefault(key, before[key]), before[key]):  # an older version had fewer options
                raise ValueError(f"option {key} of group {number} is {shown(group[key])}")
        states = [
            (parameter, optimizer.state[parameter]) for parameter in group["params"] if parameter in optimizer.state
        ]
        if type(getattr(optimizer, "optimizer", optimizer)) not in PLAIN_OPTIMIZERS:
            continue
        for parameter, state in states:
            if state.keys() != states[0][1].keys():
                raise ValueError(f"parameters of group {number} have different states")
            shapes = {key: value.shape for key, value in state.items() if key in SHAPED and value is not None}
            if wrong := [key for key, shape in shapes.items() if shape != parameter.shape]:
                raise ValueError(f"{wrong[0]} has the shape {tuple(shapes[wrong[0]])}, not {tuple(parameter.shape)}")


def _is_alike(value: Any, before: Any) -> bool:
    """Return whether an option can replace another: numbers numbers, texts texts, pairs pairs."""
    if isinstance(before, tuple | list):
        same = isinstance(value, tuple | list) and len(value) == len(before)
        return same and all(map(_is_alike, value, before))
    if isinstance(before, bool) or before is None:
        return value is None or isinstance(value, bool | int | float | torch.Tensor)
    if isinstance(before, int | float):
        return isinstance(value, int | float | torch.Tensor)
    return not isinstance(before, str) or isinstance(value, str)


def _with_layout(value: Any, parameter: torch.Tensor) -> Any:
    """Return a copy of a state's tensors in new memory with the parameter's layout."""
    if isinstance(value, list):
        return [_with_layout(v, parameter) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == parameter.shape and value.ndim > 1:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()
    return value.clone()
