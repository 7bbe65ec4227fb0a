"""All rules of `auto`, in one table: RULES maps each key of a recipe to the function that decides it.

A rule takes plain values and returns its decision with the reason. `decide` calls it once per start, unless the recipe
sets the key, or the launcher, a stored tuning or the run's first start has decided it, and records the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from hf_fasttrain.data.pixels.decode import MAX_JPEG_SIDE
from hf_fasttrain.data.pixels.rgb import default_range
from hf_fasttrain.from_recipe.accelerator import launcher_precision, local_processes, user_threads
from hf_fasttrain.from_recipe.tunings import Presets, current_machine, stored_tuning
from hf_fasttrain.models.head import keeps_head
from hf_fasttrain.models.memory_forecast import equal_micro_batch_size
from hf_fasttrain.recipe.load import flatten, with_values
from hf_fasttrain.recipe.messages import flow_text
from hf_fasttrain.recipe.resolved import Decision, ResolvedSettings, is_open
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.final_weights import resolve_final
from hf_fasttrain.train.launcher import uses_gpu
from hf_fasttrain.train.linear_probe import Neighbors, fit_regression
from hf_fasttrain.train.loss import resolve_loss
from hf_fasttrain.train.metrics import resolve_metrics
from hf_fasttrain.train.schedule import resolve_warmup
from hf_fasttrain.utils.environment import num_cores
from hf_fasttrain.utils.format import format_bytes

MACHINE = "machine"  # recorded, so that a resumed run knows whether it was started on this machine
MIN_EVAL_BATCH = 32  # images


class Choice(NamedTuple):
    """A rule's decision and its reason."""

    value: Any
    reason: str


def split(*, name: str, images: int) -> Choice:
    """Return the split that `data/source` found by its name."""
    return Choice(name, f"{images:,} images")


def column(*, name: str | list[str]) -> Choice:
    """Return the column that `data/source` found by type and name, or the columns that are one class each."""
    return Choice(name, "found")


def preprocessing(*, value: Any) -> Choice:
    """Return the preprocessing that the pretrained model was trained with."""
    return Choice(value, "the model's configuration")


def value_range(*, kind: str = "", number: int = 0, lowest: float = 0, highest: float = 0) -> Choice:
    """Return the values of grey images of more than 8 bits that become black and white, or auto: those of their mode.

    `number` such images of `kind` (integers, floats, both) were found in a sample, with these extremes. Numbers are
    taken to have 8, 10, 12, 14 or 16 bits, floats of at most 1 to be shares; of others, such as normalised ones,
    nothing is known.
    """
    if not number:
        return Choice("auto", "no grey of more than 8 bits in a sample of the training images")
    found = f"{number} sampled {'image has' if number == 1 else 'images have'} values from {lowest:g} to {highest:g}"
    is_float = kind == "floats"
    if is_float and highest <= 1.01:
        return Choice("auto", found)
    white = next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if highest < 2**bits), None)
    if white is None or kind == "both" or lowest < -0.01 * highest * is_float or highest < (16 if is_float else 1):
        return Choice("auto", f"not decided: {found}")
    return Choice("auto" if white == default_range("I").high and not is_float else [0, white], found)


def reduced_decode(
    *, size: int, crop: str, scale: Sequence[float], ratio: Sequence[float], short_side: int | None
) -> Choice:
    """Return how many pixels the sides of JPEGs keep when they are decoded at a fraction of their size, or False.

    The smallest random crop then is as large as the batch's images, and most crops are two or three times as large:
    their pixels differ from those of a full decode as little as Pillow's `thumbnail`, 0.2 to 0.9 of 255 levels on
    average. Twice the short side is what `thumbnail` itself decodes.
    """
    if short_side is not None:
        return Choice(2 * short_side, "twice data.short_side")
    if crop != "random_resized":
        return Choice(False, "for random_resized crops and data.short_side only")
    smallest = math.sqrt(scale[0] * min(ratio[0], 1 / ratio[1], 1))  # crop's side, as a share of the image's
    if smallest * MAX_JPEG_SIDE < size:
        return Choice(False, "augment.crop_scale allows crops of any size")
    return Choice(math.ceil(size / smallest), f"the smallest random crop has {size} pixels")


def cache(
    *,
    passes: float,
    needed: int = 0,
    memory: int = 0,
    disk: int = 0,
    on_disk: int = 0,
    fits_device: bool = False,
) -> Choice:
    """Return where the decoded pixels of a split that is read `passes` times are cached.

    In bytes: `needed` for all its pixels, `memory` and `disk`: available for the cache, `on_disk`: cached there by an
    earlier run. `fits_device`: whether the pixels fit into a GPU's memory.
    """
    if passes <= 1:
        return Choice("none", "each image is needed once")
    reason = f"{format_bytes(needed)} of pixels"
    if disk and 0.9 * needed < on_disk:
        return Choice("disk", reason)
    if fits_device:
        return Choice("device", reason)
    for mode, room in (("memory", memory), ("disk", disk)):
        if needed <= room:
            return Choice(mode, reason)
    return Choice("none", f"{reason}, {format_bytes(memory)} of memory and {format_bytes(disk)} of disk to spare")


def cache_gb(*, free: int, needed_elsewhere: int = 0) -> Choice:
    """Return how many bytes of free memory or disk the cache may take."""
    return Choice((free - needed_elsewhere) // 2, "half of what is free")


def keep_features(*, hindrance: str | None, passes: float, needed: int, memory: int) -> Choice:
    """Return whether features are kept instead of images in the steps in which only the head is trained.

    These go over the images `passes` times. `hindrance`: what changes the features of an image, None if nothing does.
    In bytes: `needed` for all features, and the `memory` that they may take.
    """
    if hindrance is not None:
        return Choice(False, f"{hindrance} needs the images")
    if passes <= 1:
        return Choice(False, "each image is needed once")
    reason = f"{format_bytes(needed)} of features instead of {passes:g} passes"
    return Choice(needed <= memory, reason if needed <= memory else f"{reason}, {format_bytes(memory)} to spare")


def workers(*, gpu: bool, cores: int, processes: int) -> Choice:
    """Return the number of loader processes for each of the `processes` training processes of this machine."""
    if not gpu:
        return Choice(1, "one on a CPU")
    return Choice(max(1, min(16, cores // processes)), "the cores of each training process, at most 16")


def pin_memory(*, gpu: bool) -> Choice:
    """Return whether batches are in page-locked memory."""
    return Choice(gpu, "a GPU" if gpu else "there is no GPU")


def mixed_precision(*, gpu: bool, has_bf16: bool) -> Choice:
    """Return no, bf16 or fp16; `has_bf16`: whether the GPU supports bf16 in hardware."""
    if not gpu:
        return Choice("no", "on a CPU bf16 is slower for many models; try bf16")
    return Choice("bf16", "the GPU has it") if has_bf16 else Choice("fp16", "the GPU has no bf16")


def channels_last() -> Choice:
    """Return whether images have the memory layout NHWC."""
    return Choice(True, "rarely slower")


def compiled() -> Choice:
    """Return whether the model is compiled."""
    return Choice(False, "compiling takes minutes")


def fp32_precision() -> Choice:
    """Return the precision of fp32 matrix products and convolutions."""
    return Choice("high", "TF32 where the GPU has it")


def cpu_threads(*, user_threads: int | None, cores: int, processes: int) -> Choice:
    """Return the number of threads of each of the `processes` that train on this machine's CPU."""
    if user_threads:
        return Choice(user_threads, "OMP_NUM_THREADS of the user")
    return Choice(max(1, cores // processes), f"{cores} cores / {processes} processes")


def micro_batch_size(*, requested: int, share: int, largest: int, limit: str = "") -> Choice:
    """Return the micro-batch: `requested`, or less if a process's `share` of a step exceeds `largest`.

    `limit` explains `largest`.
    """
    if share <= largest:
        return Choice(requested, "images per process and forward")
    reason = f"the fewest equal parts of {share} images of at most {largest}: {limit}"
    return Choice(equal_micro_batch_size(share, largest), reason)


def accumulation_steps(*, share: int, micro_batch_size: int) -> Choice:
    """Return the number of micro-batches in a process's share of a step."""
    return Choice(math.ceil(share / micro_batch_size), f"{share} images per process in micro-batches")


def evaluation_batch_size(*, micro_batch_size: int, bytes_per_image: int = 0, room: int | None = None) -> Choice:
    """Return the batch size of evaluation, during training as well as in `evaluate` and `predict`.

    `micro_batch_size`: of the training, 0 if unknown; `room`: bytes that evaluation may take, None if unknown, as on a
    GPU.
    """
    default = max(MIN_EVAL_BATCH, micro_batch_size)
    largest = default if room is None else max(1, room // max(1, bytes_per_image))
    if largest < default:
        return Choice(largest, "as many as fit into half of the free memory")
    return Choice(default, f"accelerate.micro_batch_size, at least {MIN_EVAL_BATCH}")


def mode(*, watch: Watch) -> Choice:
    """Return max or min for a watched metric, by its name."""
    return Choice(watch.mode, f"{'lower' if watch.mode == 'min' else 'higher'} {watch.metric} is better")


def final(*, early_stopping: Watch | None) -> Choice:
    """Return which weights a run ends with."""
    return Choice(resolve_final("auto", early_stopping), f"{'with' if early_stopping else 'without'} early_stopping")


RULES: dict[str, Callable[..., Choice]] = {
    "model.keep_features": keep_features,
    "data.train_split": split,
    "data.eval_split": split,
    "data.image_column": column,
    "data.label_column": column,
    "data.split_column": column,
    "data.mean": preprocessing,
    "data.std": preprocessing,
    "data.interpolation": preprocessing,
    "data.crop_pct": preprocessing,
    "data.value_range": value_range,
    "data.reduced_decode": reduced_decode,
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
    "evaluate.batch_size": evaluation_batch_size,
    "early_stopping.mode": mode,
    "checkpoint.best.mode": mode,
    "schedule.mode": mode,
    "checkpoint.final": final,
}
# Decided by functions that also serve trainers without a recipe.
DECIDED_ELSEWHERE: dict[str, Callable[..., Any]] = {
    "model.head": keeps_head,
    "train.loss": resolve_loss,
    "probe.strength": fit_regression,
    "probe.neighbors": Neighbors,
    "schedule.warmup": resolve_warmup,
    "evaluate.metrics": resolve_metrics,
}


def decide(settings: ResolvedSettings, key: str, **inputs: Any) -> Any:
    """Return and record a key's value in this run: as already decided, as set in the recipe, or else by its rule."""
    if key in settings.decisions:
        return settings.decisions[key].value
    if not settings.is_open(key):
        return flatten(settings.recipe)[key]
    choice = RULES[key](**inputs)
    return settings.record(key, choice.value, choice.reason)


def resolve_machine(recipe: Recipe, settings: ResolvedSettings, presets: Presets | None = None) -> Recipe:
    """Return the recipe with each `auto` that launcher, tuning or hardware decide replaced; nothing is measured.

    `presets` take precedence over the rules; by default they are those of the stored tuning. Values that the recipe
    sets do not change.
    """
    values, gpu = flatten(recipe), uses_gpu()
    settings.record(MACHINE, current_machine(), "what `auto` was decided for")
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
        inputs = {"user_threads": user_threads(), "cores": num_cores(), "processes": local_processes()}
        decide(settings, "accelerate.cpu_threads", **inputs)
    return with_values(recipe, {key: d.value for key, d in settings.decisions.items() if is_open(key, values)})


def _launcher_decisions(values: dict[str, Any]) -> dict[str, Decision]:
    """Return the launcher's precision if the recipe leaves it open and the device supports it."""
    key, precision = "accelerate.mixed_precision", launcher_precision()
    usable = precision == "bf16" or (precision == "fp16" and uses_gpu())
    decision = Decision(precision, "of the launch configuration", "launcher")
    return {key: decision} if usable and is_open(key, values) else {}


def _note_tuned(decisions: dict[str, Decision], settings: ResolvedSettings) -> None:
    by_reason: dict[str, list[str]] = {}
    for key, decision in decisions.items():
        if decision.kind == "tuned":
            by_reason.setdefault(decision.reason, []).append(f"{key}={flow_text(decision.value)}")
    for reason, assignments in by_reason.items():
        settings.note(f"auto, {reason}: {', '.join(assignments)}")
