"""Batch sizes that fit into memory: the micro-batch of a recipe, and the batch of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from hf_fasttrain.data.loading.prefetch import num_slots
from hf_fasttrain.data.loading.sampler import SamplingPlan, micro_batch_size_for, process_share
from hf_fasttrain.from_recipe.accelerator import local_processes
from hf_fasttrain.from_recipe.auto import decide, micro_batch_size
from hf_fasttrain.from_recipe.custom import NO_CUSTOM_PARTS, CustomParts
from hf_fasttrain.from_recipe.loaders import resolve_loading
from hf_fasttrain.models.memory_forecast import (
    Autocast,
    Forecast,
    evaluation_bytes,
    images_that_fill_cpu,
    measure_activations,
)
from hf_fasttrain.models.model import batch_norms, uses_batch_statistics
from hf_fasttrain.models.teacher import Teacher
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.optim import state_share
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.utils.environment import free_memory_bytes, resident_bytes
from hf_fasttrain.utils.errors import first_line
from hf_fasttrain.utils.format import format_bytes

KEY = "accelerate.micro_batch_size"
CUSTOM_STATE_SHARE = 2.0  # of the parameters' bytes: what Adam keeps


@dataclass(frozen=True)
class MicroBatch:
    """The number of images in a forward pass of a process, and the memory forecast."""

    size: int
    forecast: Forecast | None = None  # None on a GPU


def resolve_micro_batch(
    recipe: Recipe,
    num_images: int,
    num_classes: int,
    model: nn.Module,
    teacher: Teacher | None,
    accelerator: Accelerator,
    settings: ResolvedSettings,
    custom: CustomParts = NO_CUSTOM_PARTS,
) -> MicroBatch:
    """Return the micro-batch of a recipe for a training split of `num_images`, recorded with its reason."""
    accelerate, processes = recipe.accelerate, accelerator.num_processes
    accumulation = 1 if accelerate.gradient_accumulation_steps == "auto" else accelerate.gradient_accumulation_steps
    requested = accelerate.micro_batch_size or micro_batch_size_for(recipe.train.batch_size, processes, accumulation)
    share = len(process_share(min(recipe.train.batch_size, num_images), processes, processes - 1))
    if accelerator.device.type != "cpu":
        return MicroBatch(_decide(settings, requested, share, largest=share))
    try:
        forecast = forecast_memory(recipe, num_classes, model, teacher, accelerator, settings, custom)
    except Exception as error:
        if custom.step_loss is None:
            raise
        settings.note(f"memory is not forecast: the model can't be called with images alone ({first_line(error)})")
        return MicroBatch(_decide(settings, requested, share, largest=share))
    free, cpu_images = free_memory_bytes() // local_processes(), images_that_fill_cpu(recipe.data.size_in_training)
    fits = max(2, 2 * (min(forecast.largest(free // 2), cpu_images // recipe.data.views) // 2))
    largest = min(Processes(accelerator).gather([fits]))  # all processes split steps alike
    memory_text = (
        f"half of the {format_bytes(free)} of free memory is enough for {forecast.largest(free // 2):,} images"
    )
    limit = f"64 x (224 / image size)^2 images fill a CPU, and {memory_text}"
    settings.record("largest_micro_batch", largest, limit)
    size = _decide(settings, requested, share, largest, limit)
    if size != requested and any(map(uses_batch_statistics, batch_norms(model))):
        settings.note(
            f"{KEY}=auto: a step's {share} images are split into micro-batches of {size}, which fit this "
            f"machine's memory and cores; batch norm computes its statistics over {size} images. {KEY}=N sets "
            "another size"
        )
    num_at_once = min(size, share)
    settings.record("memory_forecast_bytes", forecast.peak(num_at_once), "the peak of a training process")
    if forecast.needed(num_at_once) > free:
        settings.note(
            f"{KEY}={size}: training will take about {format_bytes(forecast.needed(num_at_once))} more memory, and "
            f"{format_bytes(free)} are free for each process here; lower {KEY}, data.image_size or the size of the "
            "model. A step that runs out of memory is retried with smaller micro-batches"
        )
    return MicroBatch(size, forecast)


def _decide(settings: ResolvedSettings, requested: int, share: int, largest: int, limit: str = "") -> int:
    """Return the micro-batch: as already decided, by the rule, or `requested` if the recipe sets it."""
    if settings.is_open(KEY):
        return int(decide(settings, KEY, requested=requested, share=share, largest=largest, limit=limit))
    return int(
        settings.record(KEY, requested, micro_batch_size(requested=requested, share=share, largest=share).reason)
    )


def images_at_once(sampling_plan: SamplingPlan) -> int:
    """Return the largest number of images in a forward pass of a process."""
    images = min(sampling_plan.batch_size, sampling_plan.num_images)
    return min(
        sampling_plan.micro_batch_size,
        len(process_share(images, sampling_plan.num_processes, sampling_plan.num_processes - 1)),
    )


def forecast_memory(
    recipe: Recipe,
    num_classes: int,
    model: nn.Module,
    teacher: Teacher | None,
    accelerator: Accelerator,
    settings: ResolvedSettings,
    custom: CustomParts = NO_CUSTOM_PARTS,
) -> Forecast:
    """Return a forecast of the memory of a training process: of its GPU if it uses one, else of the host."""
    device, size, optimizer = accelerator.device, recipe.data.size_in_training, recipe.optimizer
    activations = measure_activations(
        model,
        size,
        num_classes,
        device=device,
        autocast=accelerator.autocast,
        channels_last=recipe.accelerate.channels_last is True,
    )
    if teacher is not None:
        size_of_teacher = teacher.preprocessing.image_size
        taught = evaluation_bytes(teacher.model, size_of_teacher, device, accelerator.autocast)
        activations = activations.after(taught)
    free_cached_memory(device)  # unused heap memory would be counted twice: as resident, and when it is used
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trainable)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    workers, _ = resolve_loading(settings, device)
    slots = num_slots(workers, 1)  # batches of uint8 pixels in flight, as many as with small batches
    pixels = 3 * size * size * recipe.data.views
    share = CUSTOM_STATE_SHARE
    if custom.optimizer is None:
        share = state_share(optimizer.name, momentum=optimizer.momentum, args=optimizer.args)
    is_mixed = bool(recipe.augment.mixup or recipe.augment.cutmix)
    return Forecast(
        resident=resident_bytes(),
        weights=weights + (teacher.num_bytes if teacher is not None else 0),
        gradients=gradients,
        optimizer=int(gradients * share),
        average=weights if recipe.ema else 0,
        activations=activations.of_views(recipe.data.views),
        batch_per_image=pixels * ((slots if device.type == "cpu" else 2) + (8 if is_mixed else 4)),
        workers=workers,
        device=str(device),
    )


def evaluation_memory(
    model: nn.Module,
    image_size: int,
    device: torch.device,
    *,
    workers: int = 0,
    autocast: Autocast = nullcontext,
    state: int = 0,
) -> dict[str, int]:
    """Return `bytes_per_image` of an evaluation (model and loader) and `room`, the bytes that it may take, on a CPU.

    `state`: bytes that training will still allocate. On a GPU nothing is estimated: returns an empty dict.
    """
    if device.type != "cpu":
        return {}
    pixels = 3 * image_size**2 * (num_slots(workers, 1) + 4)
    free = free_memory_bytes() // local_processes()
    return {
        "bytes_per_image": evaluation_bytes(model, image_size, device, autocast) + pixels,
        "room": free // 2 - state,
    }


def decide_evaluation_batch(
    settings: ResolvedSettings, micro_batch_size: int, memory: Callable[[], dict[str, int]]
) -> int:
    """Return the batch size of evaluation, in training and in `evaluate`; calls `memory` only if a rule decides."""
    key = "evaluate.batch_size"
    inputs = {} if settings.is_decided(key) else memory()
    return int(decide(settings, key, micro_batch_size=micro_batch_size, **inputs))
