"""The run folder: which files belong to a run, and whether a new run may use the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_fasttrain.run_folder.checkpoint import complete_checkpoints, read_state
from hf_fasttrain.run_folder.file_names import CHECKPOINTS_FOLDER, RUN_FILES
from hf_fasttrain.utils.errors import RunError, resume_option


def require_free(folder: Path, *, resume: bool) -> None:
    """Raise RunError if the path is not a folder, or if it holds a run and `resume` is False."""
    try:
        exists = folder.exists()
    except OSError as error:
        raise RunError(f"output_dir {folder}: can't be used: {error.strerror}; choose another output_dir") from None
    if exists and not folder.is_dir():
        raise RunError(f"output_dir {folder}: is a file; choose another output_dir")
    files = run_files_in(folder)
    if files and not resume:
        raise RunError(
            f"output_dir {folder}: holds a run already ({', '.join(files)}); add {resume_option()} to continue it, "
            "or choose another output_dir"
        )


def run_files_in(folder: Path) -> list[str]:
    """Return the names of files and folders of a run that are in a folder."""
    files = [name for name in RUN_FILES if (folder / name).exists()]
    return [*files, *([CHECKPOINTS_FOLDER] if complete_checkpoints(folder / CHECKPOINTS_FOLDER) else [])]


def saved_state(folder: Path) -> dict[str, Any]:
    """Return the plain values of the newest intact checkpoint, an empty dict if there is none."""
    states = map(read_state, reversed(complete_checkpoints(folder / CHECKPOINTS_FOLDER)))
    return next(filter(None, states), {})
