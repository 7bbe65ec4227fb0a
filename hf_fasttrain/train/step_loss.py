"""The loss of a micro-batch: of the logits alone, or of model, images, targets and time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.data.loading.trees import Tree, cut, num_images
from hf_fasttrain.models.side_effects import random_states, undisturbed
from hf_fasttrain.train.loss import ClassificationLoss, Loss, loss_input, loss_of_uniform_logits
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.utils.errors import RunError, first_line
from hf_fasttrain.utils.library_errors import is_out_of_memory


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

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.uniform: Tensor | None = None  # the loss of the first images, if all classes were equally likely
        self._is_first = True

    def __call__(self, model: nn.Module, images: Tree, targets: Tree, at: At) -> Tensor:
        """Return the loss of a micro-batch. Raises RunError for nested ones that model or loss can't take."""
        try:
            logits = loss_input(model(images))
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
    return has_parameters or not isinstance(step_loss, LossOfLogits)


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
        try:
            number = torch.as_tensor(value, device=device).detach().float()
        except (TypeError, ValueError, RuntimeError):
            number = torch.empty(0)
        if not isinstance(name, str) or number.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise RunError(f"step_loss returned the value {name!r} ({what}) for the log; give single numbers by name")
        number = number.reshape(())
        before = total.get(name)
        if before is None:
            total[name] = (number * weight, weight)
        else:
            total[name] = (torch.add(before[0], number, alpha=weight), before[1] + weight)


def split_note(
    step_loss: StepLoss | LossOfLogits, model: nn.Module, images: Tree, targets: Tree, at: At, *, tolerance: float
) -> str:
    """Return a note if a micro-batch has other gradients than its parts; "" if not, or if they can't be compared.

    A mean over the images has the same, to a relative `tolerance`, with the model in evaluation mode, where an image
    does not depend on the others. Random states, buffers and modes stay as they were; what a function keeps outside of
    modules, it sees three times more. Raises RunError for a sum.
    """
    number = num_images(images)
    if number < 2 or (isinstance(step_loss, LossOfLogits) and _is_mean(step_loss.loss)):
        return ""
    first = max(1, number // 3)  # unequal parts: a weighted mean may agree on equal ones by chance
    sizes = [first, number - first]
    pieces = [(images, targets), *zip(cut(images, sizes), cut(targets, sizes), strict=True)]
    try:
        with _evaluating(model, module_of(step_loss)):
            whole, *parts = [_gradients(step_loss, model, *part, at) for part in pieces]
    except Exception as error:  # noqa: BLE001 - the step says it better, or does not fail
        short = is_out_of_memory(error)
        whole, parts = None, []
    else:
        short = False
    if short:
        free_cached_memory(next(model.parameters()).device)  # outside of the handler, which holds what failed
    if whole is None or not all(parts) or _are_of_rounding(whole, model):
        return ""
    weights = [size / number for size in sizes]
    if _distance(whole, parts, weights) <= tolerance:
        return ""
    if _distance(whole, parts, [1.0, 1.0]) <= tolerance:
        raise RunError(
            "the loss is a sum over the images: a batch has the gradients of its parts added up, not their mean, so "
            "that training would depend on how a step is split; return the sum divided by the number of images"
        )
    return (
        "the loss is no mean over the images: a batch has other gradients than its parts together, so that training "
        "depends on how a step is split: on accumulation_steps, on the number of processes, and on smaller "
        "micro-batches after memory has run out"
    )


def _is_mean(loss: Loss) -> bool:
    return loss is F.cross_entropy or isinstance(loss, ClassificationLoss)


def _gradients(step_loss: Any, model: nn.Module, images: Tree, targets: Tree, at: At) -> list[Tensor] | None:
    """Return the gradients of the model's parameters; None if random numbers are drawn, or the loss has 16 bits."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = random_states(parameters[0].device)
    loss = checked(step_loss(model, images, targets, at))[0]
    if random_states(parameters[0].device) != before or torch.finfo(loss.dtype).bits < 32:
        return None
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def _are_of_rounding(gradients: list[Tensor], model: nn.Module) -> bool:
    """Return whether gradients are about zero: so they are where a student begins with its teacher's weights."""
    norm, weights = torch.nn.utils.get_total_norm, [p.detach() for p in model.parameters() if p.requires_grad]
    return float(norm(gradients)) <= 1e-6 * float(norm(weights))


def _distance(whole: list[Tensor], parts: list[Any], weights: list[float]) -> float:
    """Return how far the weighted sum of the parts' gradients is from the whole's, relative to these."""
    norm = torch.nn.utils.get_total_norm
    sums = [w - sum(a * g for a, g in zip(weights, each, strict=True)) for w, *each in zip(whole, *parts, strict=True)]
    return float(norm(sums)) / max(float(norm(whole)), 1e-12)


@contextmanager
def _evaluating(model: nn.Module, loss: nn.Module | None) -> Iterator[None]:
    """Set the model to evaluation, and restore its and the loss's modes, buffers and random states afterwards.

    A loss's frozen weights too: it may move a teacher itself.
    """
    frozen = [(p, p.detach().clone()) for p in (loss.parameters() if loss is not None else ()) if not p.requires_grad]
    try:
        with undisturbed(model, *([loss] if loss is not None else [])):
            model.eval()
            yield
    finally:
        for parameter, value in frozen:
            parameter.data.copy_(value)
