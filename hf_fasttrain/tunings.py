"""What `hf-fasttrain tune` found out, kept for `auto`: machine settings by machine, versions, model and step."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_fasttrain.files import read_json, write_json

TUNED = "tuned on"  # how the origin of such a value begins, in resolved.yaml too

# Settings that hold for any number of processes, and those that were measured for one process and its data.
COMPUTE_KEYS = (
    "accelerate.mixed_precision",
    "accelerate.channels_last",
    "accelerate.compile",
    "accelerate.matmul_precision",
    "accelerate.conv_precision",
)
ALONE_KEYS = ("accelerate.micro_batch_size", "accelerate.cpu_threads")
LONG_KEYS = (
    "accelerate.compile",
    "data.cache",
)  # what costs time first, and pays in a training as long as the tuned one
LOADER_KEYS = ("data.workers", "data.cache", "data.pin_memory")
TUNED_KEYS = (*COMPUTE_KEYS, *ALONE_KEYS, *LOADER_KEYS)


@dataclass(frozen=True)
class Tuned:
    """Values for keys that a recipe leaves to `auto`, and where they come from."""

    values: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    reasons: dict[str, str] = field(default_factory=dict)  # by key, where they are several

    def why_of(self, key: str) -> str:
        """Return where the value of a key comes from."""
        return self.reasons.get(key, self.why)


@dataclass(frozen=True)
class Tuning:
    """What was measured, and for what: a tuning is used where `machine`, `versions` and `model` are the same."""

    machine: dict[str, Any]  # processor, cores, device
    versions: dict[str, str]
    model: dict[str, Any]  # the recipe's model section, image size and images per step
    data: dict[str, Any]  # the data set and what is done to its images: the loader's settings depend on it
    values: dict[str, Any]  # dotted machine key -> value
    date: str
    images_per_second: float
    duration: str  # of the training that it was forecast for


def tunings_dir() -> Path:
    """Return the folder of the stored tunings: $HF_FASTTRAIN_TUNINGS or ~/.cache/hf_fasttrain/tunings."""
    return Path(os.environ.get("HF_FASTTRAIN_TUNINGS", "~/.cache/hf_fasttrain/tunings")).expanduser()


def store_tuning(tuning: Tuning) -> Path:
    """Write a tuning over an earlier one of the same machine, versions, model and data; OSError if it can't be."""
    path = _path(tuning.machine, tuning.versions, tuning.model, tuning.data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(tuning))
    return path


def find_tuning(
    machine: dict[str, Any], versions: dict[str, str], model: dict[str, Any], data: dict[str, Any]
) -> Tuning | None:
    """Return the stored tuning of the same machine, versions, model and data, None if there is none."""
    found = read_json(_path(machine, versions, model, data))
    try:
        tuning = Tuning(**found)
    except TypeError:  # none, or of another version
        return None
    return tuning if isinstance(tuning.values, dict) else None


def _path(*parts: dict[str, Any]) -> Path:
    text = json.dumps(parts, sort_keys=True, default=str)
    return tunings_dir() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
