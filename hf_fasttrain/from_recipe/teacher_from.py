"""A recipe's teacher: loaded, matched with the classes of the data, and prepared for a device."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_fasttrain.data.source.dataset import Source
from hf_fasttrain.models.teacher import KEY, Teacher, load_teacher
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe


def teacher_from(recipe: Recipe, source: Source, device: torch.device, settings: ResolvedSettings) -> Teacher | None:
    """Return the teacher of a recipe on a device, with its digest recorded; None without `distill`."""
    if recipe.distill is None:
        return None
    location = recipe.distill.teacher
    with torch.random.fork_rng(devices=[]):  # it is built with random weights first; training must not depend on that
        teacher = load_teacher(location, source.class_names, multi_label=source.multi_label)
    settings.record(KEY, location, teacher.description)
    growth, full, own = recipe.augment.progressive, recipe.data.size_in_training, teacher.preprocessing.image_size
    sizes = sorted({growth.start_size, full} if growth else {full})
    if sizes != [own]:
        between = f"{sizes[0]} to {full}" if growth else f"{full}"
        settings.note(f"{KEY}: crops of {between} px are resized to {own} px for {location}, its own image size")
    model = teacher.model.to(device)
    if recipe.accelerate.channels_last is True:
        model = model.to(memory_format=torch.channels_last)
    return replace(teacher, model=model)
