"""Weights of a finished run by name (best, last, average, step_N): those in RUN/model, or those of a checkpoint.

This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fasttrain.run_folder.file_names import CHECKPOINTS_FOLDER, RESULT_FILE
from hf_fasttrain.run_folder.schemas import ResultFile, read_if_sound
from hf_fasttrain.utils.errors import RunError, first_lines

if TYPE_CHECKING:
    from torch import nn


def step_in_model(result: Mapping[str, Any]) -> int | None:
    """Return the step of the weights in RUN/model by result.json, None if it does not say, or for a mean of several."""
    model = result.get("model")
    if has_average(result):
        return None
    step = model.get("step") if isinstance(model, dict) else result.get("weights_of_step", result.get("steps"))
    return step if isinstance(step, int) else None


def has_average(result: Mapping[str, Any]) -> bool:
    """Return whether RUN/model has the mean of the weights after several steps."""
    model = result.get("model")
    return isinstance(model, dict) and model.get("weights") == "average"


def resolve_step(run: str, result: Mapping[str, Any], weights: str) -> int | None:
    """Return the step that last, best or step_N stands for in a `run`, None if it is unknown. Raises RunError."""
    if weights == "last":
        step = result.get("steps")
        return step if isinstance(step, int) else None
    if weights == "best":
        step = (result.get("best") or {}).get("step")
        if not isinstance(step, int):
            raise RunError(f"{run}: it has no best evaluation (result.json); omit weights=best")
        return step
    match = re.fullmatch(r"step_(\d+)", weights)
    if not match:
        raise RunError(f"weights={weights}: allowed are last, best, average and step_N")
    return int(match[1])


def find_checkpoint(run: Path, weights: str | None, name: str = "") -> Path | None:
    """Return the checkpoint of `weights` (best, last, average or step_N) in a run, None if they are in RUN/model.

    `weights` None stands for those in RUN/model. `name` is what messages call the run, by default its folder. Raises
    RunError if the weights were not kept.
    """
    if weights is None:
        return None
    from hf_fasttrain.run_folder.checkpoint import checkpoint_path, checkpoint_step, complete_checkpoints

    result, name = read_if_sound(run / RESULT_FILE, ResultFile), name or str(run)
    if not (run / RESULT_FILE).is_file():
        raise RunError(f"{name}: has no {RESULT_FILE}, which says which weights are {weights}; give the run folder")
    if weights == "average":
        if not has_average(result):
            raise RunError(f"{name}: it has no average of its weights; train with checkpoint.final=average")
        return None
    step, checkpoints = resolve_step(name, result, weights), complete_checkpoints(run / CHECKPOINTS_FOLDER)
    kept = step is not None and checkpoint_path(run / CHECKPOINTS_FOLDER, step) in checkpoints
    if step is not None and step == step_in_model(result) and not (kept and weights.startswith("step_")):
        return None
    if step is None or not kept:
        names = ", ".join(f"step_{checkpoint_step(path)}" for path in checkpoints) or "none"
        raise RunError(f"{name}: no checkpoint of step {step} (weights={weights}); available: {names}")
    return checkpoint_path(run / CHECKPOINTS_FOLDER, step)


def load_checkpoint_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a model, those of the moving average if it has one. Raises RunError."""
    from hf_fasttrain.run_folder.checkpoint import load_checkpoint

    weights = load_checkpoint(checkpoint).weights
    try:
        model.load_state_dict(weights.get("ema") or weights["model"])
    except RuntimeError as error:
        raise RunError(f"{checkpoint}: weights of another model: {first_lines(error)}") from None
    model.eval()
