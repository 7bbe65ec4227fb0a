"""Guarantee 2: gradients are those of the mean loss over a step's images, for any split."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.processes import run_processes
from torch import Tensor, nn

from hf_fasttrain.data.loading.batch import Mixing, Normalize
from hf_fasttrain.data.loading.loader import Step, TrainLoader
from hf_fasttrain.data.loading.prefetch import PixelBatch, Prefetcher
from hf_fasttrain.data.loading.sampler import MicroBatchKey, SamplingPlan, micro_batch_size_for
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.loss import ClassificationLoss
from hf_fasttrain.train.steps import Steps
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.utils.errors import RunError

NUM_CLASSES, SIZE, BATCH, NUM_IMAGES = 5, 8, 37, 37 * 3 + 11  # the last step of an epoch is short
CASES = ("hard", "mixed", "multi_label", "weighted", "bce")


class Images:
    """Random pixels and labels from a fixed seed."""

    def __init__(self, num_images: int, case: str) -> None:
        rng = np.random.default_rng(7)
        self.pixels = torch.from_numpy(rng.integers(0, 256, (num_images, SIZE, SIZE, 3), dtype=np.uint8))
        labels = torch.from_numpy(rng.integers(0, NUM_CLASSES, num_images))
        hot = torch.from_numpy(rng.integers(0, 2, (num_images, NUM_CLASSES)).astype(np.float32))
        self.labels = hot if case == "multi_label" else labels

    def max_bytes(self, num_images: int) -> int:
        return 0

    def make(self, key: MicroBatchKey, room: Tensor | None = None) -> PixelBatch:
        return PixelBatch(self.pixels[key.indices], self.labels[key.indices], ())


class NormalizeAs(Normalize):
    """Normalises to the given dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__([0.5] * 3, [0.3] * 3, torch.device("cpu"), channels_last=True)
        self.dtype = dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        return super().__call__(pixels).to(self.dtype)


def make_loss(case: str) -> ClassificationLoss:
    weights = torch.tensor([0.5, 2.0, 1.0, 0.8, 1.3]) if case == "weighted" else None
    if case == "bce":
        return ClassificationLoss(label_smoothing=0.1, binary=True, target_threshold=0.3, sum_classes=True)
    return ClassificationLoss(
        multi_label=case == "multi_label", label_smoothing=0.0 if case == "multi_label" else 0.1, class_weights=weights
    )


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2), nn.GELU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 3 * 3, NUM_CLASSES)).to(dtype)


def train(
    case: str,
    accumulation: int,
    *,
    optimizer: str = "sgd",
    dtype: torch.dtype = torch.float32,
    num_steps: int = 5,
    num_images: int = NUM_IMAGES,
    batch_size: int = BATCH,
) -> tuple[dict[str, Tensor], list[float]]:
    """Return the weights and logged losses after training by Trainer on this process's share."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    order = SamplingPlan(
        num_images=num_images,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size_for(batch_size, accelerator.num_processes, accumulation),
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    mixing = Mixing(0.8, 1.0, NUM_CLASSES) if case in ("mixed", "bce") else None
    prefetcher = Prefetcher(Images(num_images, case), accelerator.device, workers=0, pin_memory=False)
    model = make_model(dtype)
    losses: list[float] = []
    log = RunLog(show=False)
    log.train_line = lambda step, num_steps, values, pace=None: losses.append(values["loss"])  # type: ignore[method-assign]
    chosen = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=1e-2)
    )
    Trainer(
        model,
        TrainLoader(prefetcher, order, NormalizeAs(dtype), mixing, lambda _: SIZE),
        chosen,
        duration=f"{num_steps} steps",
        accelerator=accelerator,
        loss=make_loss(case).to(dtype),
        log=log,
        log_every=1,
    ).fit()
    return {name: value.detach() for name, value in model.state_dict().items()}, losses


def reference(case: str, *, num_steps: int = 5) -> tuple[dict[str, Tensor], list[float]]:
    """Return weights and losses of a plain PyTorch loop: complete steps with their mean loss."""
    images, model = Images(NUM_IMAGES, case), make_model(torch.float32)
    order = SamplingPlan(num_images=NUM_IMAGES, batch_size=BATCH, micro_batch_size=1000)
    normalize, loss = NormalizeAs(torch.float32), make_loss(case)
    mixing = Mixing(0.8, 1.0, NUM_CLASSES)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses = []
    for step in range(num_steps):
        (key,) = order.plan(step).micro_batches
        x, y, _ = images.make(key)
        x = normalize(x)
        if case in ("mixed", "bce"):
            x, y = mixing(x, y, step)
        logits = model(x)
        if case == "multi_label":
            per_image = F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)
        elif case == "bce":
            hard = (y * 0.9 + 0.1 / NUM_CLASSES > 0.3).float()
            per_image = F.binary_cross_entropy_with_logits(logits, hard, reduction="none").sum(1)
        else:
            targets = F.one_hot(y, NUM_CLASSES).float() if y.ndim == 1 else y
            targets = targets * 0.9 + 0.1 / NUM_CLASSES
            weights = torch.ones(NUM_CLASSES) if loss.class_weights is None else loss.class_weights
            per_image = -(targets * weights * logits.log_softmax(1)).sum(1)
        mean = per_image.mean()
        losses.append(mean.item())
        gradients = torch.autograd.grad(mean, list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                momentum[name].mul_(0.9).add_(gradient)
                p.sub_(0.1 * momentum[name])
    return {name: value.detach() for name, value in model.state_dict().items()}, losses


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("accumulation", [1, 2, 4, 5])
def test_accumulation_gives_the_weights_of_whole_steps(case: str, accumulation: int) -> None:
    weights, losses = train(case, accumulation)
    expected, expected_losses = reference(case)
    assert_same(weights, expected, 1e-5)
    assert losses == pytest.approx(expected_losses, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_accumulation_is_exact_in_float64_with_adamw(case: str) -> None:
    unsplit, _ = train(case, 1, optimizer="adamw", dtype=torch.float64)
    for accumulation in (2, 4, 5):
        split, _ = train(case, accumulation, optimizer="adamw", dtype=torch.float64)
        assert_same(split, unsplit, 1e-9)


def test_a_wrong_weighting_of_micro_batches_would_be_detected() -> None:
    """The comparison can fail: a short micro-batch weighted like a full one gives other weights."""
    unsplit, _ = train("hard", 1)
    other, _ = train("hard", 1, num_images=NUM_IMAGES - 1)
    with pytest.raises(AssertionError):
        assert_same(other, unsplit, 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_processes_give_the_weights_of_one(case: str, accumulation: int) -> None:
    expected, expected_losses = reference(case)
    for weights, losses in run_processes(train, case, accumulation):
        assert_same(weights, expected, 1e-5)
        assert losses == pytest.approx(expected_losses, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_two_processes_are_exact_in_float64_with_adamw(accumulation: int) -> None:
    unsplit, _ = train("mixed", 1, optimizer="adamw", dtype=torch.float64)
    for weights, _ in run_processes(train_float64, "mixed", accumulation):
        assert_same(weights, unsplit, 1e-9)


def train_float64(case: str, accumulation: int) -> tuple[dict[str, Tensor], list[float]]:
    return train(case, accumulation, optimizer="adamw", dtype=torch.float64)


def test_a_last_step_with_fewer_images_than_processes() -> None:
    """37 + 1 images: in the second step three of four processes have none."""
    unsplit, losses = train("hard", 1, num_images=BATCH + 1, num_steps=4)
    for weights, split_losses in run_processes(train_with_a_single_last_image, num_processes=4):
        assert_same(weights, unsplit, 1e-5)
        assert split_losses == pytest.approx(losses, rel=1e-5)


def train_with_a_single_last_image() -> tuple[dict[str, Tensor], list[float]]:
    return train("hard", 2, num_images=BATCH + 1, num_steps=4)


def norms_after_a_step_without_images() -> tuple[Tensor, Tensor]:
    """Train a model with batch norm on one pair of images for two processes, and return its statistics here."""
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    order = SamplingPlan(2, 2, 2, num_processes=accelerator.num_processes, process_index=accelerator.process_index)
    prefetcher = Prefetcher(Images(2, "hard"), accelerator.device, workers=0, pin_memory=False)
    loader = TrainLoader(prefetcher, order, NormalizeAs(torch.float32), None, lambda _: SIZE)
    trainer = Trainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), accelerator=accelerator)
    trainer.step.accumulation.set_train_mode()
    trainer.train_step(next(loader.steps(0, 1)))
    return model[1].running_mean.clone(), model[0].weight.detach().clone()


def test_a_process_without_images_does_not_change_batch_norm() -> None:
    (empty, weight0), (full, weight1) = run_processes(norms_after_a_step_without_images)
    assert torch.equal(empty, torch.zeros(4))
    assert not torch.equal(full, torch.zeros(4))
    assert torch.equal(weight0, weight1)


def test_a_step_of_one_image_keeps_batch_norm_statistics() -> None:
    """One image has no batch statistics: the running ones normalise it and do not change."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.BatchNorm1d(4))
    data = [(torch.randn(1, 3, 1, 1), torch.tensor([2]))]
    before = model[1].weight.detach().clone()
    Trainer(model, data, torch.optim.SGD(model.parameters(), lr=0.1), log=RunLog(show=False)).fit()
    assert torch.equal(model[2].running_mean, torch.zeros(4))
    assert not torch.equal(model[1].weight, before)


def trained_without_recipe(accumulation: int) -> dict[str, Tensor]:
    """Train with a user's own loader whose batches are this process's share: 5 and 3 images."""
    accelerator = Accelerator(cpu=True)
    images, model = Images(8, "hard"), make_model(torch.float32)
    pixels = NormalizeAs(torch.float32)(images.pixels)
    share = {(2, 0): slice(0, 5), (2, 1): slice(5, 8)}.get(
        (accelerator.num_processes, accelerator.process_index), slice(0, 8)
    )
    loader = [(pixels[share], images.labels[share])] * 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = RunLog(show=False)
    Trainer(model, loader, optimizer, accelerator=accelerator, accumulation_steps=accumulation, log=log).fit()
    return model.state_dict()


def test_a_user_loader_with_uneven_shares_and_accumulation() -> None:
    whole = trained_without_recipe(1)
    assert_same(trained_without_recipe(3), whole, 1e-5)
    for weights in run_processes(trained_without_recipe, 2):
        assert_same(weights, whole, 1e-5)


def test_a_loss_that_is_not_a_scalar_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randn(8, 3, 2, 2), torch.randint(3, (8,)))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, data, optimizer, loss=nn.CrossEntropyLoss(reduction="none"), log=RunLog(show=False))
    with pytest.raises(RunError, match=r"shape \(8,\); give Trainer a loss that returns the mean over the images"):
        trainer.fit()


class Twice(Trainer):
    """Iterates over each step's micro-batches twice."""

    same = 0

    def train_step(self, step: Step) -> Tensor:
        actual = []
        for _ in range(2):
            self.step.optimizer.zero_grad()
            loss = self.step.gradients(step)
            actual.append([loss.detach(), *(p.grad.clone() for p in self.step.parameters)])
        assert all(torch.equal(first, second) for first, second in zip(*actual, strict=True))
        self.same += 1
        self.step.update()
        return loss


def two_passes(accumulation: int, case: str, user_loader: bool) -> dict[str, Tensor]:
    """Train with two passes per step over a TrainLoader or a user loader; return the weights."""
    accelerator = Accelerator(cpu=True)
    processes, index = accelerator.num_processes, accelerator.process_index
    images, normalize = Images(NUM_IMAGES, case), NormalizeAs(torch.float32)
    size = micro_batch_size_for(BATCH, processes, accumulation)
    order = SamplingPlan(NUM_IMAGES, BATCH, size, num_processes=processes, process_index=index)
    prefetcher = Prefetcher(images, accelerator.device, workers=0, pin_memory=False)
    model = nn.Sequential(make_model(torch.float32), nn.Dropout(0.5))
    mixing = Mixing(0.8, 1.0, NUM_CLASSES) if case == "mixed" else None
    loader: Any = TrainLoader(prefetcher, order, normalize, mixing, lambda _: SIZE)
    if user_loader:
        loader = [(normalize(images.pixels)[index::processes], images.labels[index::processes])] * 3
    trainer = Twice(
        model,
        loader,
        torch.optim.SGD(model.parameters(), lr=0.1),
        accelerator=accelerator,
        accumulation_steps=accumulation,
        duration="3 steps",
        loss=make_loss(case),
        log=RunLog(show=False),
    )
    trainer.fit()
    assert trainer.same == 3
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("case", "user_loader"), [("hard", True), ("mixed", False)])
def test_a_steps_micro_batches_can_be_iterated_again(case: str, user_loader: bool) -> None:
    """The second pass gives bitwise the same gradients, including dropout masks and mixing."""
    for accumulation in (1, 3):
        two_passes(accumulation, case, user_loader)
        run_processes(two_passes, accumulation, case, user_loader)


def test_forward_backward_and_update_equal_the_complete_step() -> None:
    class Halves(Trainer):
        def train_step(self, step: Step) -> Tensor:
            loss = self.step.gradients(step)
            self.step.update()
            return loss

    def trained(kind: type[Trainer]) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Dropout(0.5))
        data = [(torch.randn(8, 3, 2, 2), torch.randint(3, (8,))) for _ in range(3)]
        kind(model, data, torch.optim.AdamW(model.parameters(), lr=0.1), log=RunLog(show=False)).fit()
        return model[1].weight.detach()

    assert torch.equal(trained(Halves), trained(Trainer))


def test_a_timer_gets_each_phase() -> None:
    seen: list[str] = []
    accelerator = Accelerator(cpu=True)
    prefetcher = Prefetcher(Images(8, "hard"), accelerator.device, workers=0, pin_memory=False)
    loader = TrainLoader(prefetcher, SamplingPlan(8, 8, 4), NormalizeAs(torch.float32), None, lambda _: SIZE)
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, loader, optimizer, accelerator=accelerator, log=RunLog(show=False))

    def timer(phase: str) -> Any:
        seen.append(phase)
        return nullcontext()

    trainer.step.time_by(timer)
    loader.timer = timer
    trainer.fit()
    one = ["wait", "copy", "forward", "backward"]
    assert seen == [*one, *one, "optimizer"]


def test_steps_can_be_skipped() -> None:
    accelerator = Accelerator(cpu=True)
    prefetcher = Prefetcher(Images(40, "hard"), accelerator.device, workers=0, pin_memory=False)
    loader = TrainLoader(prefetcher, SamplingPlan(40, 8, 4), NormalizeAs(torch.float32), None, lambda _: SIZE)
    steps = Steps(loader, 0, 5)
    assert steps.skip(2) == 16
    assert [step.index for step in steps] == [2, 3, 4]


def test_without_retry_memory_that_runs_out_ends_training() -> None:
    def short(logits: Tensor, targets: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randn(8, 3, 2, 2), torch.randint(3, (8,)))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, data, optimizer, loss=short, log=RunLog(show=False))
    trainer.step.is_settled = True
    trainer.retry.is_on = False
    with pytest.raises(RunError, match=r"out of memory with micro-batches of 8 images \(CUDA out of memory"):
        trainer.fit()
