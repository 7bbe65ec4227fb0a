"""Machine settings that a recipe leaves to `auto`: a stored tuning of the same machine and model, else fixed rules."""

from __future__ import annotations

import os
from typing import Any

import torch

from hf_fasttrain.duration import Duration
from hf_fasttrain.environment import describe_machine, describe_versions, uses_gpu
from hf_fasttrain.facts import Facts
from hf_fasttrain.recipe import Recipe
from hf_fasttrain.recipe_file import flatten, plain, with_values
from hf_fasttrain.tunings import ALONE_KEYS, LOADER_KEYS, LONG_KEYS, TUNED, Tuned, find_tuning

# Without a tuning; precision, loader processes and cache also depend on the device and are resolved with it.
RULES: dict[str, tuple[Any, str]] = {
    "accelerate.channels_last": (True, "seldom slower"),
    "accelerate.compile": (False, "compiling takes minutes"),
    "accelerate.matmul_precision": ("high", "TF32 where the GPU has it"),
    "accelerate.conv_precision": ("high", "TF32 where the GPU has it"),
}
VERSIONS = ("python", "hf_fasttrain", "torch", "torchvision", "timm", "transformers")  # those that decide speed


def resolve_machine(recipe: Recipe, facts: Facts, tuned: Tuned | None = None) -> Recipe:
    """Return the recipe with `auto` replaced where a tuning or a rule decides it; nothing is measured.

    Without `tuned`, a stored tuning is looked for. What the recipe says itself is as it says.
    """
    values = flatten(recipe)
    if tuned is None:
        tuned = _stored(recipe)
    chosen = {key: value for key, value in tuned.values.items() if value is not None and is_open(key, values)}
    if chosen:
        facts.note(f"auto, {tuned.why}: " + ", ".join(f"{key}={plain(value)}" for key, value in chosen.items()))
    for key, value in chosen.items():
        facts.resolve(key, value, tuned.why)
    for key, (value, why) in RULES.items():
        if values[key] == "auto" and key not in chosen:
            chosen[key] = facts.resolve(key, value, why)
    return with_values(recipe, chosen)


def is_open(key: str, values: dict[str, Any]) -> bool:
    """Return whether a recipe, flattened to `values`, leaves a machine key to us."""
    if key == "accelerate.micro_batch_size":
        return values[key] is None and values["accelerate.gradient_accumulation_steps"] == "auto"
    return bool(values.get(key) == "auto")


def _stored(recipe: Recipe) -> Tuned:
    tuning = find_tuning(*circumstances(recipe))
    if tuning is None:
        return Tuned()
    one = int(os.environ.get("WORLD_SIZE", "1")) == 1
    tuned, duration = Duration.parse(tuning.duration), recipe.train.duration
    as_long = duration.unit == tuned.unit and duration.count >= tuned.count
    unusable = {*(() if one else (*ALONE_KEYS, *LOADER_KEYS)), *(() if as_long else LONG_KEYS)}
    return Tuned({k: v for k, v in tuning.values.items() if k not in unusable}, f"{TUNED} {tuning.date}")


def circumstances(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str], dict[str, Any], dict[str, Any]]:
    """Return machine, versions, model and data, by which tunings are found again."""
    described = describe_machine(torch.device("cuda" if uses_gpu() else "cpu"), 1)
    machine = {key: described[key] for key in ("processor", "cores", "device")}
    versions = {name: version for name, version in describe_versions().items() if name in VERSIONS}
    model = recipe.model.model_dump(mode="json", exclude={"pretrained", "drop_path", "trust_remote_code"})
    model |= {"image_size": recipe.data.image_size, "batch_size": recipe.train.batch_size}
    shaping = ("dataset", "config", "train_split", "short_side", "stored_quality", "reduced_decode", "decoder")
    data = {key: getattr(recipe.data, key) for key in shaping}
    return machine, versions, model, {**data, "augment": recipe.augment.model_dump(mode="json")}
