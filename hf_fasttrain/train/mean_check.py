"""Whether a loss is a mean over its images, so that training does not depend on how a step is split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.data.loading.trees import Tree, num_images, rows
from hf_fasttrain.models.model import batch_norms, set_train_mode
from hf_fasttrain.models.side_effects import random_states, seeded_random_states, undisturbed
from hf_fasttrain.train.loss import ClassificationLoss, Loss
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.train.shared_draws import (
    CannotShare,
    Dimensions,
    Draw,
    batch_dimensions,
    recorded_draws,
    shared_draws,
)
from hf_fasttrain.train.step_loss import At, LossOfLogits, StepLoss, checked, module_of, named_parameters
from hf_fasttrain.utils.errors import RunError, first_line
from hf_fasttrain.utils.library_errors import is_out_of_memory

NOISE, NOISE_OF_ZEROS = 0.1, 0.02  # standard deviation: times the root mean square of a weight, and of weights of zero
TOLERANCE = 0.02  # relative: 16 bits and TF32 round to less
SCALE = 1024.0  # of the loss, so that fp16's gradients are not lost
SPLIT = (
    "training depends on how a step is split: on accumulation_steps, on the number of processes, and on smaller "
    "micro-batches after memory has run out"
)
SUM = (
    "the loss is a sum over its images: its gradients are those of the parts of a batch added up, so training would "
    "depend on how a step is split; return the sum divided by the number of images"
)
NO_MEAN = f"the loss is not a mean over its images: a batch and its parts have other gradients, so {SPLIT}"
UNKNOWN = "could not check whether the loss is a mean over its images"
DRAWS = "it draws random numbers by the number or the values of the images"


class _CannotTell(Exception):
    """Why gradients can't be compared."""


def mean_note(step_loss: StepLoss | LossOfLogits, model: nn.Module, images: Tree, targets: Tree, at: At) -> str:
    """Return a note if a loss is no mean over the images of a micro-batch, or if that can't be told; "" if it is one.

    The gradients of a mean are those of its parts, weighted by their numbers of images: here of a third and of the
    rest. That holds for any weights and random numbers, so they are chosen to hide nothing: the model is in training
    mode, but batch norms use their running statistics; noise is added to the weights, as a head may begin with zeros;
    all images draw the same random numbers, such as dropout masks.

    A sum raises RunError. Its gradients are those of its parts added up, in two different splits, and are doubled if
    the images are given twice: those of a mean over each of two domains, say, are not. Another loss gets a note, unless
    it has other gradients when it is called again.

    Not seen: a difference of less than 2 %, what begins at a later step, and that two copies of an image in one forward
    have masks of their own. Random states, weights, buffers and modes stay as they were; what a function keeps outside
    of modules, it sees up to ten times more.
    """
    if isinstance(step_loss, LossOfLogits) and _is_mean(step_loss.loss):
        return ""
    if num_images(images) == 1:  # twice the same image
        images, targets = rows(images, [0, 0], 1), rows(targets, [0, 0], 1)
    comparison = _Comparison(step_loss, model, images, targets, at)
    verdict, short = "", False
    try:
        verdict = comparison.verdict()
    except (_CannotTell, CannotShare) as why:
        reason = DRAWS if isinstance(why, CannotShare) else why
        verdict = f"{UNKNOWN}: {reason}. If it is not, {SPLIT}"
    except Exception as error:  # noqa: BLE001 - the step says it better, or does not fail
        short = is_out_of_memory(error)
    finally:
        comparison.restore()
    if short:
        free_cached_memory(next(model.parameters()).device)  # outside of the handler, which holds what failed
    if verdict is SUM:
        raise RunError(SUM)
    return verdict


def _is_mean(loss: Loss) -> bool:
    return loss is F.cross_entropy or isinstance(loss, ClassificationLoss)


class _Comparison:
    """Compares the gradients of a batch with those of its parts, at weights that noise has moved."""

    def __init__(
        self,
        step_loss: StepLoss | LossOfLogits,
        model: nn.Module,
        images: Tree,
        targets: Tree,
        at: At,
    ) -> None:
        self.step_loss, self.model, self.at = step_loss, model, at
        self.images, self.targets, self.number = images, targets, num_images(images)
        self.loss = module_of(step_loss)
        named = named_parameters(model, self.loss).values()
        self.parameters = [parameter for parameter in named if parameter.requires_grad]
        self.saved: dict[nn.Parameter, Tensor] = {}
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.draws: tuple[list[Draw], list[Dimensions]] = ([], [])
        self.states: Any = None  # of the random generators, after all images

    @torch.no_grad()
    def restore(self) -> None:
        """Give all weights their own values again."""
        for parameter, value in self.saved.items():
            parameter.copy_(value)

    @torch.no_grad()
    def _move_weights(self) -> None:
        """Restore the weights, and add the same noise to those that are trained."""
        self.restore()
        with seeded_random_states(self.device, 0):
            for parameter in self.parameters:
                size = float(parameter.square().mean().sqrt()) if parameter.numel() else 0.0
                parameter.add_(torch.randn_like(parameter), alpha=NOISE * size or NOISE_OF_ZEROS)

    def verdict(self) -> str:
        """Return "", SUM or NO_MEAN. Raises _CannotTell, and what the loss raises for all images."""
        of_loss = self.loss.parameters() if self.loss is not None else ()  # frozen ones too: it may move a teacher
        self.saved = {p: p.detach().clone() for p in (*self.parameters, *of_loss)}
        number, first = self.number, max(1, self.number // 3)  # unequal: equal parts may agree by chance
        last = number - first
        whole = self._whole()
        if not self._norm(whole) > 1e-6 * SCALE * self._norm(self.parameters):
            raise _CannotTell("its gradients are zero")
        parts = self._part(0, first), self._part(first, number)
        if self._agree(whole, parts, (first / number, last / number)):
            return ""
        if not self._agree(whole, (self._shared(self.images, self.targets),), (1,)):
            raise _CannotTell("called again for the same images, it gives other gradients")
        is_sum = (
            self._agree(whole, parts, (1, 1))
            and self._agree(self._part(0, first, times=2), parts[:1], (2,))
            and self._agree(whole, (self._part(0, last), end := self._part(last, number)), (1, 1))
            and self._agree(self._part(last, number, times=2), (end,), (2,))
        )
        return SUM if is_sum else NO_MEAN

    def _whole(self) -> list[Tensor]:
        """Return the gradients of all images, and find out which random numbers the loss draws."""
        draws: list[Draw] = []
        whole, self.states = self._gradients(self.images, self.targets, recorded_draws(draws))
        if not draws:
            return whole
        fewer: list[Draw] = []
        self._gradients(*self._rows([*range(max(1, self.number // 3))]), recorded_draws(fewer))
        self.draws, self.states = (draws, batch_dimensions(draws, fewer)), None
        return self._shared(self.images, self.targets)

    def _part(self, start: int, end: int, times: int = 1) -> list[Tensor]:
        """Return the gradients of some of the images, `times` over."""
        return self._shared(*self._rows([*range(start, end)] * times))

    def _rows(self, chosen: list[int]) -> tuple[Tree, Tree]:
        return rows(self.images, chosen, self.number), rows(self.targets, chosen, self.number)

    def _shared(self, images: Tree, targets: Tree) -> list[Tensor]:
        """Return gradients with the same random numbers for all images."""
        gradients, states = self._gradients(images, targets, shared_draws(*self.draws, self.device))
        self.states = self.states or states
        if self.states != states:  # drawn elsewhere than by torch's operations
            raise CannotShare
        return gradients

    def _gradients(self, images: Tree, targets: Tree, draws: AbstractContextManager[None]) -> tuple[list[Tensor], Any]:
        """Return the gradients, and the states of all random generators afterwards."""
        self._move_weights()
        modules = [self.model, *([self.loss] if self.loss is not None else [])]
        norms = [norm for module in modules for norm in batch_norms(module)]
        with undisturbed(*modules):
            set_train_mode(self.model, [])
            for norm in norms:
                norm.eval()
            try:
                with draws:
                    loss = checked(self.step_loss(self.model, images, targets, self.at))[0]
                    scale = torch.full_like(loss, SCALE)
                    found = torch.autograd.grad(loss, self.parameters, scale, allow_unused=True)
            except CannotShare:
                raise
            except Exception as error:
                if images is self.images or is_out_of_memory(error):
                    raise
                raise _CannotTell(
                    f"it fails for {num_images(images)} of the {self.number} images: {first_line(error)}"
                ) from error
            states = random_states(self.device)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        return gradients, states

    def _agree(self, whole: list[Tensor], parts: Sequence[list[Tensor]], weights: Sequence[float]) -> bool:
        """Return whether gradients are the weighted sum of others."""
        rest = [
            gradient - sum(a * part for a, part in zip(weights, each, strict=True))
            for gradient, *each in zip(whole, *parts, strict=True)
        ]
        return self._norm(rest) <= TOLERANCE * self._norm(whole)

    def _norm(self, tensors: Sequence[Tensor]) -> float:
        norm = float(torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors]))
        if not math.isfinite(norm):
            raise _CannotTell("its gradients are not finite")
        return norm
