"""The loss of a distillation: its formula, the teacher's images, and the same training as a plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.processes import reset_accelerate
from torch import Tensor, nn

from hf_fasttrain import RunError, Trainer
from hf_fasttrain.train.distillation import Distillation, TeacherLogits
from hf_fasttrain.train.loss import ClassificationLoss
from hf_fasttrain.train.step_loss import At

AT = At(1, 0, 0, 10)
HALF, IMAGENET = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
SPREAD = (0.229, 0.224, 0.225)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def teacher_logits(size: int = 8, columns: list[int] | None = None) -> TeacherLogits:
    """Return a teacher that wants other pixels than a student with mean and spread 0.5."""
    statistics = {"mean": IMAGENET, "std": SPREAD, "student_mean": HALF, "student_std": HALF}
    return TeacherLogits(network(1).eval().requires_grad_(False), size, columns=columns, **statistics)


def test_a_teacher_sees_the_pixels_normalised_as_it_wants_at_its_size_and_with_the_classes_in_our_order() -> None:
    pixels = torch.rand(3, 3, 8, 8)
    images = normalised(pixels, HALF, HALF).contiguous(memory_format=torch.channels_last)
    expected = network(1).eval()(normalised(pixels, IMAGENET, SPREAD))
    torch.testing.assert_close(teacher_logits()(images), expected.detach())
    torch.testing.assert_close(teacher_logits(columns=[4, 0])(images), expected[:, [4, 0]].detach())
    larger = F.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    expected = network(1).eval()(normalised(larger, IMAGENET, SPREAD))
    torch.testing.assert_close(teacher_logits(16)(images), expected.detach())
    mean = {"mean": HALF, "std": HALF, "student_mean": HALF, "student_std": HALF}
    unchanged = TeacherLogits(nn.Identity(), 8, **mean)  # type: ignore[arg-type]
    assert torch.equal(unchanged(images), images)


def test_the_loss_is_hintons() -> None:
    logits, taught, targets = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    loss = Distillation(F.cross_entropy, lambda images: taught, weight=0.3, temperature=4.0)
    total, values = loss(lambda images: logits, torch.zeros(6), targets, AT)  # type: ignore[arg-type]
    wanted = (taught / 4).softmax(1)
    divergence = 16 * (wanted * (wanted.log() - (logits / 4).softmax(1).log())).sum(1).mean()
    torch.testing.assert_close(values["distillation_loss"], divergence)
    torch.testing.assert_close(values["label_loss"], F.cross_entropy(logits, targets))
    torch.testing.assert_close(total, 0.7 * F.cross_entropy(logits, targets) + 0.3 * divergence)


@pytest.mark.parametrize("sum_classes", [False, True])
def test_with_several_labels_each_class_is_compared_alone(sum_classes: bool) -> None:
    logits, taught = torch.randn(6, 5), torch.randn(6, 5)
    loss = Distillation(
        ClassificationLoss(multi_label=True, sum_classes=sum_classes),
        lambda images: taught,
        weight=1.0,
        temperature=2.0,
        multi_label=True,
        sum_classes=sum_classes,
    )
    ours, theirs = (torch.distributions.Bernoulli(logits=value / 2) for value in (logits, taught))
    divergence = 4 * torch.distributions.kl_divergence(theirs, ours)
    total, _ = loss(lambda images: logits, torch.zeros(6), torch.ones(6, 5), AT)  # type: ignore[arg-type]
    torch.testing.assert_close(total, divergence.sum(1).mean() if sum_classes else divergence.mean())


def test_no_logits_can_not_be_distilled_into() -> None:
    loss = Distillation(F.cross_entropy, lambda images: images, weight=0.5, temperature=1.0)
    with pytest.raises(RunError, match=r"returns a tuple of 2 .*can't be distilled into"):
        loss(lambda images: (images, images), torch.zeros(2, 5), torch.zeros(2), AT)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_weights_are_those_of_a_plain_loop(accumulation: int) -> None:
    torch.manual_seed(0)
    data = [(normalised(torch.rand(12, 3, 8, 8), HALF, HALF), torch.randint(0, 5, (12,))) for _ in range(4)]
    plain, teacher = network(0).eval(), network(1).eval()  # in training, batch norm would depend on the split
    for norm in (module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.requires_grad_(False)
    ours = network(0)
    ours[1].requires_grad_(False)
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    for images, labels in data:
        logits = plain(images)
        with torch.no_grad():
            wanted = (teacher(normalised(images * 0.5 + 0.5, IMAGENET, SPREAD)) / 2).softmax(1)
        divergence = 4 * (wanted * (wanted.log() - (logits / 2).log_softmax(1))).sum(1).mean()
        loss = 0.4 * F.cross_entropy(logits, labels) + 0.6 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reset_accelerate()
    trainer = Trainer(
        ours,
        data,
        torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.5, momentum=0.9),
        accelerator=Accelerator(cpu=True),
        accumulation_steps=accumulation,
        step_loss=Distillation(F.cross_entropy, teacher_logits(), weight=0.6, temperature=2.0),
    )
    trainer.fit()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert set(trainer.step.values) == {"label_loss", "distillation_loss"}
