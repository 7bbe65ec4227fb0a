"""The sampling plan of a run: which images each step has, how often, and in which micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from accelerate import Accelerator
from torch import nn

from hf_fasttrain.data.loading.sampler import SampleWeights, SamplingPlan, process_share
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.data.source.multi_label import MultiLabels
from hf_fasttrain.from_recipe.auto import accumulation_steps
from hf_fasttrain.models.model import batch_norms
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.utils.errors import RunError


def class_sample_weights(recipe: Recipe, split: Split) -> SampleWeights | None:
    """Return the weights of a split's images by their classes, as train.sampling says; None: each image once."""
    sampling = recipe.train.sampling
    if sampling in (None, "uniform"):
        return None
    if isinstance(split.labels, MultiLabels):
        raise RunError(
            f"train.sampling={recipe.train.sampling}: needs one class per image, these have several; leave it out, or "
            "pass sample_weights to Trainer.from_recipe"
        )
    per_image = np.bincount(split.labels)[split.labels].astype(np.float64)
    power = sampling["power"] if isinstance(sampling, dict) else {"balanced": 0.0, "sqrt": 0.5}[str(sampling)]
    return SampleWeights(per_image ** (power - 1.0))


def note_on_rarest(split: Split, weights: SampleWeights, class_names: Sequence[str]) -> str:
    """Return how often an epoch draws an image of the rarest class and one of the most frequent, on average."""
    counts = np.bincount(split.labels, minlength=len(class_names))
    present = np.flatnonzero(counts)
    times = len(split) * weights.values / weights.values.sum()

    def described(number: int) -> str:
        drawn = times[int(np.argmax(split.labels == number))]
        return f"an image of '{class_names[number]}' ({counts[number]:,}) is drawn {drawn:.2g} times"

    rarest, most = present[np.argmin(counts[present])], present[np.argmax(counts[present])]
    return f"train.sampling: {described(int(rarest))} per epoch, {described(int(most))}, on average"


def require_enough_images(recipe: Recipe, num_images: int, processes: int) -> None:
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
            f"train.drop_last drops every step: {num_images} images, train.batch_size={train.batch_size}; "
            "lower the batch size or set train.drop_last=false"
        )


def resolve_sampling(
    recipe: Recipe,
    num_images: int,
    size: int,
    model: nn.Module,
    accelerator: Accelerator,
    settings: ResolvedSettings,
    weights: SampleWeights | None = None,
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
        weights=weights,
    )
    accelerator.gradient_accumulation_steps = steps
    settings.record("accelerate.gradient_accumulation_steps", steps, reason)
    settings.record("processes", processes, "of the launcher")
    settings.record("steps_per_epoch", sampling_plan.steps_per_epoch, f"{num_images:,} images / {train.batch_size}")
    if recipe.accelerate.sync_batch_norm:
        _require_equal_counts(sampling_plan)
    return sampling_plan


def _require_equal_counts(sampling_plan: SamplingPlan) -> None:
    """Raise RunError unless all processes have equally many forward passes, as synchronised batch norm requires."""
    for step in {0, sampling_plan.steps_per_epoch - 1}:
        plans = [replace(sampling_plan, process_index=i).plan(step) for i in range(sampling_plan.num_processes)]
        counts = {len(plan.micro_batches) for plan in plans}
        if len(counts) > 1 or 0 in counts:
            raise RunError(
                "accelerate.sync_batch_norm needs equally many micro-batches on every process in every step: "
                "choose train.batch_size as a multiple of 2 x processes and train.drop_last=true"
            )
