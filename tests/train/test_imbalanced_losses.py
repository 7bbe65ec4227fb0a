"""Focal and asymmetric loss, compared with torchvision's and timm's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossMultiLabel, AsymmetricLossSingleLabel
from torchvision.ops import sigmoid_focal_loss

from hf_fasttrain.train.imbalanced_losses import AsymmetricLoss, FocalLoss
from hf_fasttrain.train.loss import ClassificationLoss, resolve_class_weights

torch.manual_seed(0)
LOGITS = 3 * torch.randn(12, 5, dtype=torch.float32)
LABELS = torch.randint(0, 5, (12,))
HOT = (torch.rand(12, 5) > 0.7).float()
SOFT = torch.rand(12, 5).softmax(1)
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0])


def value_and_gradient(loss: Any, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    logits = LOGITS.clone().requires_grad_()
    value = loss(logits, targets)
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value), gradient


def same(ours: Any, theirs: Any, targets: torch.Tensor) -> None:
    (value, gradient), (expected, expected_gradient) = (value_and_gradient(each, targets) for each in (ours, theirs))
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [LABELS, SOFT])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_without_focusing_is_cross_entropy(
    targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
) -> None:
    options: dict[str, Any] = {"class_weights": weights, "label_smoothing": smoothing}
    same(FocalLoss(0.0, **options), ClassificationLoss(**options), targets)


def test_focal_loss_is_the_papers() -> None:
    def paper(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(1)[torch.arange(len(logits)), targets]
        return (-WEIGHTS[targets] * (1 - p) ** 1.5 * p.log()).mean()

    same(FocalLoss(1.5, class_weights=WEIGHTS), paper, LABELS)
    same(
        FocalLoss(2.0, multi_label=True),
        lambda logits, targets: sigmoid_focal_loss(logits, targets, alpha=-1, gamma=2.0, reduction="mean"),
        HOT,
    )
    same(
        FocalLoss(2.0, multi_label=True, sum_classes=True),
        lambda logits, targets: sigmoid_focal_loss(logits, targets, alpha=-1, gamma=2.0, reduction="sum") / 12,
        HOT,
    )


def test_asymmetric_loss_is_timms() -> None:
    several = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05)
    same(AsymmetricLoss(4.0, 1.0, 0.05, multi_label=True, sum_classes=True), several, HOT)
    same(AsymmetricLoss(4.0, 1.0, 0.05, multi_label=True), lambda x, y: several(x, y) / 5, HOT)
    single = AsymmetricLossSingleLabel(gamma_pos=1, gamma_neg=4, eps=0.1)
    same(AsymmetricLoss(4.0, 1.0, label_smoothing=0.1), single, LABELS)


def losses() -> list[ClassificationLoss]:
    return [
        FocalLoss(0.5),
        FocalLoss(2.0, class_weights=WEIGHTS),
        AsymmetricLoss(class_weights=WEIGHTS),
        FocalLoss(2.0, binary=True),
        AsymmetricLoss(binary=True, class_weights=WEIGHTS),
    ]


@pytest.mark.parametrize("loss", losses())
def test_a_loss_is_the_mean_of_its_parts(loss: ClassificationLoss) -> None:
    whole = loss(LOGITS, LABELS)
    parts = sum(len(part) / 12 * loss(LOGITS[part], LABELS[part]) for part in torch.arange(12).split(5))
    assert float(whole) == pytest.approx(float(parts), rel=1e-5)


@pytest.mark.parametrize("loss", losses())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_certain_predictions_have_finite_gradients(loss: ClassificationLoss, dtype: torch.dtype) -> None:
    logits = (1000 * F.one_hot(LABELS, 5) - 500).to(dtype).requires_grad_()
    for targets in (LABELS, (LABELS + 1) % 5):
        (gradient,) = torch.autograd.grad(loss(logits, targets), logits)
        assert gradient.isfinite().all()


def test_weights_by_the_effective_number_of_images() -> None:
    counts = np.array([1000, 100, 10, 0])
    weights = resolve_class_weights("effective_number", counts)
    raw = [(1 - 0.999) / (1 - 0.999 ** max(1, n)) for n in counts]
    scale = counts.sum() / sum(w * n for w, n in zip(raw, counts, strict=True))
    assert weights is not None
    assert weights.tolist() == pytest.approx([raw[0] * scale, raw[1] * scale, raw[2] * scale, 1.0], rel=1e-5)
