"""The training loss, computed from the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.utils.errors import DataError, RunError, nearest, shortened, shown
from hf_fasttrain.utils.format import format_count

EFFECTIVE_BETA = 0.999  # how much further images of a class repeat earlier ones
Loss = Callable[[Tensor, Tensor], Tensor]  # logits (B, K), targets -> mean over the B images, 0-d


def loss_input(output: Any) -> Any:
    """Return the part of a model's output that a loss gets: its logits if it has any, else all of it."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output


def logits_of(output: Any, remedy: str = "pass predict= to Trainer, a function (model, images) -> logits") -> Tensor:
    """Return a model's logits (B, K): its output, or that output's `logits`, as an attribute or in a mapping.

    Raises RunError, which ends with `remedy`, for anything else.
    """
    logits = loss_input(output)
    if isinstance(logits, Tensor):
        return logits
    raise RunError(f"the model returns {describe_output(output)} instead of logits, one tensor (B, K): {remedy}")


def describe_output(output: Any) -> str:
    """Return a description of an output that is not a tensor, for messages."""
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)} ({', '.join(type(value).__name__ for value in output)})"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(repr, output))}"
    return f"an output of type {type(output).__name__}"


class ClassificationLoss(nn.Module):
    """Mean over the images of cross-entropy, or of binary cross-entropy averaged over classes (multi-label, `binary`).

    Binary cross-entropy may be summed over the classes, and its targets set to 1 above `target_threshold`, else to 0.
    `targets` are (B,) int64 labels or (B, K) probabilities. Class weights (K,) multiply the losses; their sum is
    divided by the number of images, not by the sum of the weights, so that the loss of a step is the mean of its
    micro-batches' losses.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        binary: bool = False,
        target_threshold: float | None = None,
        sum_classes: bool = False,
    ) -> None:
        super().__init__()
        self.multi_label, self.label_smoothing, self.binary = multi_label, label_smoothing, binary or multi_label
        self.target_threshold, self.sum_classes = target_threshold, sum_classes
        self.register_buffer("class_weights", class_weights, persistent=False)  # they follow from the data

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = self.class_weights
        if self.binary:
            targets = self._binary_targets(logits, targets)
            if self.sum_classes:
                total = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")
                return total / len(logits)
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
        total = F.cross_entropy(logits, targets, weight=weights, label_smoothing=self.label_smoothing, reduction="sum")
        return total / len(logits)

    def _mean(self, losses: Tensor) -> Tensor:
        """Return the mean over the images of losses (B, K): their mean over the classes, or their sum."""
        return losses.sum() / len(losses) if self.sum_classes else losses.mean()

    def _binary_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return targets (B, K) with the logits' dtype, after label smoothing and the target threshold."""
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1])
        floor = self.label_smoothing / (2 if self.multi_label else logits.shape[1])
        dtype = logits.dtype if self.target_threshold is None else torch.float32  # bf16 could round past the threshold
        targets = targets.to(dtype) * (1 - self.label_smoothing) + floor
        return targets if self.target_threshold is None else (targets > self.target_threshold).to(logits.dtype)


LARGE_FIRST_LOSS = 3.0  # times that of uniform logits
KNOWN_LOSSES = (ClassificationLoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)


@torch.no_grad()
def loss_of_uniform_logits(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor | None:
    """Return the loss of uniform logits; None for a custom loss."""
    is_known = isinstance(loss, KNOWN_LOSSES) or loss in (F.cross_entropy, F.binary_cross_entropy_with_logits)
    return loss(torch.zeros_like(logits), targets) if is_known else None


def first_loss_note(first: float, uniform: float) -> str | None:
    """Return a note if the first loss is far above that of uniform logits, else None."""
    if not first > LARGE_FIRST_LOSS * uniform > 0:
        return None
    return (
        f"the first loss is {first:.3g}, {first / uniform:.0f} times that of uniform logits ({uniform:.3g}): usually "
        "the head is for other classes or its initial weights are too large (model.head=new with pretrained weights), "
        "the preprocessing does not match the weights (data.mean, data.std), or optimizer.lr is too high"
    )


def resolve_loss(name: str, sections: Sequence[str], *, multi_label: bool) -> str:
    """Return the name of a recipe's loss; ``auto`` is that of the only section that is set, else the labels decide.

    Raises RunError for one that needs a single label.
    """
    if multi_label and name == "cross_entropy":
        raise RunError(
            "train.loss=cross_entropy needs one label per image, these have several; leave it at auto, which is bce, "
            "or set focal or asymmetric"
        )
    if name != "auto":
        return name
    return sections[0] if sections else "bce" if multi_label else "cross_entropy"


def resolve_class_weights(
    weighting: str | Sequence[float] | Mapping[str, float] | None,
    label_counts: np.ndarray,
    class_names: Sequence[str] = (),
) -> Tensor | None:
    """Return (K,) weights whose mean over the training set's labels is 1, or None.

    `label_counts` (K,) is how often each class occurs; ``balanced`` weighs by 1 / frequency; a list has a number for
    each class, a mapping for some of `class_names` (K), and the others have 1; ``effective_number`` weighs by
    (1 - b) / (1 - b^n) with b = 0.999 (Cui et al., arXiv 1901.05555). A class that never occurs keeps weight
    1. Multi-label: the weights multiply the positive labels. Raises DataError for weights that don't fit the classes.
    """
    if weighting is None:
        return None
    counts = label_counts.astype(np.float64)
    if weighting == "effective_number":
        raw = (1 - EFFECTIVE_BETA) / np.maximum(1 - EFFECTIVE_BETA ** np.maximum(counts, 1), 1e-12)
    elif isinstance(weighting, str):
        raw = np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)
    elif isinstance(weighting, Mapping):
        raw = _weights_by_name(weighting, class_names)
    elif len(weighting) == len(counts):
        raw = np.asarray(weighting, np.float64)
    else:
        raise DataError(
            f"train.class_weights has {format_count(len(weighting), 'number')}; the dataset has {len(counts)} "
            "classes: set one number of at least 0 for each, or some by name: {class name: weight}"
        )
    if raw.min() < 0 or not raw.any():
        raise DataError(
            f"train.class_weights is {shown(weighting)}; must be numbers of at least 0, at least one of them above 0"
        )
    weights = raw * counts.sum() / max((raw * counts).sum(), 1e-12)
    weights[counts == 0] = 1.0
    return torch.tensor(weights, dtype=torch.float32)


def _weights_by_name(weights: Mapping[str, float], class_names: Sequence[str]) -> np.ndarray:
    """Return the weights (K,) of classes given by name; 1 for classes that are not named."""
    unknown = [name for name in weights if name not in class_names]
    if unknown:
        raise DataError(
            f"train.class_weights: {', '.join(map(repr, unknown[:3]))} is not a class of the data set."
            f"{nearest(unknown[0], class_names)} Its classes are {shortened(class_names, 30)}"
        )
    return np.array([weights.get(name, 1.0) for name in class_names], np.float64)
