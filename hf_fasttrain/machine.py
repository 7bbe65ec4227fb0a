"""Machine settings that a recipe leaves to `auto`: the launcher's precision, a stored tuning, else fixed rules."""

from __future__ import annotations

from typing import Any

import torch

from hf_fasttrain.accelerator import launcher_precision, num_processes, uses_gpu
from hf_fasttrain.duration import Duration
from hf_fasttrain.environment import describe_machine, describe_versions
from hf_fasttrain.recipe import Recipe
from hf_fasttrain.recipe_file import flatten, plain, with_values
from hf_fasttrain.resolved import ResolvedSettings
from hf_fasttrain.tunings import ALONE_KEYS, LOADER_KEYS, LONG_KEYS, TUNED, Tuned, find_tuning

MACHINE = "machine"  # the fact by which a resumed run knows whether it began here
# Without a tuning; precision, loader processes and cache also depend on the device and are resolved with it.
RULES: dict[str, tuple[Any, str]] = {
    "accelerate.channels_last": (True, "seldom slower"),
    "accelerate.compile": (False, "compiling takes minutes"),
    "accelerate.matmul_precision": ("high", "TF32 where the GPU has it"),
    "accelerate.conv_precision": ("high", "TF32 where the GPU has it"),
}
VERSIONS = ("python", "hf_fasttrain", "torch", "torchvision", "timm", "transformers")  # those that decide speed


def resolve_machine(recipe: Recipe, settings: ResolvedSettings, tuned: Tuned | None = None) -> Recipe:
    """Return the recipe with `auto` replaced where the launcher, a tuning or a rule decides it; nothing is measured.

    Without `tuned`, a stored tuning is looked for. What the recipe says itself is as it says.
    """
    values = flatten(recipe)
    settings.resolve(MACHINE, machine_here(), "what `auto` was decided for")
    if tuned is None:
        tuned = _stored(recipe)
    chosen = {key: value for key, value in tuned.values.items() if value is not None and is_open(key, values)}
    reasons = {key: tuned.why_of(key) for key in chosen}
    for key, value in _stated_by_launcher(values).items():
        chosen[key], reasons[key] = value, "of the launch configuration"
    _note_tuned(chosen, reasons, settings)
    for key, (value, why) in RULES.items():
        if values[key] == "auto":
            chosen.setdefault(key, value)
            reasons.setdefault(key, why)
    for key, value in chosen.items():
        settings.resolve(key, value, reasons[key])
    return with_values(recipe, chosen)


def _stated_by_launcher(values: dict[str, Any]) -> dict[str, Any]:
    """Return the launcher's precision where the recipe leaves it open and the device has it."""
    key, precision = "accelerate.mixed_precision", launcher_precision()
    usable = precision == "bf16" or (precision == "fp16" and uses_gpu())
    return {key: precision} if usable and is_open(key, values) else {}


def _note_tuned(chosen: dict[str, Any], reasons: dict[str, str], settings: ResolvedSettings) -> None:
    by_reason: dict[str, list[str]] = {}
    for key, value in chosen.items():
        by_reason.setdefault(reasons[key], []).append(f"{key}={plain(value)}")
    for why, pairs in by_reason.items():
        if why.startswith(TUNED):
            settings.note(f"auto, {why}: {', '.join(pairs)}")


def is_open(key: str, values: dict[str, Any]) -> bool:
    """Return whether a recipe, flattened to `values`, leaves a machine key to us."""
    if key == "accelerate.micro_batch_size":
        return values[key] is None and values["accelerate.gradient_accumulation_steps"] == "auto"
    return bool(values.get(key) == "auto")


def _stored(recipe: Recipe) -> Tuned:
    tuning = find_tuning(*circumstances(recipe))
    if tuning is None:
        return Tuned()
    one = num_processes() == 1
    tuned, duration = Duration.parse(tuning.duration), recipe.train.duration
    as_long = duration.unit == tuned.unit and duration.count >= tuned.count
    unusable = {*(() if one else (*ALONE_KEYS, *LOADER_KEYS)), *(() if as_long else LONG_KEYS)}
    return Tuned({k: v for k, v in tuning.values.items() if k not in unusable}, f"{TUNED} {tuning.date}")


def machine_here() -> dict[str, Any]:
    """Return processor, cores, device and the number of training processes, of all machines together."""
    described = describe_machine(torch.device("cuda" if uses_gpu() else "cpu"), num_processes())
    return {
        **{key: described[key] for key in ("processor", "cores", "device")},
        "processes": described["num_processes"],
    }


def circumstances(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str], dict[str, Any], dict[str, Any]]:
    """Return machine, versions, model and data, by which tunings are found again."""
    machine = {key: value for key, value in machine_here().items() if key != "processes"}
    versions = {name: version for name, version in describe_versions().items() if name in VERSIONS}
    model = recipe.model.model_dump(mode="json", exclude={"pretrained", "drop_path", "trust_remote_code"})
    model |= {"image_size": recipe.data.image_size, "batch_size": recipe.train.batch_size}
    shaping = ("dataset", "config", "train_split", "short_side", "stored_quality", "reduced_decode", "decoder")
    data = {key: getattr(recipe.data, key) for key in shaping}
    return machine, versions, model, {**data, "augment": recipe.augment.model_dump(mode="json")}
