"""A recipe's micro-batch: as asked, or on a CPU the fewest equal pieces that memory is enough for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_fasttrain.accelerator import local_processes
from hf_fasttrain.data.feed import num_slots
from hf_fasttrain.data.order import Order, micro_batch_size_for, process_share
from hf_fasttrain.environment import free_memory_bytes, resident_bytes
from hf_fasttrain.format import format_bytes
from hf_fasttrain.loaders import resolve_loading
from hf_fasttrain.machine import is_open
from hf_fasttrain.memory_forecast import Forecast, equal_pieces, evaluation_bytes, measure_activations, most_images
from hf_fasttrain.model import batch_norms, uses_batch_statistics
from hf_fasttrain.optim import state_share
from hf_fasttrain.out_of_memory import free_cached_memory
from hf_fasttrain.recipe import Recipe
from hf_fasttrain.recipe_file import flatten
from hf_fasttrain.resolved import ResolvedSettings

KEY = "accelerate.micro_batch_size"


@dataclass(frozen=True)
class MicroBatch:
    """How many images a process has in a forward, and what that takes of its memory."""

    size: int
    forecast: Forecast | None = None  # on a GPU it is made when somebody asks


def resolve_micro_batch(
    recipe: Recipe,
    num_images: int,
    num_classes: int,
    model: nn.Module,
    accelerator: Accelerator,
    settings: ResolvedSettings,
) -> MicroBatch:
    """Return the micro-batch of a recipe for a training split of `num_images`, recorded with its reason."""
    wish, processes = recipe.accelerate, accelerator.num_processes
    pieces = 1 if wish.gradient_accumulation_steps == "auto" else wish.gradient_accumulation_steps
    size = wish.micro_batch_size or micro_batch_size_for(recipe.train.batch_size, processes, pieces)
    if accelerator.device.type != "cpu":
        settings.resolve(KEY, size, settings.why(KEY, "images per process and forward"))
        return MicroBatch(size)
    forecast = forecast_memory(recipe, num_classes, model, accelerator)
    free = free_memory_bytes() // local_processes()
    largest = _agreed(
        max(2, 2 * (min(forecast.largest(free // 2), most_images(recipe.data.image_size)) // 2)), processes
    )
    limit = f"half of the {format_bytes(free)} of free memory is enough for {forecast.largest(free // 2):,} images"
    settings.resolve("largest_micro_batch", largest, f"64 x (224 / image size)^2 images fill a CPU, and {limit}")
    share = len(process_share(min(recipe.train.batch_size, num_images), processes, processes - 1))
    why = "images per process and forward"
    if is_open(KEY, flatten(recipe)) and share > largest:
        size = equal_pieces(share, largest)
        why = (
            f"the fewest equal pieces of {share} images of at most {largest}: {settings.why('largest_micro_batch', '')}"
        )
        if any(map(uses_batch_statistics, batch_norms(model))):
            settings.note(
                f"{KEY}=auto: a step's {share} images are made in micro-batches of {size}, which fit this machine's "
                f"memory and cores; batch norm takes its statistics over {size} images. {KEY}=N sets another size"
            )
    settings.resolve(KEY, size, settings.why(KEY, why))
    at_once = min(size, share)
    settings.resolve("memory_forecast_bytes", forecast.peak(at_once), "the most that a training process will have")
    if forecast.needed(at_once) > free:
        settings.note(
            f"{KEY}={size}: training will take about {format_bytes(forecast.needed(at_once))} more memory, and "
            f"{format_bytes(free)} are free for each process here; lower {KEY}, data.image_size or the size of the "
            "model. A step that memory is too short for is made again in smaller pieces"
        )
    return MicroBatch(size, forecast)


def images_at_once(order: Order) -> int:
    """Return how many images a process has in a forward at most."""
    images = min(order.batch_size, order.num_images)
    return min(order.micro_batch_size, len(process_share(images, order.num_processes, order.num_processes - 1)))


def _agreed(largest: int, processes: int) -> int:
    """Return the smallest of all processes' numbers: they cut steps alike."""
    return int(min(gather_object([largest]))) if processes > 1 else largest


def forecast_memory(recipe: Recipe, num_classes: int, model: nn.Module, accelerator: Accelerator) -> Forecast:
    """Return what training will take of this process's memory, of a GPU's where it trains on one."""
    device, size, optimizer = accelerator.device, recipe.data.image_size, recipe.optimizer
    activations = measure_activations(
        model,
        size,
        num_classes,
        device=device,
        autocast=accelerator.autocast,
        channels_last=recipe.accelerate.channels_last is True,
    )
    free_cached_memory(device)  # what the heap has and nobody uses would count as taken, and be taken again
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    workers, _ = resolve_loading(recipe, device, ResolvedSettings(recipe))
    waiting = num_slots(workers, 1)  # batches of uint8 pixels, as many as with small batches
    pixels = 3 * size * size
    mixed = bool(recipe.augment.mixup or recipe.augment.cutmix)
    return Forecast(
        resident=resident_bytes(),
        weights=weights,
        gradients=gradients,
        optimizer=int(gradients * state_share(optimizer.name, momentum=optimizer.momentum, args=optimizer.args)),
        average=weights if recipe.ema else 0,
        activations=activations,
        batch_per_image=pixels * ((waiting if device.type == "cpu" else 2) + (8 if mixed else 4)),
        workers=workers,
        device=str(device),
    )


def evaluation_batch(forecast: Forecast | None, size: int) -> int:
    """Return at most `size` images, as many as half of the free memory is enough for without backward."""
    if forecast is None:
        return size
    per_image = forecast.activations.workspace_per_image + forecast.batch_per_image
    state = forecast.gradients + forecast.optimizer + forecast.average
    return max(1, min(size, (free_memory_bytes() // local_processes() // 2 - state) // max(1, per_image)))


def evaluation_batch_alone(model: nn.Module, image_size: int, device: torch.device, size: int) -> int:
    """Return at most `size` images for a model in evaluation mode that is not trained."""
    if device.type != "cpu":
        return size
    per_image = evaluation_bytes(model, image_size, device) + 8 * 3 * image_size**2
    return max(1, min(size, free_memory_bytes() // local_processes() // 2 // per_image))
