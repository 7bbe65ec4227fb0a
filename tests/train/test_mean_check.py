"""Whether a loss is a mean over its images, a sum, or neither; with random numbers, and at weights of zero."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.train.mean_check import NO_MEAN, SUM, UNKNOWN, mean_note
from hf_fasttrain.train.shared_draws import CannotShare, Draw, batch_dimensions, recorded_draws, shared_draws
from hf_fasttrain.train.step_loss import At, LossOfLogits
from hf_fasttrain.utils.errors import RunError

IMAGES, CLASSES = 12, 4
AT = At(1, 0, 0, 10)
Loss = Callable[..., Any]


class Classifier(nn.Module):
    """With batch norm and dropout, in which evaluation mode and training mode differ."""

    def __init__(self, *, zero_head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, CLASSES)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


class SequenceFirst(nn.Module):
    """A transformer whose tokens are (length, B, width): its dropout masks have the images in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2), nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images.view(len(images), 3, 4).transpose(0, 1)).mean(0))


def verdict(loss: Any, model: nn.Module, images: Any, targets: Any) -> str:
    """Return "mean", SUM, NO_MEAN or UNKNOWN; model and random states must stay as they are."""
    before, states = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    try:
        verdict = mean_note(loss, model, images, targets, AT) or "mean"
    except RunError as error:
        verdict = str(error)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(states, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    return UNKNOWN if verdict.startswith(UNKNOWN) else verdict


def batch(number: int = IMAGES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 2, 2, generator=generator)
    return images[:number], torch.randint(0, CLASSES, (IMAGES,), generator=generator)[:number]


def cross_entropy(reduction: str = "mean") -> Loss:
    return lambda model, images, targets, at: F.cross_entropy(model(images), targets, reduction=reduction)


def divergence(one: Tensor, other: Tensor, reduction: str) -> Tensor:
    return F.kl_div(one.log_softmax(1), other.softmax(1), reduction=reduction)


def two_passes(reduction: str, weight: float = 1.0) -> Loss:
    """R-Drop: cross-entropy and the divergence of two passes with other dropout masks."""

    def loss(model: nn.Module, images: Tensor, targets: Tensor, at: At) -> Tensor:
        one, other = model(images), model(images)
        return weight * F.cross_entropy(one, targets) + divergence(one, other, reduction)

    return loss


def two_views(reduction: str) -> Loss:
    return lambda model, images, targets, at: divergence(model(images), model(images.flip(-1)).detach(), reduction)


def noise(reduction: str) -> Loss:
    return lambda model, images, targets, at: F.cross_entropy(
        model(images + torch.randn_like(images)), targets, reduction=reduction
    )


def mixup(reduction: str, permute: Callable[[int], Any] = torch.randperm) -> Loss:
    def loss(model: nn.Module, images: Tensor, targets: Tensor, at: At) -> Tensor:
        share, others = np.random.beta(1, 1), torch.as_tensor(permute(len(images)))
        logits = model(share * images + (1 - share) * images[others])
        mixed = (share, targets), (1 - share, targets[others])
        return torch.stack([a * F.cross_entropy(logits, y, reduction=reduction) for a, y in mixed]).sum()

    return loss


def of_domains(model: nn.Module, images: Tensor, targets: Tensor, at: At) -> Tensor:
    """A mean over the images of each of two domains: the first are labelled, the others are not."""
    logits, labelled = model(images), targets >= 0
    losses = [F.cross_entropy(logits[labelled], targets[labelled])] if labelled.any() else []
    if not labelled.all():
        losses.append(logits[~labelled].softmax(1).square().mean())
    return torch.stack(losses).sum()


def contrastive(model: nn.Module, images: Tensor, targets: Tensor, at: At) -> Tensor:
    features = F.normalize(model(images), dim=1)
    return F.cross_entropy(features @ features.T, torch.arange(len(images)))


def in_bf16(model: nn.Module, images: Tensor, targets: Tensor, at: At) -> Tensor:
    return F.cross_entropy(model(images).bfloat16(), targets)


def sampled(model: nn.Module, images: Tensor, targets: Tensor, at: At) -> Tensor:
    logits = model(images)
    return F.cross_entropy(logits, logits.softmax(1).multinomial(1).flatten())


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (cross_entropy(), "mean"),
        (cross_entropy("sum"), SUM),
        (LossOfLogits(nn.CrossEntropyLoss(reduction="sum")), SUM),
        (LossOfLogits(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0, 9.0]))), NO_MEAN),
        (contrastive, NO_MEAN),
        (two_passes("batchmean"), "mean"),
        (two_passes("sum"), NO_MEAN),
        (two_passes("sum", 0.0), SUM),
        (noise("mean"), "mean"),
        (noise("sum"), SUM),
        (mixup("mean"), "mean"),
        (mixup("sum"), SUM),
        (mixup("mean", np.random.permutation), UNKNOWN),
        (mixup("mean", lambda number: random.sample(range(number), number)), UNKNOWN),
        (sampled, UNKNOWN),
        (in_bf16, "mean"),
        (lambda model, images, targets, at: 0 * model(images).sum(), UNKNOWN),
        (lambda model, images, targets, at: F.cross_entropy(model(images).view(IMAGES, -1), targets), UNKNOWN),
    ],
)
def test_means_sums_and_other_losses_are_distinguished(loss: Any, expected: str) -> None:
    assert verdict(loss, Classifier(), *batch()) == expected


@pytest.mark.parametrize(("reduction", "expected"), [("batchmean", "mean"), ("sum", SUM)])
def test_a_head_of_zeros_hides_nothing(reduction: str, expected: str) -> None:
    assert verdict(two_views(reduction), Classifier(zero_head=True), *batch()) == expected


@pytest.mark.parametrize(("reduction", "expected"), [("mean", "mean"), ("sum", SUM)])
def test_masks_may_have_the_images_in_any_dimension_and_a_batch_one_image(reduction: str, expected: str) -> None:
    assert verdict(cross_entropy(reduction), SequenceFirst(), *batch()) == expected
    assert verdict(cross_entropy(reduction), Classifier(), *batch(1)) == expected


@pytest.mark.parametrize("labelled", [1, 2, 4, 6])
@pytest.mark.parametrize("number", [2, 3, 6, 12])
def test_separate_means_over_two_domains_are_not_taken_for_a_sum(number: int, labelled: int) -> None:
    images, targets = batch(number)
    targets = targets.where(torch.arange(number) < labelled, -1)
    assert verdict(of_domains, Classifier(), images, targets) == (NO_MEAN if labelled < number else "mean")


def test_a_loss_that_remembers_images_is_not_judged() -> None:
    queue = [torch.zeros(20, CLASSES)]

    def loss(model: nn.Module, images: Tensor, targets: Tensor, at: At) -> Tensor:
        keys = F.normalize(model(images), dim=1)
        logits = torch.cat([keys.square().sum(1, keepdim=True), keys @ queue[0].T], 1)
        queue[0] = torch.cat([keys.detach(), queue[0]])[:20]
        return F.cross_entropy(logits, torch.zeros(len(images), dtype=torch.long))

    assert verdict(loss, Classifier(), *batch()) == UNKNOWN


def test_unlabelled_images_with_several_views_each_are_judged() -> None:
    def loss(model: nn.Module, images: dict[str, Tensor], targets: Tensor, at: At) -> Tensor:
        views = images["views"].flatten(0, 1)
        labelled, others = model(torch.cat([images["labelled"], views])).split([len(targets), len(views)])
        return F.cross_entropy(labelled, targets) + others.softmax(1).square().mean()

    images, targets = batch()
    views = torch.stack([images, images.flip(-1), 2 * images], 1)
    assert verdict(loss, Classifier(), {"labelled": images, "views": views}, targets) == "mean"


def test_every_draw_is_the_same_for_all_images() -> None:
    def draws(number: int) -> list[Tensor]:
        rows, generator = torch.zeros(number, 3), torch.Generator()
        dropped, _ = torch.native_dropout(torch.ones(number, 3), 0.5, True)
        return [
            F.dropout(torch.ones(number, 3)),
            dropped,
            torch.rand(number, 3, generator=generator),
            torch.randn_like(rows),
            torch.randint(0, 9, (number, 3)),
            torch.normal(0.0, 1.0, (number, 3)),
            rows.uniform_(),
            torch.rand(()).expand(number, 1),
        ]

    recorded: list[Draw] = []
    fewer: list[Draw] = []
    with recorded_draws(recorded):
        draws(6)
    with recorded_draws(fewer):
        draws(2)
    plan = recorded, batch_dimensions(recorded, fewer), torch.device("cpu")
    with shared_draws(*plan):
        of_six = draws(6)
    with shared_draws(*plan):
        of_four = draws(4)
    for six, four in zip(of_six, of_four, strict=True):
        assert torch.equal(six, six[:1].expand_as(six))
        assert torch.equal(four, six[:4])
    assert all(len(each.unique()) > 1 for each in of_six[2:-1])
    assert set(of_six[1].unique().tolist()) <= {0.0, 2.0}
    with pytest.raises(CannotShare), shared_draws(*plan):
        torch.rand(6, 3)
