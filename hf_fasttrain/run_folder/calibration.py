"""The calibration of a run's weights: a temperature for its probabilities, and thresholds of its classes.

It belongs to the weights: RUN/model has that of its own in a file, a checkpoint has it in its state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_fasttrain.run_folder.file_names import CALIBRATION_FILE, CONFIG_FILE
from hf_fasttrain.run_folder.schemas import CalibrationFile, read_file
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import read_object, write_json


@dataclass(frozen=True)
class Reliability:
    """How far probabilities are from shares of correct predictions, as `Metrics` counts it; lists have an item a bin.

    The probabilities are those of the predicted classes; if an image may have several classes, those of all classes.
    """

    loss: float  # mean negative log-likelihood, multi-label per class
    ece: float
    brier: float
    counts: list[int]
    confidence: list[float]  # mean probability of the bin; 0 if it is empty
    correct: list[float]  # share of correct predictions, multi-label of images that have the class


@dataclass(frozen=True)
class Calibration:
    """What is fitted to the logits of the evaluation split after a step: probabilities are those of logits / T."""

    step: int
    split: str
    images: int  # that the temperature was fitted to
    temperature: float | None = None  # T; None: it could not be fitted, `remark` says why
    thresholds: list[float] | None = None  # multi-label: the probability (without temperature) to predict a class from
    before: Reliability | None = None  # of these images
    after: Reliability | None = None
    remark: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Calibration:
        """Return the calibration of an object that fits `CalibrationFile`; unknown keys are ignored."""
        known: dict[str, Any] = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("before", "after"):
            part = known.get(name)
            if isinstance(part, Mapping):
                known[name] = Reliability(**{key: part[key] for key in Reliability.__dataclass_fields__})
        return cls(**known)


def read_calibration(model_folder: Path) -> Calibration | None:
    """Return the calibration of the weights in a model folder, None if there is none. Raises RunError."""
    path = model_folder / CALIBRATION_FILE
    return Calibration.of(read_file(path, CalibrationFile)) if path.is_file() else None


def calibration_of_weights(model_folder: Path, checkpoint: Path | None) -> Calibration | None:
    """Return the calibration of a checkpoint's weights, or without one of those in a model folder; None: it has none.

    Raises RunError if the file can't be read.
    """
    if checkpoint is None:
        return read_calibration(model_folder)
    from hf_fasttrain.run_folder.checkpoint import read_state

    return calibration_in(read_state(checkpoint).get("state") or {})


def calibration_in(state: Mapping[str, Any]) -> Calibration | None:
    """Return the calibration in the state of a training; None if it is that of an earlier step, or missing."""
    values = state.get("calibration")
    return Calibration.of(values) if values and values["step"] == state["step"] else None


def write_calibration(model_folder: Path, calibration: Calibration | None) -> None:
    """Write the calibration of the weights into a model folder; None removes an earlier one. Raises OSError.

    config.json, which timm and transformers read, has temperature and thresholds too.
    """
    path, config_path = model_folder / CALIBRATION_FILE, model_folder / CONFIG_FILE
    if calibration is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, asdict(calibration))
    config = read_object(config_path) if config_path.is_file() else {}
    if calibration is None and "calibration" not in config:
        return
    config.pop("calibration", None)
    if config:
        values = {"calibration": published(calibration)} if calibration is not None else {}
        config_path.write_text(json.dumps({**config, **values}, indent=2) + "\n", encoding="utf-8")


def published(calibration: Calibration) -> dict[str, Any]:
    """Return what other programs need: temperature and thresholds, as far as they are known."""
    values = {"temperature": calibration.temperature, "thresholds": calibration.thresholds}
    return {name: value for name, value in values.items() if value is not None}


def require_classes(calibration: Calibration | None, num_classes: int, where: object) -> None:
    """Raise RunError if there are thresholds of another number of classes."""
    thresholds = None if calibration is None else calibration.thresholds
    if thresholds is not None and len(thresholds) != num_classes:
        raise RunError(
            f"{where}: its {CALIBRATION_FILE} has {len(thresholds):,} thresholds, and the model has {num_classes:,} "
            "classes; copy the folder again, or remove the file"
        )
