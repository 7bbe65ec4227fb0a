"""The run folder: which files belong to a run, and whether a new run may use the folder."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any

from hf_fasttrain.run_folder.checkpoint import PREFIX, complete_checkpoints, read_state
from hf_fasttrain.run_folder.file_names import (
    AVERAGED_FOLDER,
    BAD_IMAGES_FILE,
    CHECKPOINTS_FOLDER,
    CROSSVAL_FILE,
    FILES_WHILE_TRAINING,
    LOCK_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    RESOLVED_FILE,
    RESULT_FILE,
    RUN_FILES,
    TRACKERS_FOLDER,
)
from hf_fasttrain.utils.errors import RunError, how_to_resume, resume_option
from hf_fasttrain.utils.files import kind_of_file, reason
from hf_fasttrain.utils.format import format_command

FILES_OF_UNSAVED = (
    *FILES_WHILE_TRAINING,
    BAD_IMAGES_FILE,
    TRACKERS_FOLDER,
    f"{CHECKPOINTS_FOLDER}/{AVERAGED_FOLDER}",
)


def require_free(folder: Path, *, resume: bool) -> None:
    """Raise RunError if the path can't be a run folder, or if it holds a run and `resume` is False.

    A run that was stopped before it saved anything does not count: see `is_unsaved`. A finished run without checkpoints
    can't be resumed, and the folder of a cross-validation has other files by the same names.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise RunError(f"output_dir {folder}: is a file; choose another output_dir")
        if folder.exists():
            os.listdir(folder)
            _require_kinds(folder)
            _require_not_to_be_replaced(folder, resume=resume)
        is_taken = bool(run_files_in(folder)) and not resume and not is_unsaved(folder)
    except OSError as error:
        raise RunError(f"output_dir {folder}: can't be used: {reason(error)}; choose another output_dir") from None
    if is_taken:
        raise holds_run(folder)


def _require_not_to_be_replaced(folder: Path, *, resume: bool) -> None:
    """Raise RunError if a training would begin anew over results that are complete."""
    if (folder / CROSSVAL_FILE).exists():
        raise RunError(
            f"output_dir {folder}: holds a cross-validation ({CROSSVAL_FILE}), whose report and predictions a run "
            "would replace; choose another output_dir"
        )
    checkpoints = folder / CHECKPOINTS_FOLDER
    if resume and (folder / RESULT_FILE).exists() and not any(checkpoints.glob(f"{PREFIX}*")):
        raise RunError(
            f"output_dir {folder}: its run is finished ({RESULT_FILE}), and its checkpoints have been removed, without "
            "which it can't be continued; choose another output_dir for a new run"
        )


APPENDED = (METRICS_FILE, BAD_IMAGES_FILE)  # never through a link, which could lead to any file of the user's


def _require_kinds(folder: Path) -> None:
    """Raise RunError if something else has the name of a run's file: a FIFO, a device, a link that leads nowhere."""
    for name in (*RUN_FILES, BAD_IMAGES_FILE, CHECKPOINTS_FOLDER):
        path, wanted = folder / name, stat.S_ISDIR if name == CHECKPOINTS_FOLDER else stat.S_ISREG
        if not os.path.lexists(path):
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if not path.is_symlink():
                raise
            found = f"a link to {os.readlink(path)}: {reason(error)}"
        else:
            if wanted(mode) and not (name in APPENDED and path.is_symlink()):
                continue
            found = kind_of_file(mode)
            if wanted(mode):
                found = f"a link to {os.readlink(path)}, which is not written to"
        raise RunError(f"output_dir {folder}: {name} is {found}; remove it, or choose another output_dir")


def holds_run(folder: Path) -> RunError:
    """Return the error for a new run in a folder that holds one."""
    command = resume_command(folder)
    how = f"`{command}` continues it" if command else f"add {resume_option()} to continue it"
    files = ", ".join(run_files_in(folder))
    return RunError(f"output_dir {folder}: holds a run already ({files}); {how}, or choose another output_dir")


def resume_command(folder: Path) -> str | None:
    """Return the command that resumes a recipe's run; None where a launcher or a Python program has started it."""
    is_launched = os.environ.get("WORLD_SIZE", "1") != "1"
    if resume_option() != "--resume" or is_launched or not (folder / RECIPE_FILE).is_file():
        return None
    return format_command(folder, "--resume")


def how_to_resume_run(folder: Path) -> str:
    """Return how the run in a folder is resumed, as the subject of a sentence that ends with `continues`."""
    command = resume_command(folder)
    return f"`{command}`" if command else how_to_resume()


def is_unsaved(folder: Path) -> bool:
    """Return whether a folder holds a recipe's run that ended before it saved a checkpoint or a result.

    Its lock file and resolved.yaml show that its files were written by a run; nothing of them is worth keeping.
    """
    checkpoints = folder / CHECKPOINTS_FOLDER
    saved = [folder / name for name in (RESULT_FILE, MODEL_FOLDER, PREDICTIONS_FILE, REPORT_FILE)]
    is_run = (folder / RESOLVED_FILE).is_file() and (checkpoints / LOCK_FILE).is_file()
    return is_run and not any(path.exists() for path in saved) and not any(checkpoints.glob(f"{PREFIX}*"))


def is_begun(folder: Path) -> bool:
    """Return whether a folder holds a run that has saved something, and that can be resumed."""
    return bool(run_files_in(folder)) and not is_unsaved(folder)


def remove_unsaved(folder: Path) -> list[str]:
    """Remove the files of a run that saved nothing, and return their names. Raises OSError."""
    found = [folder / name for name in FILES_OF_UNSAVED if (folder / name).exists()]
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in found]


def run_files_in(folder: Path) -> list[str]:
    """Return the names of files and folders of a run that are in a folder."""
    files = [name for name in RUN_FILES if (folder / name).exists()]
    return [*files, *([CHECKPOINTS_FOLDER] if complete_checkpoints(folder / CHECKPOINTS_FOLDER) else [])]


def saved_state(folder: Path) -> dict[str, Any]:
    """Return the plain values of the newest intact checkpoint, an empty dict if there is none."""
    states = map(read_state, reversed(complete_checkpoints(folder / CHECKPOINTS_FOLDER)))
    return next(filter(None, states), {})
