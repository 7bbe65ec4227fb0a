"""Helpers of the GPU tests: small trainings, limited memory, detection of synchronisation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers.processes import reset_accelerate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fasttrain import Trainer
from hf_fasttrain.from_recipe.accelerator import set_fp32_precision
from hf_fasttrain.train.log import RunLog

RECIPE = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 32, workers: 0, cache: none, eval_fraction: 0.05}
train: {duration: 4 steps, batch_size: 32}
accelerate: {mixed_precision: "no", matmul_precision: highest, conv_precision: highest}
schedule: {name: constant}
evaluate: {every: 1000 steps}
checkpoint: {every: 1000 steps}
log: {report: false, every: 1}
"""
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")  # operations that return a value to the host


def forget_settings() -> None:
    """Restore torch's settings and free the GPU memory that tests still hold."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False
    set_fp32_precision("highest", "high")  # torch's own defaults
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make(run: Path, *overrides: str, resume: bool = False, kind: type[Trainer] = Trainer) -> Trainer:
    """Return the trainer of the small recipe with overrides."""
    reset_accelerate()
    recipe = run.parent / f"{run.name}.yaml"
    recipe.write_text(RECIPE)
    return kind.from_recipe(recipe, [f"output_dir={run}", *overrides], resume=resume)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's tensors on the host."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """Return all floating-point tensors as one float64 vector."""
    return torch.cat([tensor.double().flatten() for tensor in tensors.values() if tensor.is_floating_point()])


def distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of a difference relative to the norm of the second."""
    return float((one - other).norm() / other.norm())


class ReadsValues(TorchDispatchMode):
    """Raises where the host reads a value from a tensor, which would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"called a synchronizing operation: {func}")
        return func(*args, **(kwargs or {}))


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """F.one_hot without reading the labels, which it does on a CPU but not on a GPU."""
    return torch.eye(num_classes, dtype=torch.int64)[labels]


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError where the host waits for the device; on a CPU where it reads values."""
    if device.type == "cpu":
        with ReadsValues(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "one_hot", _one_hot)
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocated(device: torch.device) -> int:
    """Return the bytes of all tensors on the device; on a CPU of those that Python references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    tensors = (value for value in gc.get_objects() if issubclass(type(value), Tensor))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak_of(device: torch.device, work: Callable[[], Any]) -> int:
    """Return the peak bytes of `work` in addition to those allocated before; 0 on a CPU."""
    if device.type == "cpu":
        work()
        return 0
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def allow(device: torch.device, more_bytes: int | None) -> None:
    """Limit this process to so many bytes in addition to those allocated now; None: no limit."""
    if device.type == "cpu":
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    limit = total if more_bytes is None else torch.cuda.memory_reserved(device) + more_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def fail_above(model: nn.Module, max_images: int) -> None:
    """On a CPU, make forwards of more images fail as if out of memory."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > max_images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(hook)


class Wide(nn.Module):
    """A model with batch norm and a few large activations: 4 KB x `width` per image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 2, 3, 1).flatten(0, 2)
        wide = torch.relu(self.norm(self.inner(pixels)))
        return self.head(wide.view(len(images), -1, wide.shape[-1]).mean(1))


def wide_batches(number: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Return batches of 32 px images with labels, on the host."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(number)
    ]


def user_trainer(
    device: torch.device,
    model: nn.Module,
    batches: Any,
    *,
    kind: type[Trainer] = Trainer,
    name: str = "SGD",
    precision: str = "no",
    lr: float = 0.01,
    **options: Any,
) -> Trainer:
    """Return a trainer of user objects that writes nothing."""
    reset_accelerate()
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=options.get("accumulation_steps", 1),
    )
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=lr, fused=True)
    log = RunLog(options.get("output_dir"), show=False)
    return kind(model, batches, optimizer, accelerator=accelerator, log=log, report=False, **options)


def overflow(gradient: Tensor) -> Tensor:
    """Return a gradient whose large values are inf, as those of fp16 above 65,504."""
    return torch.where(gradient.abs() > 2.0**100, torch.inf, gradient)


def scaled_trainer(device: torch.device, scale: float, backoff: float, **options: Any) -> Trainer:
    """Return a trainer in fp16; on a CPU in fp32 with a loss scaled in the same way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))
    batches = wide_batches(4, 16)
    trainer = user_trainer(device, model, batches, precision="fp16" if device.type == "cuda" else "no", **options)
    if device.type == "cpu":
        next(model.parameters()).register_hook(overflow)
        scaler = torch.amp.GradScaler("cpu")
        trainer.accelerator.scaler = scaler
        wrapped = AcceleratedOptimizer(trainer.step.optimizer, device_placement=False, scaler=scaler)
        trainer.step.updater.optimizer = wrapped
    scaler = trainer.accelerator.scaler
    scaler._init_scale = scale
    scaler.set_backoff_factor(backoff)
    return trainer
