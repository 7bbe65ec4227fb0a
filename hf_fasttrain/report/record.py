"""The content of a run folder as its report reads it: also of an unfinished run, or one with damaged files."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hf_fasttrain.run_folder.calibration import Calibration
from hf_fasttrain.run_folder.file_names import (
    BAD_IMAGES_FILE,
    CALIBRATION_FILE,
    GALLERY_FOLDER,
    LABEL_ERRORS_FOLDER,
    METRICS_FILE,
    MODEL_FOLDER,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    RESOLVED_FILE,
    RESULT_FILE,
    SPEC_FILE,
)
from hf_fasttrain.run_folder.finished import metrics_of
from hf_fasttrain.run_folder.gallery import Gallery
from hf_fasttrain.run_folder.kept_weights import has_average
from hf_fasttrain.run_folder.metrics_file import parse_metrics_line, read_bad_images
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.run_folder.schemas import CalibrationFile, ResultFile, SpecFile, read_file, read_settings_file
from hf_fasttrain.run_folder.scrub import Scrubber
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import reason
from hf_fasttrain.utils.format import format_count, is_finite
from hf_fasttrain.utils.json_lines import lines_of

TRAIN_FIGURES = (
    "step", "epoch", "loss", "grad_norm", "lr", "images_per_second", "data_wait_fraction", "seconds_per_step",
    "peak_memory_bytes",
)  # fmt: skip
OLD_NAMES = {"peak_memory_bytes": "memory_bytes"}  # in files of older versions
OLD_TAGS = {"learnt": "result", "machine": "speed"}  # in files of older versions
MAX_SPLITS, MAX_METRICS = 20, 60  # shown
TrainFigures = dict[str, np.ndarray]


@dataclass(frozen=True)
class Record:
    """The content of a run folder. Everything may be missing: it is empty or None then."""

    folder: Path
    train: TrainFigures = field(default_factory=dict)  # figure -> (N,) float64 by step, nan if missing
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl, in order
    resumes: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, dict[str, Any]] = field(default_factory=dict)  # key -> value, origin, tag
    spec: dict[str, Any] = field(default_factory=dict)
    predictions: Predictions | None = None
    calibration: Calibration | None = None  # of the weights in RUN/model
    gallery: Gallery = field(default_factory=Gallery)
    label_errors: Gallery = field(default_factory=Gallery)  # what `mislabeled` found
    bad_images: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # files that could not be read, and why

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def is_finished(self) -> bool:
        """Whether training has finished, and was not continued afterwards."""
        return bool(self.result) and int(self.result.get("steps") or 0) >= self.last_step

    @property
    def has_best_weights(self) -> bool:
        """Whether RUN/model has the weights of the best evaluation, whose metrics are shown."""
        model, best = self.result.get("model"), self.result.get("best")
        chosen = isinstance(model, dict) and model.get("weights") == "best"
        return self.is_finished and chosen and isinstance(best, dict)

    @property
    def has_average(self) -> bool:
        """Whether RUN/model has the mean of several weights, whose metrics are shown."""
        return self.is_finished and has_average(self.result)

    @property
    def model_name(self) -> str:
        """The model's name without the library's prefix."""
        name = self.spec.get("name") or self.value("model.name") or "a model"
        return Scrubber([]).value(str(name)).removeprefix("transformers:").removeprefix("hf-hub:")

    @property
    def dataset(self) -> str:
        """The dataset's name; for a folder, its last component."""
        name = str(self.value("data.dataset") or "own data").rstrip("/")
        is_local = "data.dataset" in (self.value("local") or ())
        return name.rsplit("/", 1)[-1] if is_local else Scrubber([]).value(name)

    def value(self, key: str) -> Any:
        """Return the resolved value of a recipe's key, None if it is unknown."""
        return self.resolved.get(key, {}).get("value")

    @property
    def last_step(self) -> int:
        """The last step in any file."""
        steps = [int(line["step"]) for line in self.evaluations]
        steps += [int(self.train["step"][-1])] if len(self.train.get("step", ())) else []
        return max(steps, default=int(self.result.get("steps") or 0))

    @cached_property
    def epochs_per_step(self) -> float | None:
        """Epochs per step, None if unknown."""
        found = [(line.get("epoch"), line["step"]) for line in self.evaluations]
        if len(self.train.get("step", ())):
            found.append((float(self.train["epoch"][-1]), float(self.train["step"][-1])))
        known = [epoch / step for epoch, step in found if step and is_finite(epoch)]
        return known[-1] if known else None

    @property
    def splits(self) -> list[str]:
        """The splits that were evaluated, the one that was evaluated most often first."""
        return [name for name, _ in Counter(line["split"] for line in self.evaluations).most_common()]

    @property
    def metric_names(self) -> list[str]:
        """The metrics of the evaluations, without the loss."""
        found = {name: None for line in self.evaluations for name in metrics_of(line)}
        return [name for name in found if name != "loss" and any(is_finite(e.get(name)) for e in self.evaluations)]

    def metric_curve(self, metric: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and the values of a metric on a split, finite ones only."""
        lines = [e for e in self.evaluations if e["split"] == split and is_finite(e.get(metric))]
        return np.array([e["step"] for e in lines], float), np.array([e[metric] for e in lines], float)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the model on the main split; of an unfinished run, those of the last evaluation."""
        if self.is_finished and self.result.get("metrics"):
            return dict(self.result["metrics"])
        lines = [line for line in self.evaluations if line["split"] == self.splits[0]]
        return metrics_of(lines[-1]) if lines else {}

    def interval(self, metric: str, field: str = "intervals") -> tuple[float, float] | None:
        """Return the interval of a metric of a finished run, None if it has none."""
        found = (self.result.get(field) or {}).get("metrics") or {}
        return (found[metric][0], found[metric][1]) if self.is_finished and metric in found else None

    @cached_property
    def class_names(self) -> list[str]:
        """The names of the classes, made unique; ``class 0`` and so on if they have none."""
        names = [str(name) for name in self.spec.get("class_names") or self.gallery.class_names]
        found = self.predictions
        if found is not None:
            size = found.num_classes if found.is_multi_label else _num_classes(found)
            names += [f"class {number}" for number in range(len(names), size)]
        times = Counter(names)
        return [name if times[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def _num_classes(predictions: Predictions) -> int:
    if not len(predictions.labels):
        return 0
    return int(max(predictions.labels.max(), predictions.predicted.max())) + 1


def read_record(run: Path) -> Record:
    """Return the content of a run folder. Raises RunError if it does not exist or is not a run folder."""
    if not run.is_dir():
        raise RunError(f"{run}: no such folder; give the run folder of a training, its output_dir")
    if not any((run / name).is_file() for name in (METRICS_FILE, RESULT_FILE, RECIPE_FILE)):
        raise RunError(
            f"{run}: is not a run folder: it has no {METRICS_FILE}, no {RESULT_FILE} and no {RECIPE_FILE}; give the "
            "output_dir of a training"
        )
    problems: list[str] = []
    train, others = _read_metrics(run / METRICS_FILE, problems)
    by_kind = {kind: [line for line in others if line["kind"] == kind] for kind in ("evaluation", "resume")}
    return Record(
        folder=run,
        train=train,
        evaluations=_few(by_kind["evaluation"], problems),
        resumes=by_kind["resume"],
        result=_read_object(run / RESULT_FILE, ResultFile, problems),
        resolved=_read_resolved(run / RESOLVED_FILE, problems),
        spec=_read_object(run / MODEL_FOLDER / SPEC_FILE, SpecFile, problems),
        predictions=_read_predictions(run / PREDICTIONS_FILE, problems),
        calibration=_read_calibration(run, problems),
        gallery=_read_gallery(run, problems),
        label_errors=_read_gallery(run / LABEL_ERRORS_FOLDER, problems),
        bad_images=_read_bad_images(run / BAD_IMAGES_FILE, problems),
        problems=problems,
    )


def _read_metrics(path: Path, problems: list[str]) -> tuple[TrainFigures, list[dict[str, Any]]]:
    """Return the training figures and all other lines. A million lines take 7 seconds and 150 MB on 2 cores."""
    rows, others, bad = array("d"), [], 0
    try:
        for text in lines_of(path) if path.exists() and path.stat().st_size else ():
            line = parse_metrics_line(text)
            if line is None:
                bad += bool(text.strip())
            elif line["kind"] == "train":
                rows.extend(_row(line))
            else:
                others.append(line)
    except OSError as error:
        problems.append(f"{path.name} can't be read: {reason(error)}")
    if bad:
        problems.append(f"{path.name}: {format_count(bad, 'unreadable line')} skipped")
    table = np.array(rows, dtype=np.float64).reshape(-1, len(TRAIN_FIGURES))
    if len(table) and not (np.diff(table[:, 0]) > 0).all():  # after a resume, the last line of a step counts
        _, last = np.unique(table[::-1, 0], return_index=True)
        table = table[::-1][last]
    return {name: table[:, column] for column, name in enumerate(TRAIN_FIGURES)}, others


def _row(line: dict[str, Any]) -> array[float]:
    values = [line.get(name, line.get(OLD_NAMES.get(name, ""), np.nan)) for name in TRAIN_FIGURES]
    try:
        return array("d", values)
    except (TypeError, OverflowError):
        return array("d", [value if is_finite(value) else np.nan for value in values])


def _read_object(path: Path, schema: Any, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_file(path, schema)
    except RunError as error:
        problems.append(str(error).replace(str(path), path.name))
        return {}


def _read_resolved(path: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        entries = read_settings_file(path).items()
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} can't be read: {reason(error)}")
        return {}
    shown: dict[str, dict[str, Any]] = {}
    for key, entry in entries:
        tag = entry.get("tag", "fact")
        shown[key] = {"value": entry.get("value"), "origin": entry.get("origin", ""), "tag": OLD_TAGS.get(tag, tag)}
    return shown


def _read_predictions(path: Path, problems: list[str]) -> Predictions | None:
    if not path.exists():
        return None
    try:
        return Predictions.load(path)
    except RunError as error:
        problems.append(str(error).replace(str(path), path.name))
        return None


def _read_calibration(run: Path, problems: list[str]) -> Calibration | None:
    values = _read_object(run / MODEL_FOLDER / CALIBRATION_FILE, CalibrationFile, problems)
    return Calibration.of(values) if values else None


def _read_gallery(run: Path, problems: list[str]) -> Gallery:
    try:
        return Gallery.load(run)
    except RunError as error:
        problems.append(str(error).replace(f"{run / GALLERY_FOLDER}/", ""))
        return Gallery()


def _read_bad_images(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        return read_bad_images(path)
    except OSError as error:
        problems.append(f"{path.name} can't be read: {reason(error)}")
        return []


def _few(lines: list[dict[str, Any]], problems: list[str]) -> list[dict[str, Any]]:
    """Return the evaluations of the first splits and their first metrics; a page can't show any number of curves."""
    splits = list(dict.fromkeys(line["split"] for line in lines))
    names = list(dict.fromkeys(name for line in lines for name in line))
    if len(splits) <= MAX_SPLITS and len(names) <= MAX_METRICS:
        return lines
    problems.append(f"{METRICS_FILE} has {len(splits):,} splits and {len(names):,} metrics: only the first are shown")
    kept, known = set(splits[:MAX_SPLITS]), {*names[:MAX_METRICS], "kind", "step", "epoch", "split"}
    return [{key: line[key] for key in line.keys() & known} for line in lines if line["split"] in kept]
