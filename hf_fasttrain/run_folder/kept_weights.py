"""Which weights of a finished run are meant: those in RUN/model, or those of a checkpoint that is kept.

Importing this brings no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fasttrain.utils.errors import RunError, first_lines
from hf_fasttrain.utils.files import read_json

if TYPE_CHECKING:
    from torch import nn

RESULT_FILE = "result.json"


def step_in_model(result: Mapping[str, Any]) -> int | None:
    """Return after which step the model had the weights that lie in RUN/model, as result.json tells."""
    model = result.get("model")
    step = model.get("step") if isinstance(model, dict) else result.get("weights_of_step", result.get("steps"))
    return step if isinstance(step, int) else None


def step_of(run: str, result: Mapping[str, Any], weights: str) -> int | None:
    """Return the step of the weights that best, last or step_N means in a `run`. Raises RunError."""
    if weights == "last":
        step = result.get("steps")
        return step if isinstance(step, int) else None
    if weights == "best":
        step = (result.get("best") or {}).get("step")
        if not isinstance(step, int):
            raise RunError(f"{run}: it has no best evaluation (result.json); leave weights=best out")
        return step
    found = re.fullmatch(r"step_(\d+)", weights)
    if not found:
        raise RunError(f"weights={weights}: allowed are last, best and step_N")
    return int(found[1])


def checkpoint_with(run: Path, weights: str | None, place: str = "") -> Path | None:
    """Return the checkpoint that holds a run's `weights`: best, last or step_N; None if RUN/model has them.

    By default those in RUN/model are meant. `place` is what the user calls the run. Raises RunError for weights that
    are nowhere.
    """
    if weights is None:
        return None
    from hf_fasttrain.run_folder.checkpoint import checkpoint_path, checkpoint_step, complete_checkpoints

    result, name = read_json(run / RESULT_FILE), place or str(run)
    if not (run / RESULT_FILE).is_file():
        raise RunError(
            f"{name}: has no {RESULT_FILE} that tells which weights are {weights}; give the run folder itself"
        )
    step, there = step_of(name, result, weights), complete_checkpoints(run / "checkpoints")
    kept = step is not None and checkpoint_path(run / "checkpoints", step) in there
    if step is not None and step == step_in_model(result) and not (kept and weights.startswith("step_")):
        return None
    if step is None or not kept:
        names = ", ".join(f"step_{checkpoint_step(path)}" for path in there) or "none"
        raise RunError(f"{name}: no checkpoint of step {step} (weights={weights}); there are: {names}")
    return checkpoint_path(run / "checkpoints", step)


def load_weights_of(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights, of the moving average where it has one. Raises RunError."""
    from hf_fasttrain.run_folder.checkpoint import load_checkpoint

    kinds = load_checkpoint(checkpoint).weights
    try:
        model.load_state_dict(kinds.get("ema") or kinds["model"])
    except RuntimeError as error:
        raise RunError(f"{checkpoint}: weights of another model: {first_lines(error)}") from None
    model.eval()
