"""What gpu.py measures, one function for each kind of row; needs no GPU to be imported or tried out."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.batch import Normalize
from hf_fasttrain.data.loader import Step
from hf_fasttrain.model import IMAGENET_MEAN, IMAGENET_STD, ModelSpec, build_model
from hf_fasttrain.runlog import RunLog

CLASSES, GOAL = 1000, 0.92
DTYPES = {"tf32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
CIFAR10_RECIPE = Path(__file__).parent.parent / "recipes/study/resnet50_cifar10.yaml"
# The study's 30 epochs of Adam do not fit beside the other rows; SGD's one-cycle gets there in half of them.
CIFAR10_OVERRIDES = (
    "data.eval_split=test",
    "data.test_split=null",
    "train.duration=15 epochs",
    "accelerate.gradient_accumulation_steps=1",
    "optimizer.name=sgd",
    "optimizer.lr=0.1",
    "optimizer.weight_decay=5e-4",
    "evaluate.every=1 epoch",
    "evaluate.batch_size=1000",
)


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured."""

    device: torch.device
    models: tuple[str, ...]
    image_px: int
    batch: int
    windows: int
    window_seconds: float

    @property
    def cuda(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Setting:
    """One row of the training table."""

    model: str
    precision: str
    channels_last: bool
    compile: bool

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"train {self.model} {self.precision} {layout}{' compile' if self.compile else ''}"


# --- training steps ----------------------------------------------------------------------------------------


def synthetic_batches(bench: Bench, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for ever `images` and `labels` of four uint8 batches on the device, normalised when asked for."""
    shape = (bench.batch, bench.image_px, bench.image_px, 3)
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, bench.device, channels_last=setting.channels_last)
    torch.manual_seed(1)  # both sides see the same images
    pixels = [torch.randint(0, 256, shape, dtype=torch.uint8, device=bench.device) for _ in range(4)]
    labels = [torch.randint(0, CLASSES, (bench.batch,), device=bench.device) for _ in range(4)]
    for index in itertools.cycle(range(4)):
        yield normalize(pixels[index]), labels[index]


def built_model(bench: Bench, setting: Setting) -> nn.Module:
    """Return the model on the device, in its memory layout, to be compiled at its first step if asked."""
    torch.manual_seed(0)  # both sides start from the same weights
    names = [str(i) for i in range(CLASSES)]
    model = build_model(ModelSpec(setting.model, names, bench.image_px)).to(bench.device).train()
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if setting.compile:
        model.compile(dynamic=False)
    return model


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return what both sides step."""
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def ours(bench: Bench, setting: Setting) -> Callable[[], Tensor]:
    """Return one step of the Trainer, as a function."""
    batches, model = synthetic_batches(bench, setting), built_model(bench, setting)
    precision = "no" if setting.precision == "tf32" else setting.precision
    accelerator = Accelerator(cpu=not bench.cuda, mixed_precision=precision)
    if precision != "no" and not accelerator.native_amp:
        raise RuntimeError(f"accelerate does not autocast to {precision} on {bench.device.type}")
    optimizer, log = build_optimizer(model), RunLog(None, show=False)
    trainer = Trainer(model, [None], optimizer, accelerator=accelerator, log=log)
    # The loader above is never read: steps are handed over one by one.
    shape = (3, bench.image_px, bench.image_px)
    steps = itertools.count()
    return lambda: trainer.train_step(Step(next(steps), bench.batch, 1, itertools.islice(batches, 1), shape))


def bare(bench: Bench, setting: Setting) -> Callable[[], Tensor]:
    """Return one step of a plain PyTorch loop, as a function."""
    batches, model = synthetic_batches(bench, setting), built_model(bench, setting)
    optimizer, dtype = build_optimizer(model), DTYPES[setting.precision]
    scaler = torch.amp.GradScaler(bench.device.type, enabled=dtype is torch.float16)

    def step() -> Tensor:
        images, labels = next(batches)
        with torch.autocast(bench.device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


SIDES = {"ours": ours, "bare": bare}


def warm(bench: Bench, build: Callable[[], Callable[[], Tensor]]) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    """Return a side's step, past compilation and the choice of kernels, and its warm-up time and peak memory."""
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    start = time.perf_counter()
    step = build()
    first_loss = float(step())
    for _ in range(3):
        step()
    bench.wait()
    warmup_seconds = time.perf_counter() - start
    if bench.cuda:  # only now: trying out kernels needs more than training does
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(3):
        step()
    bench.wait()
    step_seconds = (time.perf_counter() - start) / 3
    peak = torch.cuda.max_memory_allocated() - before if bench.cuda else None
    facts = {"warmup_seconds": warmup_seconds, "peak_memory_bytes": peak, "first_loss": first_loss}
    return step, {**facts, "step_seconds": step_seconds}


def measure_training(bench: Bench, setting: Setting) -> dict[str, Any]:
    """Return images/s of both sides, their ratio window by window, warm-up seconds and peak memory."""
    torch.set_float32_matmul_precision("high")  # TF32, and so for what autocast leaves in fp32
    torch.backends.cudnn.benchmark = True
    steps, facts = {}, {}
    for name, side in SIDES.items():
        steps[name], facts[name] = warm(bench, lambda side=side: side(bench, setting))
    losses = [fact["first_loss"] for fact in facts.values()]
    if not abs(losses[0] - losses[1]) <= 0.01 * abs(losses[1]):
        raise RuntimeError(f"the sides do not compute the same: first losses {losses}")
    longest = max(fact.pop("step_seconds") for fact in facts.values())
    number = max(2, round(bench.window_seconds / longest))
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    for index in range(bench.windows):
        for name in list(SIDES) if index % 2 else reversed(SIDES):
            start = time.perf_counter()
            for _ in range(number):
                steps[name]()
            bench.wait()
            rates[name].append(number * bench.batch / (time.perf_counter() - start))
    ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates["bare"], strict=True)]
    speed = {f"{name}_images_per_second": statistics.median(values) for name, values in rates.items()}
    spread = {"ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios)}
    return {**asdict(setting), "batch": bench.batch, "steps_per_window": number, **speed, **spread, "sides": facts}


# --- copies ------------------------------------------------------------------------------------------------


def measure_copies(bench: Bench) -> dict[str, Any]:
    """Return GB/s and images/s of non-blocking copies of uint8 batches, pinned and pageable."""
    shape = (bench.batch, bench.image_px, bench.image_px, 3)
    pageable = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(4)]
    pools = {"pinned": [t.pin_memory() if bench.cuda else t.clone() for t in pageable], "pageable": pageable}
    target = torch.empty(shape, dtype=torch.uint8, device=bench.device)
    seconds: dict[str, list[float]] = {name: [] for name in pools}
    for _ in range(bench.windows + 1):
        for name, pool in pools.items():
            start = time.perf_counter()
            for index in range(20):
                target.copy_(pool[index % 4], non_blocking=True)
            bench.wait()
            seconds[name].append((time.perf_counter() - start) / 20)
    row: dict[str, Any] = {"batch": bench.batch, "image_px": bench.image_px}
    for name, values in seconds.items():
        each = statistics.median(values[1:])
        row[name] = {"gb_per_second": target.nbytes / each / 1e9, "images_per_second": bench.batch / each}
    row["ratio"] = row["pinned"]["gb_per_second"] / row["pageable"]["gb_per_second"]
    return row


# --- CIFAR-10 ----------------------------------------------------------------------------------------------


class RaceTrainer(Trainer):
    """Trains until GOAL is reached or the time is up, and keeps nothing."""

    reached_seconds: float | None = None
    reached_step: int | None = None
    deadline: float = float("inf")

    def evaluate(self, loader: Any = None) -> dict[str, float]:
        """Note the seconds of training at which GOAL is first reached; the clock stands while evaluating."""
        metrics = super().evaluate(loader)
        if self.reached_seconds is None and metrics["accuracy"] >= GOAL:
            self.reached_seconds, self.reached_step = self.pace.train_seconds, self.state.step
        return metrics

    def save(self) -> None:
        """Save nothing."""

    def _should_stop(self) -> bool:
        return self.reached_seconds is not None or time.monotonic() > self.deadline


def race_cifar10(folder: Path | None, overrides: list[str], most_seconds: float) -> dict[str, Any]:
    """Return the seconds of training until GOAL, evaluations not counted; the accuracy got if it was not reached."""
    if folder is None:
        return {"status": "skipped: give the folder of CIFAR-10's parquet files with --cifar10"}
    with tempfile.TemporaryDirectory() as place:
        asked = [f"data.dataset={folder}", *CIFAR10_OVERRIDES, *overrides, f"output_dir={place}/run"]
        trainer = RaceTrainer.from_recipe(CIFAR10_RECIPE, asked)
        trainer.deadline = time.monotonic() + most_seconds
        result = trainer.fit()
    row = {"goal": GOAL, "seconds_to_goal": trainer.reached_seconds, "step": trainer.reached_step}
    row |= {"accuracy": result.metrics["accuracy"], "steps": result.steps, "of_steps": trainer.num_steps}
    row |= {"train_seconds": result.train_seconds, "images_per_second": result.images_per_second}
    row |= {"data_wait_fraction": result.data_wait_fraction, "peak_memory_bytes": result.peak_memory_bytes}
    status = "ok" if trainer.reached_seconds is not None else f"{GOAL:.0%} not reached"
    return {**row, "overrides": [*CIFAR10_OVERRIDES, *overrides], "status": status}
