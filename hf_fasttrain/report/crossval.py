"""The figures and the page of a cross-validation: means over folds, and metrics of all images together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from math import sqrt
from pathlib import Path

import torch

from hf_fasttrain.report import tables
from hf_fasttrain.report.charts import comparison_charts
from hf_fasttrain.report.format import format_ends, format_metric, metric_title
from hf_fasttrain.report.record import Record, read_record
from hf_fasttrain.report.report import write_html
from hf_fasttrain.report.sections import Page, Section, class_sections
from hf_fasttrain.report.tables import Cell, Column, Table
from hf_fasttrain.run_folder.crossval import CrossvalFile, OverFolds, Pooled, fold_folder
from hf_fasttrain.run_folder.file_names import PREDICTIONS_FILE, REPORT_FILE
from hf_fasttrain.run_folder.intervals import CONFIDENCE, describe_intervals, format_confidence
from hf_fasttrain.run_folder.predictions import Predictions, join_predictions
from hf_fasttrain.run_folder.result import BUILT_IN_METRICS
from hf_fasttrain.run_folder.schema_intervals import IntervalsPart
from hf_fasttrain.train.bootstrap import ResampledMetrics, intervals_of
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.format import NOTHING, format_count, is_finite

SPLIT = "all folds"  # each image predicted by the model that was not trained on it
SHARES = {name for name in BUILT_IN_METRICS if name not in ("loss", "mcc", "cohen_kappa", "brier")}


def with_figures(folder: Path, values: CrossvalFile) -> CrossvalFile:
    """Return crossval.json with the metrics of its folds, which are all done; writes their predictions as one file.

    Raises RunError for folds whose results or predictions are damaged, and OSError.
    """
    records = _records(folder, values)
    pooled = _pooled(records)
    pooled.save(folder / PREDICTIONS_FILE)
    names = [name for name in records[0].metrics if all(is_finite(record.metrics.get(name)) for record in records)]
    metrics = {name: over_folds([float(record.metrics[name]) for record in records], name in SHARES) for name in names}
    class_names = [str(name) for name in records[0].spec.get("class_names") or []]
    resampled = ResampledMetrics(pooled, names, class_names)
    found = {name: float(each[0]) for name, each in resampled(resampled.columns.total()).items()}
    intervals = intervals_of(pooled, found, class_names)
    intervals.without |= resampled.missing
    part = Pooled(images=len(pooled.labels), metrics=found, intervals=IntervalsPart(**asdict(intervals)))
    return values.model_copy(update={"metrics": metrics, "pooled": part})


def over_folds(values: Sequence[float], is_share: bool = False) -> OverFolds:
    """Return the mean of a metric over folds, with an interval of Student's t: mean +- t s / sqrt(k).

    That of a share is cut at 0 and 1; equal values have none.
    """
    from scipy.stats import t

    mean, spread = statistics.fmean(values), statistics.stdev(values)
    if spread == 0:
        return OverFolds(mean=mean, low=None, high=None, values=list(values))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread / sqrt(len(values))
    low, high = (max(0.0, mean - half), min(1.0, mean + half)) if is_share else (mean - half, mean + half)
    return OverFolds(mean=mean, low=low, high=high, values=list(values))


def _records(folder: Path, values: CrossvalFile) -> list[Record]:
    records = [read_record(folder / fold_folder(fold)) for fold in range(values.folds)]
    for record in records:
        if record.problems or not record.is_finished or record.predictions is None:
            why = "; ".join(record.problems) or "it has no result.json or no predictions"
            raise RunError(f"{record.folder}: {why}; restore it, or choose another output_dir")
    return records


def _pooled(records: Sequence[Record]) -> Predictions:
    """Return the predictions of all folds. Raises RunError unless each image is in one of them."""
    parts = [record.predictions for record in records if record.predictions is not None]
    pooled = join_predictions(parts, SPLIT)
    if pooled.images is not None and len(torch.unique(pooled.images)) < len(pooled.images):
        raise RunError(
            f"{records[0].folder.parent}: an image is in several folds, so they were trained on different data; choose "
            "another output_dir"
        )
    return pooled


def write_crossval_page(folder: Path, values: CrossvalFile) -> Path:
    """Write report.html of a cross-validation whose figures are known, and return its path. Raises OSError."""
    records = _records(folder, values)
    write_html(folder / REPORT_FILE, _page(folder, values, records), is_of_run=True)
    return folder / REPORT_FILE


def _page(folder: Path, values: CrossvalFile, records: Sequence[Record]) -> Page:
    pooled = Predictions.load(folder / PREDICTIONS_FILE)
    whole = Record(folder, result=records[0].result, spec=records[0].spec, predictions=pooled)
    names = [record.name for record in records]
    settings = tables.recipe_table(records[0])
    return Page(
        title=f"{records[0].model_name} on {records[0].dataset}, {values.folds} folds",
        subtitle=f"cross-validation {folder.resolve().name} · {format_count(len(pooled.labels), 'image')}",
        tiles=_tiles(values),
        notes=_notes(values, records),
        sections=[
            Section("metrics", "Metrics", tables=[_metrics_table(values)]),
            Section("curves", "Curves", charts=comparison_charts(records, names), controls="axis"),
            *class_sections(whole),
            *([Section("recipe", "Recipe of the first fold", tables=[settings])] if settings else []),
        ],
    )


def _tiles(values: CrossvalFile) -> list[tuple[str, str, str]]:
    found = values.metrics or {}
    main = "accuracy" if "accuracy" in found else next(iter(found), "")
    names = [name for name in dict.fromkeys([main, "loss"]) if name in found]
    return [
        (metric_title(n), format_metric(n, found[n].mean), f"mean of {values.folds} folds; {_ends(n, found[n])}")
        for n in names
    ]


def _ends(name: str, found: OverFolds) -> str:
    if found.low is None or found.high is None:
        return "no interval: the folds are equal"
    return f"{format_confidence()}: {format_ends(name, (found.low, found.high))}"


def _metrics_table(values: CrossvalFile) -> Table:
    pooled = values.pooled
    columns = [
        Column("metric"), Column("mean of folds", True), Column("interval of the mean", True),
        Column("all images", True), Column("interval", True), *(Column(f"fold {k}", True) for k in range(values.folds)),
    ]  # fmt: skip
    rows = []
    for name, found in (values.metrics or {}).items():
        value = pooled.metrics.get(name) if pooled else None
        ends = pooled.intervals.metrics.get(name) if pooled else None
        row = [Cell(metric_title(name)), Cell(format_metric(name, found.mean), found.mean), Cell(_ends(name, found))]
        row += [Cell(NOTHING if value is None else format_metric(name, value), value)]
        row += [Cell(NOTHING if ends is None else format_ends(name, ends))]
        rows.append([*row, *(Cell(format_metric(name, each), each) for each in found.values)])
    about = describe_intervals(pooled.intervals.model_dump()) if pooled else ""
    return Table("crossval-table", f"Metrics of the folds, and of all images together. {about}", columns, rows)


def _notes(values: CrossvalFile, records: Sequence[Record]) -> list[str]:
    notes = [
        "Each image is predicted once, by the model of the fold that was not trained on it. The mean's interval is "
        f"Student's t of {values.folds} folds; any two share most of their training images, so it is a rough one."
    ]
    if any(record.has_best_weights for record in records):
        notes.append(
            "The folds' models have the weights of their best evaluation, chosen on the images that they are measured "
            "on: the figures are optimistic. checkpoint.final=last avoids that."
        )
    if values.final:
        notes.append(
            "final/ is trained on all images. None are left to measure it on: expect about these figures, or a little "
            "better ones, since it has seen more images."
        )
    return notes


def summary(values: CrossvalFile) -> list[str]:
    """Return the figures as lines for the terminal."""
    lines = []
    for name, found in (values.metrics or {}).items():
        pooled = values.pooled.metrics.get(name) if values.pooled else None
        ends = values.pooled.intervals.metrics.get(name) if values.pooled else None
        text = f"{metric_title(name)} {format_metric(name, found.mean)} ({_ends(name, found)})"
        if pooled is not None:
            text += f"; all images {format_metric(name, pooled)}"
            text += f" ({format_confidence()}: {format_ends(name, ends)})" if ends else ""
        lines.append(text)
    return lines
