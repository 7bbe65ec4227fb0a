"""crossval.json: what a cross-validation trains, what is done, and its figures; written after each training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from hf_fasttrain.run_folder.checkpoint import differing_settings
from hf_fasttrain.run_folder.file_names import CHECKPOINTS_FOLDER, CROSSVAL_FILE
from hf_fasttrain.run_folder.schema_intervals import IntervalsPart
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import read_text, reason, write_json
from hf_fasttrain.utils.validation import first_mistake

FINAL = "final"  # the folder of the training on all images
Name = Annotated[str, StringConstraints(max_length=1000)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class OverFolds(BaseModel):
    """A metric over the folds: its mean with an interval of Student's t, and its values."""

    model_config = ConfigDict(strict=True, extra="ignore")
    mean: Number
    low: Number | None
    high: Number | None
    values: Annotated[list[Number], Field(max_length=1000)]


class Pooled(BaseModel):
    """The metrics of all images together, each predicted by the model that was not trained on it."""

    model_config = ConfigDict(strict=True, extra="ignore")
    images: Annotated[int, Field(ge=0)]
    metrics: Annotated[dict[Name, Number], Field(max_length=1000)]
    intervals: IntervalsPart


class CrossvalFile(BaseModel):
    """All of crossval.json."""

    model_config = ConfigDict(strict=True, extra="ignore")
    format: Literal[1] = 1
    recipe: Name
    folds: Annotated[int, Field(ge=2, le=1000)]
    seed: int
    final: bool  # whether there is a training on all images at the end
    data: Name  # fingerprint of the images
    settings: dict[Name, Any]  # of the recipe, those that change the result
    done: Annotated[list[Name], Field(max_length=1001)] = []  # folders of the finished trainings
    metrics: dict[Name, OverFolds] | None = None  # once all folds are done
    pooled: Pooled | None = None

    def require_same(self, earlier: CrossvalFile, folder: Path, defaults: dict[str, Any]) -> None:
        """Raise RunError unless a cross-validation that is continued began with the same recipe and data.

        `defaults` are the values of settings that did not exist yet when it began.
        """
        began = {key: defaults[key] for key in self.settings.keys() & defaults.keys()} | earlier.settings
        mine, others = {**self.settings, "data.folds": self.folds}, {**began, "data.folds": earlier.folds}
        if changed := differing_settings(others, mine):
            listed = "\n".join(f"  {key}: {others.get(key)!r} before, {mine.get(key)!r} now" for key in changed)
            raise RunError(
                f"{folder}: began with other settings, which change the result:\n{listed}\nRestore them, or choose "
                "another output_dir"
            )
        if self.data != earlier.data:
            raise RunError(
                f"{folder}: the data have changed since it began ({earlier.data}; now {self.data}), so the folds would "
                "be others; restore them, or choose another output_dir"
            )


def fold_folder(fold: int | str) -> str:
    """Return the name of a fold's run folder; of `*`, the pattern of all of them."""
    return f"fold_{fold}"


def read_crossval(folder: Path) -> CrossvalFile | None:
    """Return crossval.json, None if there is none. Raises RunError for a damaged one."""
    path = folder / CROSSVAL_FILE
    if not path.exists():
        return None
    try:
        return CrossvalFile.model_validate_json(read_text(path))
    except ValidationError as error:
        wrong = first_mistake(error)
    except (OSError, ValueError) as error:
        wrong = reason(error)
    raise RunError(f"{path}: can't be read as a cross-validation ({wrong}); restore it, or choose another output_dir")


def write_crossval(folder: Path, values: CrossvalFile) -> None:
    """Write crossval.json. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CROSSVAL_FILE, values.model_dump(mode="json"))


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as they are when they come back from JSON."""
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


def keep_only_model(run: Path) -> None:
    """Remove the checkpoints of a finished fold: its model, predictions and report stay. Raises OSError."""
    if (run / CHECKPOINTS_FOLDER).is_dir():
        shutil.rmtree(run / CHECKPOINTS_FOLDER)
