"""What a run that was trained to its end still owes: its model, result.json, predictions and report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hf_fasttrain.files import digest_of, put_back_folder, read_json
from hf_fasttrain.predictions import PREDICTIONS_FILE
from hf_fasttrain.publish.finished import RESULT_FILE, SPEC_FILE
from hf_fasttrain.run_weights import step_in_model

REPORT_FILE = "report.html"
PUSHED_FILE = "hub.json"  # what was pushed last
RESULT_MARK = '<meta name="hf_fasttrain-result" content="{}">'  # of which result.json a report tells


def result_mark(run: Path) -> str:
    """Return what a report has in its head that tells of the present result.json."""
    path = run / RESULT_FILE
    return RESULT_MARK.format(digest_of(path)) if path.is_file() else ""


def owed(run: Path, steps: int, model_step: int, *, report: bool) -> list[str]:
    """Return the names of what is missing in a run that has made all its `steps`, or is of an earlier end.

    `model_step` is that of the weights that RUN/model should have; `report`: whether predictions and a report belong to
    the run. What result.json says could not be written is missing too.
    """
    result = read_json(run / RESULT_FILE)
    put_back_folder(run / "model")
    found = {
        "model": _is_model(run / "model") and step_in_model(result) in (None, model_step),
        RESULT_FILE: result.get("steps") == steps,
        PREDICTIONS_FILE: not report or _is_of_step(run / PREDICTIONS_FILE, model_step),
        REPORT_FILE: not report or _tells_of(run / REPORT_FILE, result, result_mark(run)),
    }
    lost = [re.sub(r":.*", "", str(text), flags=re.DOTALL) for text in result.get("not_written") or []]
    names = [name for name, there in found.items() if not there]
    return list(dict.fromkeys([*names, *(Path(text).name for text in lost)]))


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
