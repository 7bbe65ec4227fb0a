"""The sides that gpu.py compares: the same model, batches and optimizer, trained by three programs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, NativeScaler
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.batch import Normalize
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.models.model import IMAGENET_MEAN, IMAGENET_STD, ModelSpec, build_model
from hf_fasttrain.train.log import RunLog

CLASSES, POOL = 1000, 4  # classes; batches that are repeated
LR, WEIGHT_DECAY = 1e-3, 1e-2
DTYPES = {"fp32": None, "tf32": None, "fp16": torch.float16, "bf16": torch.bfloat16}

Batches = Iterator[tuple[Tensor, Tensor]]
MakeStep = Callable[[], Tensor]  # makes one step and returns its loss, on the device


@dataclass(frozen=True)
class Bench:
    """The configuration of the measurement."""

    device: torch.device
    models: tuple[str, ...]
    image_px: int
    batch: int
    windows: int  # of each side of a training row
    window_seconds: float
    rounds: int = 3  # of a technique's arms
    log_every: int = 10  # windows are multiples of it

    @property
    def cuda(self) -> bool:
        """Whether this runs on a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Synchronise the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def steps_of(self, step_seconds: float) -> int:
        """Return the number of steps of a window, from the seconds of one step."""
        return self.log_every * max(1, round(self.window_seconds / step_seconds / self.log_every))

    def used_bytes(self) -> int:
        """Return the device memory that tensors use now; 0 without a GPU."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def max_bytes(self) -> int | None:
        """Return the peak device memory of tensors since `forget_most`, None without a GPU."""
        return torch.cuda.max_memory_allocated() if self.cuda else None

    def forget_most(self) -> None:
        """Reset the peak of `max_bytes`."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Setting:
    """How a model is trained, whatever the program."""

    model: str
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.model} {self.precision} {layout}{' compile' if self.compile else ''}"


def random_batches(bench: Bench, device: torch.device, number: int) -> list[tuple[Tensor, Tensor]]:
    """Return a pool of uint8 batches (B, H, W, 3) and their labels, the same ones on each device."""
    shape = (number, bench.image_px, bench.image_px, 3)
    torch.manual_seed(1)
    return [
        (
            torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
            torch.randint(0, CLASSES, (number,), device=device),
        )
        for _ in range(POOL)
    ]


def device_batches(bench: Bench, setting: Setting) -> Batches:
    """Yield without end normalised `images` and `labels` from uint8 batches on the device."""
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, bench.device, channels_last=setting.channels_last)
    for pixels, labels in itertools.cycle(random_batches(bench, bench.device, bench.batch)):
        yield normalize(pixels), labels


def host_batches(bench: Bench, setting: Setting, number: int, *, pinned: bool) -> Batches:
    """Yield without end `number` images of uint8 batches in host memory, copied and normalised."""
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, bench.device, channels_last=setting.channels_last)
    pool = random_batches(bench, torch.device("cpu"), number)
    if pinned:
        pool = [(pixels.pin_memory(), labels.pin_memory()) for pixels, labels in pool]
    for pixels, labels in itertools.cycle(pool):
        moved = pixels.to(bench.device, non_blocking=True)
        yield normalize(moved), labels.to(bench.device, non_blocking=True)


def built_model(bench: Bench, setting: Setting) -> nn.Module:
    """Return the model on the device, in its memory layout; compiled at its first step if the setting says so."""
    torch.manual_seed(0)  # all sides start from the same weights
    names = [str(i) for i in range(CLASSES)]
    model = build_model(ModelSpec(setting.model, names, bench.image_px)).to(bench.device).train()
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if setting.compile:
        model.compile(dynamic=False)
    return model


def autocast(bench: Bench, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a forward pass."""
    dtype = DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(bench.device.type, dtype)


def bare(bench: Bench, setting: Setting) -> MakeStep:
    """Return one step of a plain PyTorch loop."""
    batches, model = device_batches(bench, setting), built_model(bench, setting)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=setting.precision == "fp16")

    def step() -> Tensor:
        images, labels = next(batches)
        with autocast(bench, setting.precision):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def timm_train(bench: Bench, setting: Setting) -> MakeStep:
    """Return one step of timm's train.py, with its optimizer factory, its scaler, and its meter that reads the loss."""
    batches, model = device_batches(bench, setting), built_model(bench, setting)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY, filter_bias_and_bn=False, fused=True
    )
    scaler = NativeScaler(device=bench.device.type) if setting.precision == "fp16" else None
    loss_function, losses = nn.CrossEntropyLoss().to(bench.device), AverageMeter()

    def step() -> Tensor:
        images, labels = next(batches)
        if setting.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(bench, setting.precision):
            loss = loss_function(model(images), labels)
        if scaler is not None:
            scaler(loss, optimizer, parameters=model.parameters())
        else:
            loss.backward()
            optimizer.step()
        losses.update(loss.item(), images.size(0))
        optimizer.zero_grad()
        return loss.detach()

    return step


class KeepsFirstLoss(Trainer):
    """A trainer that stores the loss of its first step."""

    first_loss: Tensor | None = None

    def train_step(self, step: Step) -> Tensor:
        """Make a step."""
        loss = super().train_step(step)
        if self.first_loss is None:
            self.first_loss = loss
        return loss


@dataclass
class Fit:
    """The measurements of a `Trainer.fit`."""

    windows: list[float] = field(default_factory=list)  # seconds of each
    warmup_seconds: float = 0.0
    step_seconds: float = 0.0  # right after the warm-up
    peak_memory_bytes: int | None = None  # in addition to what was in use before
    first_loss: float = 0.0
    skipped_steps: int = 0  # for which fp16's gradients were too large


class TimedBatches:
    """The loader for `Trainer.fit`, which times the steps of its batches.

    After a warm-up come `windows` windows of `number` steps. A window is timed from the request of its first batch to
    the request of the next window's first batch, and the device is synchronised at both; so everything that `fit` does
    between two steps is included. `others` is called before and after each window, except before the first.
    """

    def __init__(self, bench: Bench, batches: Batches, fit: Fit, number: int, windows: int) -> None:
        self.bench, self.batches, self.fit, self.number, self.windows = bench, batches, fit, number, windows
        self.began, self.used_before = time.perf_counter(), bench.used_bytes()
        self.others: Callable[[int, str], None] = lambda window, when: None

    @property
    def num_warmup(self) -> int:
        """Number of steps before the first window."""
        return 2 * self.bench.log_every

    def __len__(self) -> int:
        return self.num_warmup + self.windows * self.number + 1  # one more, whose beginning ends the last window

    def __iter__(self) -> Batches:
        bench, fit = self.bench, self.fit
        yield from itertools.islice(self.batches, bench.log_every)
        bench.wait()
        fit.warmup_seconds = time.perf_counter() - self.began
        bench.forget_most()  # only now: trying out kernels needs more than training does
        fit.step_seconds = yield from self._timed(bench.log_every)
        fit.step_seconds /= bench.log_every
        most = bench.max_bytes()
        fit.peak_memory_bytes = None if most is None else most - self.used_before
        for window in range(self.windows):
            self.others(window, "before")
            seconds = yield from self._timed(self.number)
            fit.windows.append(seconds)
            self.others(window, "after")
        yield from itertools.islice(self.batches, 1)

    def _timed(self, number: int) -> Generator[tuple[Tensor, Tensor], None, float]:
        """Yield batches, and return how long it took to train on them."""
        self.bench.wait()
        began = time.perf_counter()
        yield from itertools.islice(self.batches, number)
        self.bench.wait()
        return time.perf_counter() - began


def run_fit(bench: Bench, setting: Setting, loader: TimedBatches, *, micro_batches: int = 1) -> Fit:
    """Train a new model with `Trainer.fit` to the end of `loader`; return its measurements."""
    precision = "no" if DTYPES[setting.precision] is None else setting.precision
    accelerator = Accelerator(cpu=not bench.cuda, mixed_precision=precision, gradient_accumulation_steps=micro_batches)
    model = built_model(bench, setting)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=True)
    trainer = KeepsFirstLoss(
        model,
        loader,
        optimizer,
        accelerator=accelerator,
        accumulation_steps=micro_batches,
        log=RunLog(None, show=False),
        log_every=bench.log_every,
    )
    result = trainer.fit()
    if result.out_of_memory:
        raise torch.OutOfMemoryError(f"fit had to reduce its micro-batch size: {result.out_of_memory}")
    assert trainer.first_loss is not None
    loader.fit.first_loss, loader.fit.skipped_steps = float(trainer.first_loss), result.skipped_steps
    return loader.fit
