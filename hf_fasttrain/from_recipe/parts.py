"""The parts of a training, built from a recipe: accelerator, data, model, sampling plan.

The rules of `auto` that decide them: auto.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from hf_fasttrain.data.loading.sampler import SamplingPlan, process_share
from hf_fasttrain.data.source.dataset import Source
from hf_fasttrain.from_recipe.accelerator import allow_compiling, build_accelerator
from hf_fasttrain.from_recipe.auto import accumulation_steps, resolve_machine
from hf_fasttrain.from_recipe.loaders import train_transform
from hf_fasttrain.from_recipe.memory import resolve_micro_batch
from hf_fasttrain.from_recipe.model_from import model_from
from hf_fasttrain.from_recipe.source_from import local_settings, source_from
from hf_fasttrain.from_recipe.tunings import Presets
from hf_fasttrain.models.memory_forecast import Forecast
from hf_fasttrain.models.model import (
    ModelSpec,
    batch_norms,
)
from hf_fasttrain.recipe.conflicts import without_effect
from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.utils.errors import RunError


def build_parts(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    dataset: Any = None,
    presets: Presets | None = None,
) -> Parts:
    """Return the parts of a recipe's training; nothing is written.

    `presets` go before the rules of `auto`; by default those of a stored tuning of this machine and model.
    """
    loaded = load_recipe(recipe, overrides)
    settings = ResolvedSettings(loaded, notes=without_effect(loaded))
    settings.record("local", local_settings(loaded, dataset), "settings that are paths or objects of this machine")
    resolved = resolve_machine(loaded, settings, presets)
    accelerator = build_accelerator(resolved, settings)
    source = source_from(resolved, dataset, settings)
    model, spec = model_from(resolved, source, accelerator.device, settings)
    _require_enough_images(resolved, len(source.train), accelerator.num_processes)
    micro = resolve_micro_batch(resolved, len(source.train), spec.num_classes, model, accelerator, settings)
    sampling_plan = _resolve_sampling(resolved, len(source.train), micro.size, model, accelerator, settings)
    if resolved.accelerate.compile is True:
        allow_compiling(num_shapes(resolved, spec, sampling_plan))
    return Parts(resolved, settings, accelerator, source, spec, model, sampling_plan, micro.forecast)


def num_shapes(recipe: Recipe, spec: ModelSpec, sampling_plan: SamplingPlan) -> int:
    """Return the largest number of batch shapes of a training and its evaluations."""
    assert spec.preprocessing is not None
    transform = train_transform(recipe, spec.preprocessing, sampling_plan.steps_per_epoch)
    epochs = 1 if transform.growth is None else transform.growth.until + 1
    sizes = {transform.size_at(epoch) for epoch in range(epochs)}
    steps = {0, sampling_plan.steps_per_epoch - 1}
    numbers = {len(key.indices) for step in steps for key in sampling_plan.plan(step).micro_batches}
    return len(sizes) * len(numbers) + 2  # evaluation: full batches and the last one


def _require_enough_images(recipe: Recipe, num_images: int, processes: int) -> None:
    """Raise RunError if a step has too few images for all processes and micro-batches, or drop_last drops all steps."""
    train, accumulation = recipe.train, recipe.accelerate.gradient_accumulation_steps
    micro_batches = 1 if accumulation == "auto" else accumulation
    pairs = (train.batch_size + 1) // 2
    if pairs < processes * micro_batches and (processes > 1 or micro_batches > 1):
        raise RunError(
            f"train.batch_size={train.batch_size} is too small for {processes} processes x {micro_batches} "
            f"accumulation steps of at least 2 images; raise it to {2 * processes * micro_batches} or use fewer"
        )
    if train.drop_last and num_images < train.batch_size:
        raise RunError(
            f"train.drop_last leaves nothing: {num_images} images, train.batch_size={train.batch_size}; "
            "lower the batch size or set train.drop_last=false"
        )


def _resolve_sampling(
    recipe: Recipe, num_images: int, size: int, model: nn.Module, accelerator: Accelerator, settings: ResolvedSettings
) -> SamplingPlan:
    """Return the sampling order with micro-batches of `size`, and record the settings that follow from it."""
    train, processes = recipe.train, accelerator.num_processes
    largest = len(process_share(train.batch_size, processes, processes - 1))
    steps, reason = accumulation_steps(share=largest, micro_batch_size=size)
    if recipe.accelerate.micro_batch_size and size > largest + 1:
        settings.note(
            f"accelerate.micro_batch_size={size} has no effect: a process's share of a step is {largest} images"
        )
    sampling_plan = SamplingPlan(
        num_images=num_images,
        batch_size=train.batch_size,
        micro_batch_size=size,
        seed=recipe.seed,
        drop_last=train.drop_last,
        join_single=bool(batch_norms(model)),
        num_processes=processes,
        process_index=Processes(accelerator).index,
        repeats=recipe.augment.repeats,
    )
    accelerator.gradient_accumulation_steps = steps
    settings.record("accelerate.gradient_accumulation_steps", steps, reason)
    settings.record("processes", processes, "of the launcher")
    settings.record("steps_per_epoch", sampling_plan.steps_per_epoch, f"{num_images:,} images / {train.batch_size}")
    if recipe.accelerate.sync_batch_norm:
        _require_equal_counts(sampling_plan)
    return sampling_plan


def _require_equal_counts(sampling_plan: SamplingPlan) -> None:
    """Raise RunError unless all processes have equally many forward passes: synchronised batch norm needs that."""
    for step in {0, sampling_plan.steps_per_epoch - 1}:
        plans = [replace(sampling_plan, process_index=i).plan(step) for i in range(sampling_plan.num_processes)]
        counts = {len(plan.micro_batches) for plan in plans}
        if len(counts) > 1 or 0 in counts:
            raise RunError(
                "accelerate.sync_batch_norm needs equally many micro-batches on every process in every step: "
                "choose train.batch_size as a multiple of 2 x processes and train.drop_last=true"
            )


@dataclass
class Parts:
    """Everything that a recipe's training needs, built but not trained."""

    recipe: Recipe
    settings: ResolvedSettings
    accelerator: Accelerator
    source: Source
    spec: ModelSpec
    model: nn.Module
    sampling_plan: SamplingPlan
    forecast: Forecast | None = None  # of this process's memory; None on a GPU
    kept_pixels: int = 0  # bytes cached in memory; known once the loaders are built
