"""Every rule of `auto`, in one table: RULES has for each key of a recipe the function that decides it.

A rule takes plain values and returns what it decides, and why in words. `decide` calls it once in a start, unless the
recipe gives the key, or the launcher, a stored tuning or the run's first start has decided it; and records the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hf_fasttrain.from_recipe.accelerator import launcher_precision, local_processes, user_threads, uses_gpu
from hf_fasttrain.from_recipe.tunings import Presets, machine_here, stored_tuning
from hf_fasttrain.models.head import keeps_head
from hf_fasttrain.models.memory_forecast import equal_pieces
from hf_fasttrain.recipe.load import flatten, plain, with_values
from hf_fasttrain.recipe.resolved import Decision, ResolvedSettings, is_open
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.final_weights import resolve_final
from hf_fasttrain.train.metrics import resolve_metrics
from hf_fasttrain.train.schedule import resolve_warmup
from hf_fasttrain.utils.environment import num_cores
from hf_fasttrain.utils.format import format_bytes

MACHINE = "machine"  # recorded, so that a resumed run knows whether it began here
LEAST_EVALUATED = 32  # images at once


class Choice(NamedTuple):
    """What a rule decides, and why."""

    value: Any
    reason: str


# --- data ------------------------------------------------------------------------------------------------------


def split(*, name: str, images: int) -> Choice:
    """Return the split that `data.source` found by its name."""
    return Choice(name, f"{images:,} images")


def column(*, name: str) -> Choice:
    """Return the column that `data.columns` found by type and name."""
    return Choice(name, "found")


def preprocessing(*, value: Any) -> Choice:
    """Return what the model was trained with before."""
    return Choice(value, "the model's configuration")


def cache(
    *,
    passes: float,
    needed: int = 0,
    memory: int = 0,
    disk: int = 0,
    on_disk: int = 0,
    fits_device: bool = False,
) -> Choice:
    """Return where a split's pixels are kept that is gone through `passes` times; all others but the last in bytes.

    `needed` for all of its pixels, `memory` and `disk`: to spare, `on_disk`: those that an earlier run has kept there.
    """
    if passes <= 1:
        return Choice("none", "each image is needed once")
    why = f"{format_bytes(needed)} of pixels"
    if disk and 0.9 * needed < on_disk:
        return Choice("disk", why)
    if fits_device:
        return Choice("device", why)
    for mode, room in (("memory", memory), ("disk", disk)):
        if needed <= room:
            return Choice(mode, why)
    return Choice("none", f"{why}, {format_bytes(memory)} of memory and {format_bytes(disk)} of disk to spare")


def cache_gb(*, free: int, needed_elsewhere: int = 0) -> Choice:
    """Return how many bytes of the free memory or disk pixels may take."""
    return Choice((free - needed_elsewhere) // 2, "half of what is free")


def workers(*, gpu: bool, cores: int, processes: int) -> Choice:
    """Return the loader processes of a training process, of which this machine has `processes`."""
    if not gpu:
        return Choice(1, "one on a CPU")
    return Choice(max(1, min(16, cores // processes)), "the cores of each training process, at most 16")


def pin_memory(*, gpu: bool) -> Choice:
    """Return whether copies to the device come from page-locked memory."""
    return Choice(gpu, "a GPU" if gpu else "there is no GPU")


# --- accelerate ------------------------------------------------------------------------------------------------


def mixed_precision(*, gpu: bool, has_bf16: bool) -> Choice:
    """Return no, bf16 or fp16; `has_bf16`: whether the GPU has it in hardware."""
    if not gpu:
        return Choice("no", "on a CPU bf16 is slower for many models; try bf16")
    return Choice("bf16", "the GPU has it") if has_bf16 else Choice("fp16", "the GPU has no bf16")


def channels_last() -> Choice:
    """Return whether images lie as NHWC."""
    return Choice(True, "seldom slower")


def compiled() -> Choice:
    """Return whether the model is compiled."""
    return Choice(False, "compiling takes minutes")


def fp32_precision() -> Choice:
    """Return what fp32 products and convolutions may be rounded to."""
    return Choice("high", "TF32 where the GPU has it")


def cpu_threads(*, user_threads: int | None, cores: int, processes: int) -> Choice:
    """Return the threads of a process that trains on a CPU, of which this machine has `processes`."""
    if user_threads:
        return Choice(user_threads, "OMP_NUM_THREADS of the user")
    return Choice(max(1, cores // processes), f"{cores} cores / {processes} processes")


def micro_batch_size(*, whole: int, share: int, largest: int, limit: str = "") -> Choice:
    """Return the images of a forward: `whole`, unless a process's `share` of a step is above `largest`, by `limit`."""
    if share <= largest:
        return Choice(whole, "images per process and forward")
    why = f"the fewest equal pieces of {share} images of at most {largest}: {limit}"
    return Choice(equal_pieces(share, largest), why)


def accumulation_steps(*, share: int, micro_batch_size: int) -> Choice:
    """Return the micro-batches of a process's share of a step."""
    return Choice(math.ceil(share / micro_batch_size), f"{share} images per process in micro-batches")


# --- course of a training --------------------------------------------------------------------------------------


def warmup(*, schedule: str, num_steps: int, steps_per_epoch: int) -> Choice:
    """Return the steps of the rise that belongs to a schedule."""
    found = resolve_warmup("auto", schedule, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
    return Choice(f"{found.steps} steps", found.reason)


def evaluation_batch_size(*, micro_batch_size: int, bytes_per_image: int = 0, room: int | None = None) -> Choice:
    """Return the images of a forward without backward, in training as in `evaluate` and `predict`.

    `micro_batch_size`: of the training, 0 if there was none; `room`: bytes that evaluation may take, None if that is
    not known, as on a GPU.
    """
    usual = max(LEAST_EVALUATED, micro_batch_size)
    most = usual if room is None else max(1, room // max(1, bytes_per_image))
    if most < usual:
        return Choice(most, "half of the free memory is enough for so many")
    return Choice(usual, f"accelerate.micro_batch_size, at least {LEAST_EVALUATED}")


def mode(*, watch: Watch) -> Choice:
    """Return max or min for a watched metric, as its name says."""
    return Choice(watch.mode, f"{'lower' if watch.mode == 'min' else 'higher'} {watch.metric} is better")


def final(*, early_stopping: Watch | None) -> Choice:
    """Return which weights a run ends with."""
    return Choice(resolve_final("auto", early_stopping), f"{'with' if early_stopping else 'without'} early_stopping")


# --- the table -------------------------------------------------------------------------------------------------

RULES: dict[str, Callable[..., Choice]] = {
    "data.train_split": split,
    "data.eval_split": split,
    "data.image_column": column,
    "data.label_column": column,
    "data.mean": preprocessing,
    "data.std": preprocessing,
    "data.interpolation": preprocessing,
    "data.crop_pct": preprocessing,
    "data.cache": cache,
    "data.cache_gb": cache_gb,
    "data.workers": workers,
    "data.pin_memory": pin_memory,
    "accelerate.mixed_precision": mixed_precision,
    "accelerate.channels_last": channels_last,
    "accelerate.compile": compiled,
    "accelerate.matmul_precision": fp32_precision,
    "accelerate.conv_precision": fp32_precision,
    "accelerate.cpu_threads": cpu_threads,
    "accelerate.micro_batch_size": micro_batch_size,
    "accelerate.gradient_accumulation_steps": accumulation_steps,
    "schedule.warmup": warmup,
    "evaluate.batch_size": evaluation_batch_size,
    "early_stopping.mode": mode,
    "checkpoint.best.mode": mode,
    "checkpoint.final": final,
}
# Decided where they are used, as they are for who has no recipe; recorded as the recipe gives them.
ELSEWHERE: dict[str, Callable[..., Any]] = {"model.head": keeps_head, "evaluate.metrics": resolve_metrics}


def decide(settings: ResolvedSettings, key: str, **known: Any) -> Any:
    """Return what a key is in this run, and record it: as decided before, as the recipe gives it, else by its rule."""
    if key in settings.decisions:
        return settings.decisions[key].value
    if not settings.is_open(key):
        return flatten(settings.recipe)[key]
    choice = RULES[key](**known)
    return settings.record(key, choice.value, choice.reason)


# --- what is decided before anything is built ------------------------------------------------------------------


def resolve_machine(recipe: Recipe, settings: ResolvedSettings, presets: Presets | None = None) -> Recipe:
    """Return the recipe with `auto` replaced where launcher, tuning, processor or GPU decide it; nothing is measured.

    `presets` go before the rules; by default those of the stored tuning. Values in the recipe stay as they are.
    """
    values, gpu = flatten(recipe), uses_gpu()
    settings.record(MACHINE, machine_here(), "what `auto` was decided for")
    presets = stored_tuning(recipe) if presets is None else presets
    decisions = {key: d for key, d in presets.decisions.items() if d.value is not None and is_open(key, values)}
    decisions |= _launcher_decisions(values)
    settings.decisions |= decisions
    _note_tuned(decisions, settings)
    has_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    decide(settings, "accelerate.mixed_precision", gpu=gpu, has_bf16=has_bf16)
    for name in ("channels_last", "compile", "matmul_precision", "conv_precision"):
        decide(settings, f"accelerate.{name}")
    if not gpu:
        known = {"user_threads": user_threads(), "cores": num_cores(), "processes": local_processes()}
        decide(settings, "accelerate.cpu_threads", **known)
    return with_values(recipe, {key: d.value for key, d in settings.decisions.items() if is_open(key, values)})


def _launcher_decisions(values: dict[str, Any]) -> dict[str, Decision]:
    """Return the launcher's precision where the recipe leaves it open and the device has it."""
    key, precision = "accelerate.mixed_precision", launcher_precision()
    usable = precision == "bf16" or (precision == "fp16" and uses_gpu())
    decision = Decision(precision, "of the launch configuration", "launcher")
    return {key: decision} if usable and is_open(key, values) else {}


def _note_tuned(decisions: dict[str, Decision], settings: ResolvedSettings) -> None:
    by_reason: dict[str, list[str]] = {}
    for key, decision in decisions.items():
        if decision.kind == "tuned":
            by_reason.setdefault(decision.reason, []).append(f"{key}={plain(decision.value)}")
    for reason, pairs in by_reason.items():
        settings.note(f"auto, {reason}: {', '.join(pairs)}")
