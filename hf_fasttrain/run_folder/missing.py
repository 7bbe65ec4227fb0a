"""What is missing in the folder of a fully trained run: model, result.json, predictions, report."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from hf_fasttrain.run_folder.file_names import (
    CHECKPOINTS_FOLDER,
    MODEL_FOLDER,
    PREDICTIONS_FILE,
    PUSHED_FILE,
    REPORT_FILE,
    RESULT_FILE,
    SPEC_FILE,
)
from hf_fasttrain.run_folder.kept_weights import has_average, step_in_model
from hf_fasttrain.run_folder.schemas import PushedFile, ResultFile, read_if_sound
from hf_fasttrain.utils.files import digest_of, open_regular, restore_folder, safetensors_header

RESULT_MARK = '<meta name="hf_fasttrain-result" content="{}">'  # names the result.json that a report was made from


def result_mark(run: Path) -> str:
    """Return the tag in a report's head that identifies the current result.json; empty if there is none."""
    path = run / RESULT_FILE
    return RESULT_MARK.format(digest_of(path)) if path.is_file() else ""


def missing_results(run: Path, steps: int, model_step: int, *, report: bool, averaged: bool = False) -> list[str]:
    """Return the names of results of a run of `steps` that are missing or outdated (from an earlier end).

    `model_step` is the step of the weights that RUN/model should hold, the last one if they should be `averaged`;
    `report`: whether the run has predictions and a report. Results that result.json lists as not written are missing
    too.
    """
    result = read_if_sound(run / RESULT_FILE, ResultFile)
    restore_folder(run / MODEL_FOLDER)
    is_there = {
        MODEL_FOLDER: _is_model(run / MODEL_FOLDER)
        and step_in_model(result) in (None, model_step)
        and has_average(result) == averaged,
        RESULT_FILE: result.get("steps") == steps,
        PREDICTIONS_FILE: not report or _is_of_step(run / PREDICTIONS_FILE, model_step),
        REPORT_FILE: not report or _is_report_of(run / REPORT_FILE, result, result_mark(run)),
    }
    names = [name for name, found in is_there.items() if not found]
    return list(dict.fromkeys([*names, *_names(result.get("not_written") or [])]))


def describe_missing(
    run: Path, not_written: list[str], steps: int, model_step: int, *, report: bool, averaged: bool = False
) -> str:
    """Return the message after a training whose results could not all be written: what is on disk, what to do.

    `not_written` lists the results that failed, each with its reason; the rest as for `missing_results`.
    """
    from hf_fasttrain.run_folder.checkpoint import checkpoint_step, complete_checkpoints

    missing = {*missing_results(run, steps, model_step, report=report, averaged=averaged), *_names(not_written)}
    expected = (MODEL_FOLDER, RESULT_FILE, *((PREDICTIONS_FILE, REPORT_FILE) if report else ()))
    written = [name for name in expected if name not in missing]
    saved = [checkpoint_step(path) for path in complete_checkpoints(run / CHECKPOINTS_FOLDER)]
    is_full = any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT) for text in not_written)
    resume = f"{'free space on that disk' if is_full else 'remove the cause'}, then the same command with --resume"
    if not saved:
        trains, cause = "would train" if written else "trains", "freeing space" if is_full else "removing the cause"
        what_next = f"no checkpoint is on disk: after {cause}, --resume {trains} from scratch"
    elif saved[-1] == steps:
        what_next = f"{resume} writes what is missing; nothing is trained again"
    else:
        what_next = f"{resume} continues from step {saved[-1]:,} and writes what is missing"
    on_disk = f"on disk: {', '.join(written)}" if written else "nothing else is on disk either"
    return "\n".join(
        [
            "trained to the end, but not everything is on disk:",
            *(f"  {text}" for text in not_written),
            on_disk,
            what_next,
        ]
    )


def _names(not_written: list[str]) -> list[str]:
    """Return the file names of results that could not be written."""
    return [Path(re.sub(r":.*", "", str(text), flags=re.DOTALL)).name for text in not_written]


def is_pushed(run: Path, repo: str, steps: int) -> bool:
    """Return whether the finished run of `steps` was pushed to a Hub repository."""
    pushed = read_if_sound(run / PUSHED_FILE, PushedFile)
    return pushed.get("repo") == repo and pushed.get("step") == steps and bool(pushed.get("finished", True))


def _is_model(folder: Path) -> bool:
    return (folder / SPEC_FILE).is_file() and any(folder.glob("*.safetensors"))


def _is_of_step(path: Path, step: int) -> bool:
    """Return whether a file of predictions exists and is of a step's weights."""
    try:
        return int(safetensors_header(path)["__metadata__"]["step"]) == step
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_report_of(path: Path, result: dict[str, Any], mark: str) -> bool:
    """Return whether a report exists and was made from the current result.json; older versions don't record it."""
    try:
        with open_regular(path) as file:
            return mark.encode() in file.read(4000) or "model" not in result
    except OSError:
        return False
