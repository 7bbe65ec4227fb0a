"""The measurements of gpu.py, one function for each kind of row; can be imported and tried without a GPU."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from gpu_sides import (
    Bench,
    Fit,
    MakeStep,
    Setting,
    TimedBatches,
    bare,
    device_batches,
    host_batches,
    run_fit,
    timm_train,
)

from hf_fasttrain.from_recipe.accelerator import set_fp32_precision

Row = dict[str, Any]
SIDES: dict[str, Callable[[Bench, Setting], MakeStep]] = {"bare": bare, "timm": timm_train}
OURS = "fit"


def forget_last() -> None:
    """Free memory and compiled code, and accelerate's state, whose precision is process-wide."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    free_memory()


def free_memory() -> None:
    """Free the device memory that is no longer referenced."""
    if torch.cuda.is_available():  # a collection takes half a second
        gc.collect()
        torch.cuda.empty_cache()


def set_precision(setting_precision: str) -> None:
    """Allow TF32 in convolutions and, except for fp32, in matrix products, as is PyTorch's default for convolutions.

    This also affects what autocast leaves in fp32. An earlier row may have left other settings.
    """
    set_fp32_precision("highest" if setting_precision == "fp32" else "high", "high")
    torch.backends.cudnn.benchmark = True


def spread_of(values: Iterable[float]) -> Row:
    """Return median, minimum and maximum."""
    numbers = list(values)
    return {"median": statistics.median(numbers), "least": min(numbers), "most": max(numbers)}


def turn(names: list[str], index: int) -> list[str]:
    """Return the order of turns: each round starts with the next one."""
    return names[index % len(names) :] + names[: index % len(names)]


def require_same(losses: dict[str, float], within: float) -> None:
    """Raise RuntimeError if the first losses differ, so that the sides do not compute the same."""
    least, most = min(losses.values()), max(losses.values())
    if not most - least <= within * abs(most):
        raise RuntimeError(f"the sides do not compute the same: first losses {losses}")


def warm(bench: Bench, setting: Setting, build: Callable[[Bench, Setting], MakeStep]) -> tuple[MakeStep, Fit]:
    """Return a program's step after compilation and kernel selection, and what was measured meanwhile."""
    before, began = bench.used_bytes(), time.perf_counter()
    step = build(bench, setting)
    seen = Fit(first_loss=float(step()))
    for _ in range(bench.log_every - 1):
        step()
    bench.wait()
    seen.warmup_seconds = time.perf_counter() - began
    bench.forget_most()
    seen.step_seconds = run_steps(bench, step, bench.log_every) / bench.log_every
    most = bench.max_bytes()
    seen.peak_memory_bytes = None if most is None else most - before
    return step, seen


def run_steps(bench: Bench, step: MakeStep, number: int) -> float:
    """Return the seconds of some steps."""
    bench.wait()
    began = time.perf_counter()
    for _ in range(number):
        step()
    bench.wait()
    return time.perf_counter() - began


def measure_training(bench: Bench, setting: Setting, row: Row) -> None:
    """Add images/s of all sides, the ratios of their windows, warm-up seconds and peak memory to a row.

    `fit` runs once, and the others have their turns between its windows.
    """
    row |= {**asdict(setting), "batch": bench.batch, "image_px": bench.image_px, "sides": {}}
    if setting.precision == "fp16" and not bench.cuda:
        row["status"] = "not run: fp16 needs a GPU"
        return
    set_precision(setting.precision)
    steps, seen = {}, {}
    for name, build in SIDES.items():
        steps[name], seen[name] = warm(bench, setting, build)
        row["sides"][name] = asdict(seen[name])
    number = bench.steps_of(max(side.step_seconds for side in seen.values()))
    row["steps_per_window"] = number
    seen[OURS] = Fit()
    loader = TimedBatches(bench, device_batches(bench, setting), seen[OURS], number, bench.windows)

    def others(window: int, when: str) -> None:
        names = turn([*SIDES, OURS], window)
        at = names.index(OURS)
        for name in names[:at] if when == "before" else names[at + 1 :]:
            seen[name].windows.append(run_steps(bench, steps[name], number))
        if when == "after":
            row["sides"] = summarise(bench, seen, number)  # here already, should time end before the next window

    loader.others = others
    run_fit(bench, setting, loader)
    row["sides"] = summarise(bench, seen, number)
    require_same({name: side.first_loss for name, side in seen.items()}, within=0.01)


def summarise(bench: Bench, seen: dict[str, Fit], number: int) -> dict[str, Row]:
    """Return side -> images/s, and the ratios of `fit` to the others in the windows of each round."""
    table: dict[str, Row] = {}
    for name, side in seen.items():
        images = number * bench.batch
        table[name] = {**asdict(side), "images_per_second": spread_of(images / s for s in side.windows)}
        if name != OURS:
            pairs = zip(seen[OURS].windows, side.windows, strict=True)
            table[name]["fit_to_this"] = spread_of(theirs / mine for mine, theirs in pairs)
    return table


@dataclass(frozen=True)
class Arm:
    """One way to train: the baseline, or a difference from it."""

    precision: str = "fp32"  # with TF32 in convolutions, as is PyTorch's default
    micro_batches: int = 1  # of each update
    batches: int = 1  # baseline's batches in an update
    pinned: bool = False


BASELINE = "baseline"
TECHNIQUES: dict[str, dict[str, Arm]] = {
    "ga": {
        BASELINE: Arm(),
        "each batch in 4 parts": Arm(micro_batches=4),
        "an update for 4 batches": Arm(micro_batches=4, batches=4),
    },
    "amp": {BASELINE: Arm(), "fp16": Arm(precision="fp16"), "bf16": Arm(precision="bf16")},
    "pm": {BASELINE: Arm(), "pinned": Arm(pinned=True)},
}


def measure_technique(bench: Bench, technique: str, model: str, row: Row) -> None:
    """Add images/s of the baseline and of one technique's arms to a row; each arm is a `Trainer.fit` in each round.

    The baseline: fp32, contiguous, full batches in pageable host memory that are copied in each step.
    """
    arms = dict(TECHNIQUES[technique])
    row |= {"technique": technique, "model": model, "batch": bench.batch, "image_px": bench.image_px}
    if not bench.cuda:
        for name, needs in (("fp16", "fp16"), ("pinned", "pinned memory")):
            if arms.pop(name, None) is not None:
                row.setdefault("not_run", {})[name] = f"{needs} needs a GPU"
    seen: dict[str, list[Fit]] = {name: [] for name in arms}
    seconds = fit_arm(bench, model, arms[BASELINE], bench.log_every).step_seconds
    for index in range(bench.rounds):
        for name in turn(list(arms), index):
            number = bench.steps_of(seconds * arms[name].batches)
            seen[name].append(fit_arm(bench, model, arms[name], number))
        row["arms"] = {name: compare(bench, arms[name], fits, seen[BASELINE]) for name, fits in seen.items()}
    require_same({name: fits[0].first_loss for name, fits in seen.items()}, within=0.05)


def fit_arm(bench: Bench, model: str, arm: Arm, number: int) -> Fit:
    """Return the seconds of a run of one arm with a window of `number` steps, per batch of the baseline."""
    forget_last()
    set_precision("fp32")
    setting, fit = Setting(model, arm.precision), Fit()
    batches = host_batches(bench, setting, arm.batches * bench.batch, pinned=arm.pinned)
    run_fit(bench, setting, TimedBatches(bench, batches, fit, number, 1), micro_batches=arm.micro_batches)
    fit.windows = [seconds / (number * arm.batches) for seconds in fit.windows]
    return fit


def compare(bench: Bench, arm: Arm, fits: list[Fit], baseline: list[Fit]) -> Row:
    """Return an arm's images/s, and its ratio to the baseline's in each round."""
    pairs = zip(fits, baseline, strict=True)
    return {
        **asdict(arm),
        "images_per_second": spread_of(bench.batch / fit.windows[0] for fit in fits),
        "to_baseline": spread_of(other.windows[0] / fit.windows[0] for fit, other in pairs),
        "peak_memory_bytes": fits[-1].peak_memory_bytes,
        "first_loss": fits[0].first_loss,
        "skipped_steps": sum(fit.skipped_steps for fit in fits),
    }


def measure_copies(bench: Bench, row: Row) -> None:
    """Add GB/s and images/s of non-blocking copies of uint8 batches, pinned and pageable, to a row."""
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
    row |= {"batch": bench.batch, "image_px": bench.image_px}
    for name, values in seconds.items():
        each = statistics.median(values[1:])
        row[name] = {"gb_per_second": target.nbytes / each / 1e9, "images_per_second": bench.batch / each}
    row["ratio"] = row["pinned"]["gb_per_second"] / row["pageable"]["gb_per_second"]
