"""Machine settings that a recipe leaves to `auto`: a stored tuning of the same machine and model, else fixed rules."""

from __future__ import annotations

import os
from typing import Any

import torch

from hf_fasttrain.environment import describe_machine, describe_versions
from hf_fasttrain.facts import Facts
from hf_fasttrain.recipe import Recipe
from hf_fasttrain.recipe_file import flatten, with_values
from hf_fasttrain.tunings import ALONE_KEYS, LOADER_KEYS, TUNED, TUNED_KEYS, Tuned, Tuning, find_tuning

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

    Without `tuned`, a stored tuning is looked for. It is used only where nothing in the recipe contradicts it: what
    was measured for bf16 need not hold for fp32.
    """
    values = flatten(recipe)
    if tuned is None:
        tuned = _stored(recipe, values, facts)
    chosen = {key: value for key, value in tuned.values.items() if value is not None and is_open(key, values)}
    if chosen:
        facts.note(f"auto, {tuned.why}: " + ", ".join(f"{key}={_plain(value)}" for key, value in chosen.items()))
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


def _stored(recipe: Recipe, values: dict[str, Any], facts: Facts) -> Tuned:
    tuning = find_tuning(*circumstances(recipe))
    if tuning is None:
        return Tuned()
    differing = [key for key in TUNED_KEYS if not is_open(key, values) and not _agrees(key, values, tuning)]
    if differing:
        facts.note(
            f"the tuning of {tuning.date} is not used: it was measured with "
            + ", ".join(f"{key}={_plain(tuning.values[key])}" for key in differing)
        )
        return Tuned()
    one = int(os.environ.get("WORLD_SIZE", "1")) == 1
    usable = {k: v for k, v in tuning.values.items() if one or k not in (*ALONE_KEYS, *LOADER_KEYS)}
    return Tuned(usable, f"{TUNED} {tuning.date}")


def _agrees(key: str, values: dict[str, Any], tuning: Tuning) -> bool:
    if key not in tuning.values or tuning.values[key] == values[key]:
        return True
    # A micro-batch of None is the whole step, which one accumulation step is too.
    whole = tuning.values[key] is None and values["accelerate.gradient_accumulation_steps"] == 1
    return key == "accelerate.micro_batch_size" and whole


def circumstances(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str], dict[str, Any], dict[str, Any]]:
    """Return machine, versions, model and data, by which tunings are found again."""
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    described = describe_machine(torch.device("cuda" if cuda else "cpu"), 1)
    machine = {key: described[key] for key in ("processor", "cores", "device")}
    versions = {name: version for name, version in describe_versions().items() if name in VERSIONS}
    model = recipe.model.model_dump(mode="json", exclude={"pretrained", "drop_path", "trust_remote_code"})
    model |= {"image_size": recipe.data.image_size, "batch_size": recipe.train.batch_size}
    shaping = ("dataset", "config", "train_split", "short_side", "stored_quality", "reduced_decode", "decoder")
    data = {key: getattr(recipe.data, key) for key in shaping}
    return machine, versions, model, {**data, "augment": recipe.augment.model_dump(mode="json")}


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
