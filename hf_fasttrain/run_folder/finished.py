"""Reading the folder of a finished run. This module does not import torch: the upload process starts in no time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fasttrain.run_folder.file_names import (
    CUSTOM,
    MODEL_FOLDER,
    RECIPE_FILE,
    RESOLVED_FILE,
    RESULT_FILE,
    SPEC_FILE,
    WEIGHTS_FILE,
)
from hf_fasttrain.run_folder.schemas import (
    ResultFile,
    SpecFile,
    read_file,
    read_if_sound,
    read_recipe_file,
    read_settings_file,
)
from hf_fasttrain.run_folder.scrub import is_local_path
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import reason, restore_folder


@dataclass(frozen=True)
class FinishedRun:
    """The content of a finished run's folder."""

    folder: Path
    spec: dict[str, Any]
    result: dict[str, Any]
    recipe: dict[str, Any]  # empty for a run without a recipe
    recipe_text: str
    local: list[str] | None = None  # keys of settings that were paths where the run was trained; None: not recorded
    passed: dict[str, str] = field(default_factory=dict)  # names of the parts that were passed in Python

    def setting(self, key: str) -> Any:
        """Return a value of the recipe file by its dotted key, None if it is not set there."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def is_local(self, key: str) -> bool:
        """Return whether a setting was a local path where the run was trained (if recorded, else here)."""
        if self.local is not None:
            return key in self.local
        value = self.setting(key)
        return isinstance(value, str) and (is_local_path(value) or os.path.exists(value))


def needs_user_model(run: Path, model: Any) -> bool:
    """Return whether the user must pass the model of a finished run, because no recipe describes it.

    `model` is the argument that was passed, or None. Raises RunError if it is missing, or passed but not needed.
    """
    restore_folder(run / MODEL_FOLDER)
    has_weights = (run / MODEL_FOLDER / WEIGHTS_FILE).is_file()
    has_recipe = (run / RECIPE_FILE).is_file() or (run / MODEL_FOLDER / SPEC_FILE).is_file()
    finished = has_weights and (run / RESULT_FILE).is_file()
    is_needed = finished and not has_recipe
    if finished and model is not None:  # from_recipe(model=) may have trained the user's model
        is_needed |= str(read_if_sound(run / MODEL_FOLDER / SPEC_FILE, SpecFile).get("name", "")).startswith("own:")
    if is_needed and model is None:
        raise RunError(
            f"{run}: was not trained from a recipe, so its model can't be built from the folder; pass the model: "
            "--model package.module:function (in Python model=...), a function that returns it"
        )
    if model is not None and not is_needed:
        raise RunError(f"{run}: --model is for finished runs of your own model; leave it out")
    return is_needed


def read_run(run: Path) -> FinishedRun:
    """Return the content of a run folder. Raises RunError if the run is not finished."""
    needs_user_model(run, None)
    missing = [name for name in (f"{MODEL_FOLDER}/{SPEC_FILE}", RESULT_FILE) if not (run / name).is_file()]
    if missing:
        from hf_fasttrain.run_folder.folder import how_to_resume_run  # imports torch

        raise RunError(
            f"{run}: is not a finished run, it has no {' and no '.join(missing)}; give the run folder of a finished "
            f"training, or finish it first: {how_to_resume_run(run)}"
        )
    spec = read_file(run / MODEL_FOLDER / SPEC_FILE, SpecFile)
    result = read_file(run / RESULT_FILE, ResultFile)
    text, recipe = read_recipe_file(run / RECIPE_FILE)
    path = run / RESOLVED_FILE
    try:
        settings = read_settings_file(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read ({reason(error)}); fix it or train again") from None
    local = settings.get("local", {}).get("value")
    local = [str(key) for key in local] if isinstance(local, list) else None
    passed = {key.removeprefix(CUSTOM): str(settings[key].get("value")) for key in settings if key.startswith(CUSTOM)}
    return FinishedRun(run, spec, result, recipe, text, local, passed)


NOT_METRICS = {"kind", "step", "epoch", "split", "train_seconds", "seconds"}


def metrics_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics in an evaluation's line of metrics.jsonl."""
    return {name: value for name, value in line.items() if name not in NOT_METRICS}
