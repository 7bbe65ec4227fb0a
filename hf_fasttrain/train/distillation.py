"""Distillation: a step loss that also compares the model's logits with a teacher's, of the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.train.loss import Loss, logits_of
from hf_fasttrain.train.step_loss import At

LOGITS_NEEDED = "a model without them can't be distilled into"


class TeacherLogits:
    """The logits (B, K) of a frozen model for images (B, 3, H, W) that are normalised for another model.

    They are normalised again by `mean` and `std` instead of `student_mean` and `student_std`, and resized to
    `image_size` if they have another size, so that the teacher sees objects of the size that it has learned. Both are
    linear, so mixed images stay mixed. `columns` are those of the logits that are returned, by default all.
    """

    def __init__(
        self,
        model: nn.Module,
        image_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        student_mean: Sequence[float],
        student_std: Sequence[float],
        columns: Sequence[int] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.image_size, self.autocast = model, image_size, autocast
        self.columns = None if columns is None else torch.tensor(columns, device=device)
        values = (torch.tensor(v, dtype=torch.float64) for v in (mean, std, student_mean, student_std))
        ours_mean, ours_std, their_mean, their_std = (value.view(1, -1, 1, 1) for value in values)
        self.is_same = bool((ours_mean == their_mean).all() and (ours_std == their_std).all())
        self.scale = (their_std / ours_std).to(device, torch.float32)
        self.shift = ((their_mean - ours_mean) / ours_std).to(device, torch.float32)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        if not self.is_same:
            images = torch.addcmul(self.shift, images, self.scale)
        with self.autocast():
            logits = logits_of(self.model(images)).float()
        return logits if self.columns is None else logits.index_select(1, self.columns)


class Distillation:
    """The step loss (1 - weight) * loss + weight * T^2 * KL(teacher || model), both at temperature T.

    The mean over the images of Hinton, Vinyals and Dean (arXiv 1503.02531); T^2 makes up for gradients that shrink by
    it. With several labels the divergence is that of each class's two probabilities, averaged over the classes, or
    summed with `sum_classes`, as binary cross-entropy is. It is no module, so that the teacher is not saved.
    """

    def __init__(
        self,
        loss: Loss,
        teacher: Callable[[Tensor], Tensor],
        *,
        weight: float,
        temperature: float,
        multi_label: bool = False,
        sum_classes: bool = False,
    ) -> None:
        self.loss, self.teacher, self.weight, self.temperature = loss, teacher, weight, temperature
        self.multi_label, self.sum_classes = multi_label, sum_classes

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor, at: At) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch, and its two parts for the log."""
        taught = self.teacher(images)  # first: its activations are freed before the model's are computed
        logits = logits_of(model(images), LOGITS_NEEDED)
        label_loss = self.loss(logits, targets)
        divergence = self.divergence(logits.float(), taught)
        total = torch.lerp(label_loss.float(), divergence, self.weight)
        return total, {"label_loss": label_loss, "distillation_loss": divergence}

    def divergence(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Return T^2 times the divergence of the model's (B, K) from the taught logits (B, K), 0-d."""
        logits, taught = logits / self.temperature, taught / self.temperature
        if not self.multi_label:
            divergence = F.kl_div(logits.log_softmax(1), taught.log_softmax(1), reduction="batchmean", log_target=True)
            return divergence * self.temperature**2
        present = F.kl_div(F.logsigmoid(logits), F.logsigmoid(taught), reduction="none", log_target=True)
        absent = F.kl_div(F.logsigmoid(-logits), F.logsigmoid(-taught), reduction="none", log_target=True)
        total = (present + absent).sum() if self.sum_classes else (present + absent).mean(1).sum()
        return total / len(logits) * self.temperature**2
