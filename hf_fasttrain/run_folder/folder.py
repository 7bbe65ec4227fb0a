"""The run folder: refused if it holds another run, and held while a run trains in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_fasttrain.run_folder.checkpoint import complete_checkpoints, read_state
from hf_fasttrain.utils.errors import RunError, resume_option

FILES_WHILE_TRAINING = ("recipe.yaml", "resolved.yaml", "metrics.jsonl")
RUN_FILES = (*FILES_WHILE_TRAINING, "result.json")


def require_free(folder: Path, *, resume: bool) -> None:
    """Raise RunError if the folder holds a run and is not to be resumed, or is no folder."""
    try:
        exists = folder.exists()
    except OSError as error:
        raise RunError(f"output_dir {folder}: can't be used: {error.strerror}; choose another output_dir") from None
    if exists and not folder.is_dir():
        raise RunError(f"output_dir {folder}: is a file; choose another output_dir")
    held = run_files_in(folder)
    if held and not resume:
        raise RunError(
            f"output_dir {folder}: holds a run already ({', '.join(held)}); add {resume_option()} to go on with it, "
            "or choose another output_dir"
        )


def run_files_in(folder: Path) -> list[str]:
    """Return the names in a folder that belong to a run."""
    found = [name for name in RUN_FILES if (folder / name).exists()]
    return [*found, *(["checkpoints"] if complete_checkpoints(folder / "checkpoints") else [])]


def saved_state(folder: Path) -> dict[str, Any]:
    """Return the plain values of the newest checkpoint that looks whole, an empty dict if there is none."""
    states = map(read_state, reversed(complete_checkpoints(folder / "checkpoints")))
    return next(filter(None, states), {})
