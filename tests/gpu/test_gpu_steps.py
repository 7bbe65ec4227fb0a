"""One step: its arithmetic, memory layout and random numbers, and that it does not wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_kit import (
    distance,
    flat,
    make,
    nothing_waits,
    user_trainer,
    weights_of,
    wide_batches,
)
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.from_recipe import accelerator
from hf_fasttrain.train.ema import Ema

PRECISIONS = ("highest", "high", "medium")


@pytest.mark.parametrize("conv", PRECISIONS)
@pytest.mark.parametrize("matmul", PRECISIONS)
def test_t14_flags_can_be_read(matmul: str, conv: str, device: torch.device) -> None:
    accelerator.set_fp32_precision(matmul, conv)
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cuda.matmul.allow_tf32 == (matmul != "highest")
    assert torch.backends.cudnn.allow_tf32 == (conv != "highest")
    with torch.backends.cudnn.flags(enabled=True):  # which reads them
        pass


def test_t14_matmul_precision_is_as_requested(device: torch.device, record_property: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 1024 if device.type == "cuda" else 256
    one, other = (torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    images = torch.randn(16, 64, 16, 16, generator=generator, dtype=torch.float64)
    kernel = torch.randn(64, 64, 3, 3, generator=generator, dtype=torch.float64)
    for precision in PRECISIONS[:2]:
        accelerator.set_fp32_precision(precision, precision)
        product = one.float().to(device) @ other.float().to(device)
        convolved = nn.functional.conv2d(images.float().to(device), kernel.float().to(device))
        errors = {
            "matmul": distance(product.double().cpu(), one @ other),
            "conv": distance(convolved.double().cpu(), nn.functional.conv2d(images, kernel)),
        }
        record_property(f"errors {precision}", errors)
        assert max(errors.values()) < (1e-5 if precision == "highest" else 3e-3), "products are rounded"
        if precision == "high" and device.type == "cuda":  # a convolution may use other algorithms
            assert errors["matmul"] > 1e-4, "TF32 is not used"


class Watched(Trainer):
    """Forbids waiting in all steps but the first."""

    def train_step(self, step: Step) -> Tensor:
        if step.index == 0:
            return super().train_step(step)
        with nothing_waits(self.device):
            return super().train_step(step)


@pytest.mark.parametrize("data", ["workers", "on the device"])
def test_t01_a_step_does_not_wait(data: str, device: torch.device, run: Path) -> None:
    options = ["ema={decay: 0.9}", "augment.mixup=0.5", "augment.cutmix=0.5", "optimizer.clip_norm=1.0"]
    options += ["accelerate.mixed_precision=bf16", "accelerate.gradient_accumulation_steps=2", "log.every=6"]
    options += ["train.duration=6 steps", "augment.erase=0.5"]
    options += ["data.workers=2"] if data == "workers" else ["data.cache=device", "augment.crop=padded"]
    trainer = make(run, *options, kind=Watched)
    result = trainer.fit()
    assert result.steps == 6
    assert result.out_of_memory == []


def test_t04_weights_equal_those_of_a_cpu(device: torch.device, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares the update of three steps by the norm of the difference, since single small values mean nothing."""
    options = ["model.name=test_vit", "optimizer.name=sgd", "optimizer.lr=0.05", "train.duration=3 steps"]
    moved = {}
    with monkeypatch.context() as patch:
        for name, on_cpu in (("cpu", "true"), ("device", str(device.type == "cpu").lower())):
            patch.setenv("ACCELERATE_USE_CPU", on_cpu)
            trainer = make(run.with_name(name), *options)
            before = weights_of(trainer.raw_model)
            trainer.fit()
            moved[name] = flat(weights_of(trainer.raw_model)) - flat(before)
            assert trainer.device.type == ("cpu" if on_cpu == "true" else device.type)
    assert float(moved["cpu"].norm()) > 0
    assert distance(moved["device"], moved["cpu"]) < 1e-3


def gradients(run: Path, num_micro_batches: int, precision: str) -> Tensor:
    """Return the first step's gradients, from the given number of micro-batches."""
    options = ["model.name=test_vit", f"accelerate.mixed_precision={precision}", "augment.mixup=0.5"]
    trainer = make(
        run.with_name(f"{num_micro_batches}-{precision}"),
        *options,
        f"accelerate.gradient_accumulation_steps={num_micro_batches}",
    )
    trainer.step.accumulation.set_train_mode()
    (step,) = trainer.train_loader.steps(0, 1)
    assert step.num_micro_batches == num_micro_batches
    trainer.step.accumulation.accumulate(step, trainer.step.at(step))
    return torch.cat([p.grad.double().flatten().cpu() for p in trainer.step.parameters if p.grad is not None])


def test_t05_gradients_of_micro_batches_in_fp32(device: torch.device, run: Path) -> None:
    assert distance(gradients(run, 4, "no"), gradients(run, 1, "no")) < 1e-5


def test_t05_gradients_of_micro_batches_in_bf16(device: torch.device, run: Path) -> None:
    one, four = gradients(run, 1, "bf16"), gradients(run, 4, "bf16")
    cosine = float(one @ four / (one.norm() * four.norm()))
    assert cosine > 0.999


def test_t11_an_average_created_before_the_model_is_moved(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))
    ema = Ema(model, 0.5, warmup=False)
    first = flat(weights_of(model))
    model.to(memory_format=torch.channels_last)  # like moving to a GPU, it gives parameters new memory
    trainer = user_trainer(device, model, wide_batches(1, 16), ema=ema)
    trainer.fit()
    assert {tensor.device.type for tensor in ema.module.state_dict().values()} == {device.type}
    expected = (first + flat(weights_of(model))) / 2
    assert distance(flat(weights_of(ema.module)), expected) < 1e-6, "the average has not followed"


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_t12_activations_are_channels_last(mix: str, device: torch.device, run: Path) -> None:
    cuda = device.type == "cuda"
    options = [f"model.name={'resnet50' if cuda else 'test_resnet'}", f"data.image_size={224 if cuda else 32}"]
    options += [f"augment.{mix}=0.5", "data.cache=device", "augment.crop=padded", "train.duration=1 steps"]
    trainer = make(run, *options)
    other: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for kind, tensor in (("input", args[0]), ("output", output)):
                is_image = isinstance(tensor, Tensor) and tensor.ndim == 4 and min(tensor.shape[1:]) > 1
                if is_image and not tensor.is_contiguous(memory_format=torch.channels_last):
                    other.append(f"{kind} of {name or 'the model'}")

        return hook

    modules = list(trainer.raw_model.named_modules())
    for name, module in modules:
        module.register_forward_hook(look(name))
    trainer.fit()
    assert len(modules) > 10
    assert other == [], "not channels_last"


@pytest.mark.needs_gpu
def test_t12_no_kernel_changes_the_layout(device: torch.device, run: Path) -> None:
    options = ["model.name=resnet50", "data.image_size=224", "accelerate.mixed_precision=bf16"]
    trainer = make(run, *options, "train.duration=1 steps")
    trainer.fit()
    (step,) = trainer.train_loader.steps(1, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.train_step(step)
        torch.cuda.synchronize()
    names = {event.key for event in profiler.key_averages()}
    assert len(names) > 5
    assert [name for name in names if "nchwToNhwc" in name or "nhwcToNchw" in name] == []


class Draws(nn.Module):
    """Drops values at random and records the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 10)
        self.masks: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        images = self.dropout(torch.ones_like(images))
        if self.training:
            self.masks.append(images.detach().clone())
        return self.head(images.flatten(1))


def test_t20_dropout_repeats_after_resume(device: torch.device, run: Path) -> None:
    def trained(steps: int, begin: int = 0) -> list[Tensor]:
        model = Draws()
        trainer = user_trainer(device, model, wide_batches(4, 8), duration=f"{steps} steps", seed=0)
        trainer.state.step = begin
        torch.rand(steps, device=device)  # independent of earlier work
        model.masks.clear()
        trainer.fit()
        return model.masks[-(steps - begin) :]

    uninterrupted, resumed = trained(4), trained(4, begin=2)
    assert len(uninterrupted) == 4
    assert not torch.equal(uninterrupted[2], uninterrupted[3])
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted[2:], resumed, strict=True)), "other masks"


def test_t20_the_device_has_an_index(device: torch.device, run: Path) -> None:
    trainer = make(run)
    assert trainer.device.index == (0 if device.type == "cuda" else None)
    assert trainer.train_loader.prefetcher.device == trainer.device
