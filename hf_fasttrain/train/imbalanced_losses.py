"""Losses that count what is classified well less: focal and asymmetric loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fasttrain.train.loss import ClassificationLoss

LEAST = 1e-7  # of 1 - p, whose power has no gradient at 0


class FocalLoss(ClassificationLoss):
    """Cross-entropy times (1 - p)^gamma, where p is the probability of the target class (Lin et al., arXiv 1708.02002).

    Several labels per image: the paper's binary form, averaged over the classes. Soft targets (mixup, label smoothing)
    weigh the terms of their classes. As in `ClassificationLoss`, the result is a mean over the images.
    """

    def __init__(self, gamma: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        if self.binary:
            targets = self._binary_targets(logits, targets)
            losses = F.binary_cross_entropy_with_logits(
                logits, targets, pos_weight=self.class_weights, reduction="none"
            )
            p = logits.sigmoid()
            missed = p + targets - 2 * p * targets  # 1 - probability of the target
            return self._mean(missed.clamp(min=LEAST) ** self.gamma * losses)
        log_p = F.log_softmax(logits, dim=1)
        missed = -torch.expm1(log_p)
        terms = -smoothed(targets, logits, self.label_smoothing) * missed.clamp(min=LEAST) ** self.gamma * log_p
        return (terms if self.class_weights is None else terms * self.class_weights).sum() / len(logits)


class AsymmetricLoss(ClassificationLoss):
    """The asymmetric loss of Ben-Baruch et al. (arXiv 2009.14119), in the forms of timm, as a mean over the images.

    Several labels per image: binary terms with focusing `gamma_negative` and probabilities shifted by `clip` for the
    classes that an image does not have, `gamma_positive` for those it has; averaged over the classes, or summed. One
    label: the terms of cross-entropy with label smoothing, with the focusing of their classes.
    """

    def __init__(
        self, gamma_negative: float = 4.0, gamma_positive: float = 1.0, clip: float = 0.05, **options: Any
    ) -> None:
        super().__init__(**options)
        self.gamma_negative, self.gamma_positive, self.clip = gamma_negative, gamma_positive, clip

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        return self._several(logits, targets) if self.binary else self._single(logits, targets)

    def _several(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = self._binary_targets(logits, targets)
        positive = logits.sigmoid()
        negative = (1 - positive + self.clip).clamp(max=1)
        terms = targets * F.logsigmoid(logits)
        if self.class_weights is not None:
            terms = terms * self.class_weights
        terms = terms + (1 - targets) * negative.clamp(min=1e-8).log()
        right = positive * targets + negative * (1 - targets)
        gamma = self.gamma_positive * targets + self.gamma_negative * (1 - targets)
        return self._mean(-terms * (1 - right).clamp(min=LEAST) ** gamma)

    def _single(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=1)
        hard = smoothed(targets, logits, 0.0)
        p = log_p.exp()
        right = p * hard + (1 - p) * (1 - hard)
        factors = (1 - right).clamp(min=LEAST) ** (self.gamma_positive * hard + self.gamma_negative * (1 - hard))
        terms = -smoothed(targets, logits, self.label_smoothing) * factors * log_p
        return (terms if self.class_weights is None else terms * self.class_weights).sum() / len(logits)


def smoothed(targets: Tensor, logits: Tensor, smoothing: float) -> Tensor:
    """Return targets (B, K) as probabilities, with label smoothing as cross-entropy's."""
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    return targets.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[1]
