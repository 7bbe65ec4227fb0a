"""The parts of a training, built from a recipe: accelerator, data, model, sampling plan. auto.py resolves `auto`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from hf_fasttrain.data.loading.sampler import SamplingPlan
from hf_fasttrain.data.source.dataset import Source
from hf_fasttrain.from_recipe.accelerator import allow_compiling, build_accelerator
from hf_fasttrain.from_recipe.auto import resolve_machine
from hf_fasttrain.from_recipe.custom import NO_CUSTOM_PARTS, CustomParts
from hf_fasttrain.from_recipe.early_checks import require_no_early_mistakes
from hf_fasttrain.from_recipe.loaders import resolve_decoding, train_transform
from hf_fasttrain.from_recipe.memory import resolve_micro_batch
from hf_fasttrain.from_recipe.model_from import model_from
from hf_fasttrain.from_recipe.sampling import (
    class_sample_weights,
    note_on_rarest,
    require_enough_images,
    resolve_sampling,
)
from hf_fasttrain.from_recipe.source_from import local_settings, source_from
from hf_fasttrain.from_recipe.teacher_from import teacher_from
from hf_fasttrain.from_recipe.tunings import Presets
from hf_fasttrain.models.memory_forecast import Forecast
from hf_fasttrain.models.model import ModelSpec
from hf_fasttrain.models.teacher import Teacher
from hf_fasttrain.recipe.conflicts import without_effect
from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.utils.errors import RunError


def build_parts(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    dataset: Any = None,
    presets: Presets | None = None,
    custom: CustomParts = NO_CUSTOM_PARTS,
) -> Parts:
    """Return the parts of a recipe's training; nothing is written.

    `presets` take precedence over the rules of `auto`; by default they are those of a stored tuning.
    """
    loaded = load_recipe(recipe, overrides)
    require_no_early_mistakes(loaded, dataset=dataset, custom=custom)
    settings = ResolvedSettings(loaded, notes=[*without_effect(loaded), *custom.notes(loaded)])
    for key, name in custom.settings.items():
        settings.record(key, name, "passed as a Python object")
    settings.record("local", local_settings(loaded, dataset), "settings that are paths or objects of this machine")
    _require_step_loss(loaded, custom)
    _require_evaluation(loaded, custom)
    resolved = resolve_decoding(resolve_machine(loaded, settings, presets), settings, custom)
    accelerator = build_accelerator(resolved, settings)
    source = source_from(resolved, dataset, settings)
    weights = custom.build_sample_weights(source.train) or class_sample_weights(resolved, source.train)
    if weights is not None and custom.sample_weights is None:
        settings.note(note_on_rarest(source.train, weights, source.class_names))
    model, spec = model_from(resolved, source, accelerator.device, settings, custom)
    require_enough_images(resolved, len(source.train), accelerator.num_processes)
    teacher = teacher_from(resolved, source, accelerator.device, settings)
    models = (spec.num_classes, model, teacher)
    micro = resolve_micro_batch(resolved, len(source.train), *models, accelerator, settings, custom)
    sampling_plan = resolve_sampling(resolved, len(source.train), micro.size, model, accelerator, settings, weights)
    if resolved.accelerate.compile is True:
        allow_compiling(num_shapes(resolved, spec, sampling_plan))
    parts = (resolved, settings, accelerator, source, spec, model, sampling_plan)
    return Parts(*parts, micro.forecast, custom=custom, teacher=teacher)


def _require_step_loss(recipe: Recipe, custom: CustomParts) -> None:
    """Raise RunError for a step loss in the place of a distillation, or if several views of an image need one."""
    if recipe.distill is not None and custom.step_loss is not None:
        raise RunError(
            f"distill: has no effect with step_loss={custom.names['step_loss']}, which returns the loss itself; leave "
            "one of them out (docs/your-loop.md distils in a step_loss)"
        )
    if recipe.data.views > 1 and custom.step_loss is None:
        raise RunError(
            f"data.views={recipe.data.views}: images are (B, V, 3, H, W), which the recipe's loss does not support; "
            "pass step_loss to Trainer.from_recipe, a function (model, images, targets, at) -> loss, or set it to 1"
        )


def _require_evaluation(recipe: Recipe, custom: CustomParts) -> None:
    """Raise RunError for parts that are used in evaluations, if there are none."""
    unused = [name for name in ("metrics", "predict") if getattr(custom, name) is not None]
    if recipe.evaluate.every == "never" and unused:
        raise RunError(
            f"{' and '.join(unused)}: evaluate.every is never, and only evaluations use them; leave them out, or set "
            "evaluate.every=1 epoch"
        )


def num_shapes(recipe: Recipe, spec: ModelSpec, sampling_plan: SamplingPlan) -> int:
    """Return the maximum number of batch shapes in a training and its evaluations."""
    assert spec.preprocessing is not None
    transform = train_transform(recipe, spec.preprocessing, sampling_plan.steps_per_epoch)
    epochs = 1 if transform.growth is None else transform.growth.until + 1
    sizes = {transform.size_at(epoch) for epoch in range(epochs)}
    steps = {0, sampling_plan.steps_per_epoch - 1}
    batch_sizes = {len(key.indices) for step in steps for key in sampling_plan.plan(step).micro_batches}
    num_phases = len(recipe.model.trained.phases)  # another program for other frozen parameters
    return len(sizes) * len(batch_sizes) * num_phases + 2  # evaluation: full batches and the last one


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
    custom: CustomParts = NO_CUSTOM_PARTS
    teacher: Teacher | None = None  # of a distillation
