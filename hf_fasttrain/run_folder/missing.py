"""What a run that was trained to its end still owes: its model, result.json, predictions and report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hf_fasttrain.run_folder.finished import RESULT_FILE, SPEC_FILE
from hf_fasttrain.run_folder.kept_weights import step_in_model
from hf_fasttrain.run_folder.predictions import PREDICTIONS_FILE
from hf_fasttrain.utils.files import digest_of, read_json, restore_folder

REPORT_FILE = "report.html"
PUSHED_FILE = "hub.json"  # what was pushed last
RESULT_MARK = '<meta name="hf_fasttrain-result" content="{}">'  # of which result.json a report tells


def result_mark(run: Path) -> str:
    """Return what a report has in its head that tells of the present result.json."""
    path = run / RESULT_FILE
    return RESULT_MARK.format(digest_of(path)) if path.is_file() else ""


def missing_results(run: Path, steps: int, model_step: int, *, report: bool) -> list[str]:
    """Return the names of what is missing in a run that has made all its `steps`, or is of an earlier end.

    `model_step` is that of the weights that RUN/model should have; `report`: whether predictions and a report belong to
    the run. What result.json says could not be written is missing too.
    """
    result = read_json(run / RESULT_FILE)
    restore_folder(run / "model")
    found = {
        "model": _is_model(run / "model") and step_in_model(result) in (None, model_step),
        RESULT_FILE: result.get("steps") == steps,
        PREDICTIONS_FILE: not report or _is_of_step(run / PREDICTIONS_FILE, model_step),
        REPORT_FILE: not report or _tells_of(run / REPORT_FILE, result, result_mark(run)),
    }
    names = [name for name, there in found.items() if not there]
    return list(dict.fromkeys([*names, *_names(result.get("not_written") or [])]))


def describe_missing(run: Path, lost: list[str], steps: int, model_step: int, *, report: bool) -> str:
    """Return what to say at the end of a training of `steps` whose disk did not take all: what is there, what to do.

    `lost` are the results that could not be written, each with the reason; the rest as for `missing_results`.
    """
    from hf_fasttrain.run_folder.checkpoint import checkpoint_step, complete_checkpoints

    missing = {*missing_results(run, steps, model_step, report=report), *_names(lost)}
    wanted = ("model", RESULT_FILE, *((PREDICTIONS_FILE, REPORT_FILE) if report else ()))
    there = [name for name in wanted if name not in missing]
    saved = [checkpoint_step(path) for path in complete_checkpoints(run / "checkpoints")]
    again = "make room on that disk, then the same command with --resume"
    if not saved:
        what_next = f"no checkpoint is on disk: after making room, --resume {'would train' if there else 'trains'} anew"
    elif saved[-1] == steps:
        what_next = f"{again} writes what is missing; nothing is trained again"
    else:
        what_next = f"{again} trains on from step {saved[-1]:,} and writes what is missing"
    on_disk = f"on disk: {', '.join(there)}" if there else "nothing else is on disk either"
    return "\n".join(
        ["trained to the end, but not everything is on disk:", *(f"  {text}" for text in lost), on_disk, what_next]
    )


def _names(lost: list[str]) -> list[str]:
    """Return the file names of results that could not be written."""
    return [Path(re.sub(r":.*", "", str(text), flags=re.DOTALL)).name for text in lost]


def is_pushed(run: Path, repo: str, steps: int) -> bool:
    """Return whether the run as it ended after `steps` is in a Hub repository."""
    pushed = read_json(run / PUSHED_FILE)
    return pushed.get("repo") == repo and pushed.get("step") == steps and bool(pushed.get("finished", True))


def _is_model(folder: Path) -> bool:
    return (folder / SPEC_FILE).is_file() and any(folder.glob("*.safetensors"))


def _is_of_step(path: Path, step: int) -> bool:
    """Return whether predictions are there and of the weights of a step."""
    try:
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return int(header["__metadata__"]["step"]) == step
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return False


def _tells_of(path: Path, result: dict[str, Any], mark: str) -> bool:
    """Return whether a report is there and of the present result.json; those of earlier versions don't say it."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return mark in file.read(4000) or "model" not in result
    except OSError:
        return False
