"""Stored tunings: the results of `hf-fasttrain tune`, used by `auto` on the same machine, versions, model and data."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hf_fasttrain.recipe.resolved import TUNED, Decision
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.recipe.validate import is_allowed
from hf_fasttrain.run_folder.schemas import TuningFile, read_if_sound
from hf_fasttrain.train.launcher import num_processes, uses_gpu
from hf_fasttrain.utils.duration import Duration
from hf_fasttrain.utils.environment import describe_machine, describe_versions
from hf_fasttrain.utils.files import expand_user, write_json
from hf_fasttrain.utils.standard_folders import home_folder

# Settings that are valid for any number of processes.
COMPUTE_KEYS = (
    "accelerate.mixed_precision",
    "accelerate.channels_last",
    "accelerate.compile",
    "accelerate.matmul_precision",
    "accelerate.conv_precision",
)
# Settings that were measured with one process and its data.
SINGLE_PROCESS_KEYS = ("accelerate.micro_batch_size", "accelerate.cpu_threads")
# Settings that cost time at first, and pay off only in a training at least as long as the tuned one.
LONG_KEYS = ("accelerate.compile", "data.cache")
LOADER_KEYS = ("data.workers", "data.cache", "data.pin_memory")
TUNED_KEYS = (*COMPUTE_KEYS, *SINGLE_PROCESS_KEYS, *LOADER_KEYS)
VERSIONS = ("python", "hf_fasttrain", "torch", "torchvision", "timm", "transformers")  # packages that affect speed


@dataclass(frozen=True)
class Presets:
    """Decisions that have priority over the rules of `auto`: of a stored tuning, or of a run's first start."""

    decisions: dict[str, Decision] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """A measured tuning; it is used if `machine`, `versions`, `model` and `data` are the same."""

    machine: dict[str, Any]  # processor, cores, device
    versions: dict[str, str]
    model: dict[str, Any]  # the recipe's model section, image size and images per step
    data: dict[str, Any]  # the data set and its preprocessing: the loader's settings depend on them
    values: dict[str, Any]  # dotted machine key -> value
    date: str
    images_per_second: float
    duration: str  # of the training that the tuning was optimised for


def tunings_dir() -> Path:
    """Return the folder of the stored tunings: $HF_FASTTRAIN_TUNINGS or ~/.cache/hf_fasttrain/tunings."""
    named = os.environ.get("HF_FASTTRAIN_TUNINGS")
    return expand_user(named) if named else home_folder() / ".cache" / "hf_fasttrain" / "tunings"


def store_tuning(tuning: Tuning) -> Path:
    """Write a tuning, replacing one of the same machine, versions, model and data. Raises OSError."""
    path = _path(tuning.machine, tuning.versions, tuning.model, tuning.data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(tuning))
    return path


def find_tuning(
    machine: dict[str, Any], versions: dict[str, str], model: dict[str, Any], data: dict[str, Any]
) -> Tuning | None:
    """Return the stored tuning of the same machine, versions, model and data, None if there is none."""
    values = read_if_sound(_path(machine, versions, model, data), TuningFile)
    try:
        tuning = Tuning(**values)
        Duration.parse(tuning.duration)
    except (TypeError, ValueError):  # missing, or of another version
        return None
    usable = {key: value for key, value in tuning.values.items() if key in TUNED_KEYS and is_allowed(key, value)}
    return replace(tuning, values=usable)


def _path(*parts: dict[str, Any]) -> Path:
    text = json.dumps(parts, sort_keys=True, default=str)
    return tunings_dir() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def stored_tuning(recipe: Recipe) -> Presets:
    """Return the stored tuning's decisions for a recipe on this machine; empty presets if there is none."""
    tuning = find_tuning(*tuning_key(recipe))
    if tuning is None:
        return Presets()
    is_single_process = num_processes() == 1
    tuned, duration = Duration.parse(tuning.duration), recipe.train.duration
    is_long_enough = duration.unit == tuned.unit and duration.count >= tuned.count
    unusable = {
        *(() if is_single_process else (*SINGLE_PROCESS_KEYS, *LOADER_KEYS)),
        *(() if is_long_enough else LONG_KEYS),
    }
    values = {key: value for key, value in tuning.values.items() if key not in unusable}
    return Presets({key: Decision(value, f"{TUNED} {tuning.date}", "tuned") for key, value in values.items()})


def current_machine() -> dict[str, Any]:
    """Return processor, cores, device and the number of training processes, of all machines together."""
    machine = describe_machine(torch.device("cuda" if uses_gpu() else "cpu"), num_processes())
    return {
        **{key: machine[key] for key in ("processor", "cores", "device")},
        "processes": machine["num_processes"],
    }


def tuning_key(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str], dict[str, Any], dict[str, Any]]:
    """Return machine, versions, model and data, by which a tuning is stored and found."""
    machine = {key: value for key, value in current_machine().items() if key != "processes"}
    versions = {name: version for name, version in describe_versions().items() if name in VERSIONS}
    model = recipe.model.model_dump(mode="json", exclude={"pretrained", "drop_path", "trust_remote_code"})
    model |= {"image_size": recipe.data.size_in_training, "batch_size": recipe.train.batch_size}
    data_keys = ("dataset", "config", "train_split", "short_side", "stored_quality", "reduced_decode", "decoder")
    data = {key: getattr(recipe.data, key) for key in data_keys}
    return machine, versions, model, {**data, "augment": recipe.augment.model_dump(mode="json", exclude_defaults=True)}
