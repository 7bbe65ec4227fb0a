"""The loss of a micro-batch: of the logits alone, or of model, images, targets and time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_fasttrain.data.loading.trees import Tree
from hf_fasttrain.train.loss import Loss, loss_input, loss_of_uniform_logits
from hf_fasttrain.utils.errors import RunError, first_line


class At(NamedTuple):
    """Where training is."""

    step: int  # the optimizer step that is being made, from 1
    updates: int  # made before it: steps less those that fp16 has skipped
    epoch: int  # from 0
    num_steps: int  # of the whole training


# model, images (B, ...), targets, at -> the mean over the B images, 0-d, alone or with named values for the log
StepLoss = Callable[[nn.Module, Tree, Tree, At], "Tensor | tuple[Tensor, Mapping[str, Tensor | float]]"]
Values = Mapping[str, "Tensor | float"]
# name -> sum of weights times values, 0-d, and the sum of the weights: 1 for a value that all images of a step have
Shares = dict[str, tuple[Tensor, float]]
NO_VALUES: Values = {}


def kind_of(value: Any) -> str:
    """Return what messages call the images or targets of a batch."""
    return "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class LossOfLogits:
    """The step loss of a `loss` that maps (logits, targets) to the mean over their images."""

    wraps_model = False  # whether DistributedDataParallel has to wrap the model together with this

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.uniform: Tensor | None = None  # the loss of the first images, if all classes were equally likely
        self._is_first = True

    def __call__(self, model: nn.Module, images: Tree, targets: Tree, at: At) -> Tensor:
        """Return the loss of a micro-batch. Raises RunError for nested ones that model or loss can't take."""
        try:
            logits = self.outputs(model, images)
            if self._is_first:
                self._is_first = False
                self.uniform = loss_of_uniform_logits(self.loss, logits, targets)
            return self.loss(logits, targets)
        except (AttributeError, TypeError) as error:
            if isinstance(images, Tensor) and isinstance(targets, Tensor):
                raise
            raise RunError(
                f"the model is given the images of a batch as they are ({kind_of(images)}), and the loss its targets "
                f"({kind_of(targets)}); one of them can't take that ({type(error).__name__}: {first_line(error)}): "
                "give a step_loss(model, images, targets, at), which takes them apart"
            ) from error

    def outputs(self, model: nn.Module, images: Tree) -> Any:
        """Return what the loss is given of a micro-batch."""
        return loss_input(model(images))


class ModelAndLoss(nn.Module):
    """What DistributedDataParallel wraps where the loss calls the model itself, or has parameters.

    So the loss may call any method of the model, as often as it likes, and parameters of its own are exchanged too.
    """

    def __init__(self, model: nn.Module, step_loss: StepLoss | LossOfLogits) -> None:
        super().__init__()
        self.model, self.loss = model, module_of(step_loss)
        self._step_loss = [step_loss]  # in a list: it is registered above

    def forward(self, images: Tree, targets: Tree, at: At) -> Any:
        """Return what the step loss returns; without images, a zero that all parameters have part in."""
        if images is not None:
            return self._step_loss[0](self.model, images, targets, at)
        return torch.stack([p.flatten()[:0].sum().float() for p in self.parameters() if p.requires_grad]).sum()


def module_of(step_loss: StepLoss | LossOfLogits) -> nn.Module | None:
    """Return the module that a step loss, or its loss of logits, is, or is a method or a partial of; else None."""
    loss: Any = step_loss.loss if isinstance(step_loss, LossOfLogits) else step_loss
    while isinstance(loss, functools.partial):
        loss = loss.func
    owner = loss if isinstance(loss, nn.Module) else getattr(loss, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def named_parameters(model: nn.Module, loss: nn.Module | None) -> dict[str, nn.Parameter]:
    """Return name -> parameter of a model, and of a loss that is a module, whose names begin with `loss.`."""
    named = dict(model.named_parameters())
    if loss is not None:
        known = set(map(id, named.values()))
        named |= {f"loss.{name}": p for name, p in loss.named_parameters() if id(p) not in known}
    return named


def wraps_loss(step_loss: StepLoss | LossOfLogits) -> bool:
    """Return whether DistributedDataParallel has to wrap the loss with the model."""
    module = module_of(step_loss)
    has_parameters = module is not None and any(True for _ in module.parameters())
    return has_parameters or not isinstance(step_loss, LossOfLogits) or step_loss.wraps_model


def checked(returned: Any) -> tuple[Tensor, Values]:
    """Return the loss and the values for the log of what a step loss has returned. Raises RunError for other things."""
    loss, values = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, NO_VALUES)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise RunError(
            f"the loss of a batch is {what}; give Trainer a loss that returns the mean over the images, a single "
            "number (a step_loss: that number as a tensor, or a pair of it and a dict of values for the log)"
        )
    if not isinstance(values, Mapping):
        raise RunError(f"step_loss returned (loss, {type(values).__name__}); the second is a dict of values by name")
    return loss, values


def add_values(total: Shares, values: Values, weight: float, device: torch.device) -> None:
    """Add `weight` times the values of a micro-batch to those of its step. Raises RunError for what is no number."""
    for name, value in values.items():
        if type(value) is Tensor and type(name) is str and _is_number(value, device):  # most are: checks take time
            number = value.detach()
        else:
            number = _number(name, value, device)
        before = total.get(name)
        if before is None:
            total[name] = (number * weight, weight)  # a copy: a step loss may change its tensor in place
        else:
            total[name] = (torch.add(before[0], number, alpha=weight), before[1] + weight)


def _is_number(value: Tensor, device: torch.device) -> bool:
    return value.ndim == 0 and value.dtype is torch.float32 and value.device == device


def _number(name: Any, value: Any, device: torch.device) -> Tensor:
    """Return a value for the log as a float32 tensor, 0-d. Raises RunError for what is no number."""
    try:
        number = torch.as_tensor(value, device=device).detach().float()
    except (TypeError, ValueError, RuntimeError):
        number = torch.empty(0)
    if not isinstance(name, str) or number.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RunError(f"step_loss returned the value {name!r} ({what}) for the log; give single numbers by name")
    return number.reshape(())
