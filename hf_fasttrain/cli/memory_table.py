"""The memory forecast that `check` prints."""

from __future__ import annotations

from hf_fasttrain.from_recipe.accelerator import local_processes
from hf_fasttrain.from_recipe.memory import forecast_memory, images_at_once
from hf_fasttrain.from_recipe.parts import Parts
from hf_fasttrain.models.memory_forecast import WORKER_BYTES, Forecast
from hf_fasttrain.utils.environment import free_memory_bytes
from hf_fasttrain.utils.format import format_bytes

Table = tuple[str, tuple[str, str], list[tuple[str, str]]]


def memory_table(parts: Parts) -> Table:
    """Return title, header and rows of the memory forecast of a training process."""
    forecast = parts.forecast
    if forecast is None:
        models = (parts.spec.num_classes, parts.model, parts.teacher)
        forecast = forecast_memory(parts.recipe, *models, parts.accelerator, parts.settings)
    images = images_at_once(parts.sampling_plan)
    rows = [(what, format_bytes(number)) for what, number in forecast.rows(images)]
    rows.append(("total", format_bytes(forecast.peak(images))))
    rows += _other_memory(parts, forecast)
    return f"memory of a training process ({forecast.device})", ("part", "bytes"), rows


def _other_memory(parts: Parts, forecast: Forecast) -> list[tuple[str, str]]:
    rows = []
    if forecast.workers:
        rows.append(
            (f"in addition: {forecast.workers} loader processes", format_bytes(forecast.workers * WORKER_BYTES))
        )
    if parts.kept_pixels:
        rows.append(("in addition: cached pixels (data.cache)", format_bytes(parts.kept_pixels)))
    rows.append(("free now for each process", format_bytes(free_memory_bytes() // local_processes())))
    return rows
