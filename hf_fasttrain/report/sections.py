"""The sections of a report, of one run or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_fasttrain.report import tables
from hf_fasttrain.report.calibration import calibration_parts
from hf_fasttrain.report.charts import Chart, comparison_charts, confusion_chart, curve_charts, throughput_charts
from hf_fasttrain.report.classes import class_figures, confusion_matrix
from hf_fasttrain.report.comparison import Comparison, compare
from hf_fasttrain.report.format import describe_early_stop, format_ends, format_metric, metric_title
from hf_fasttrain.report.record import Record
from hf_fasttrain.report.tables import ImageCard, Table
from hf_fasttrain.run_folder.file_names import LABEL_ERRORS_FILE, LABEL_ERRORS_FOLDER, LABEL_ERRORS_PAGE
from hf_fasttrain.run_folder.intervals import format_confidence
from hf_fasttrain.utils.format import (
    NOTHING,
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_rate,
    is_finite,
)

MAX_LABEL_ERRORS = 24  # shown in a run's report


@dataclass(frozen=True)
class Section:
    """A section of the page; empty parts are left out."""

    id: str
    title: str
    text: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[ImageCard] = ()
    controls: str = ""  # "axis": steps or epochs


@dataclass(frozen=True)
class Page:
    """The content of the page."""

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str, str]] = ()  # name, value, remark
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=list)
    summary: Sequence[str] = ()  # sentences for the terminal


def page_of_run(record: Record) -> Page:
    """Return a run's page."""
    sections = [
        Section("metrics", "Metrics", tables=tables.interval_tables(record)),
        Section("curves", "Curves", charts=curve_charts(record), controls="axis"),
        Section("throughput", "Throughput", charts=throughput_charts(record), controls="axis"),
        *class_sections(record),
        _mistakes(record),
        _calibration(record),
        _label_errors(record),
        _training(record),
        Section("recipe", "Recipe", tables=_optional(tables.recipe_table(record))),
        Section("environment", "Environment", tables=tables.environment_tables(record)),
        Section("resumes", "Resume history", tables=_optional(tables.resume_table(record))),
        Section("bad-images", "Bad images", tables=_optional(tables.bad_images_table(record))),
    ]
    empty = {"resumes": "The run was never resumed."}
    if record.result.get("bad_images") == 0 and record.resolved:
        empty["bad-images"] = "Every image could be decoded."
    return Page(
        title=f"{record.model_name} on {record.dataset}",
        subtitle=_subtitle(record),
        tiles=_tiles(record),
        warnings=_warnings(record),
        notes=[*_selection_bias(record), *(str(note) for note in record.result.get("notes") or [])],
        sections=_with_content(sections, empty if record.is_finished else {}),
    )


def _optional(table: Table | None) -> list[Table]:
    return [] if table is None else [table]


def _with_content(sections: Sequence[Section], empty: dict[str, str]) -> list[Section]:
    """Return the sections with content; an empty one gets its text of `empty`, or is left out."""
    shown = []
    for section in sections:
        if section.charts or section.tables or section.pictures or section.text:
            shown.append(section)
        elif section.id in empty:
            shown.append(Section(section.id, section.title, empty[section.id]))
    return shown


def _subtitle(record: Record) -> str:
    parts = [f"run {record.name}"]
    if record.last_step:
        epochs = record.last_step * (record.epochs_per_step or 0)
        parts.append(
            f"{record.last_step:,} steps"
            + (f", {format_number(round(epochs, 2))} epoch{'' if epochs == 1 else 's'}" if epochs else "")
        )
    machine = record.result.get("machine") or {}
    device = machine.get("device")
    if device:
        parts.append(str(machine.get("processor") if device == "cpu" else device))
    return " · ".join(parts)


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    result, metrics, best = record.result, record.metrics, record.result.get("best") or {}
    main = "accuracy" if "accuracy" in metrics else next((name for name in metrics if name != "loss"), None)
    tiles: list[tuple[str, str, str]] = []
    if main is not None:
        remark = record.splits[0] if record.splits else ""
        last = (result.get("last") or {}).get("metrics") or {}
        if record.has_best_weights and best.get("step") != result.get("steps") and is_finite(last.get(main)):
            remark = f"best (step {format_number(best.get('step'), 9)}), {format_metric(main, last[main])} at the end"
        elif record.has_average and is_finite(last.get(main)):
            remark = f"mean of weights, {format_metric(main, last[main])} with the last"
        elif best.get("metric") == main and is_finite(best.get("value")) and best["value"] != metrics[main]:
            remark = f"best {format_metric(main, best['value'])} at step {format_number(best.get('step'), 9)}"
        tiles.append((metric_title(main), format_metric(main, metrics[main]), _with_interval(record, main, remark)))
        test = result.get("test_metrics") or {}
        if main in test:
            remark = _with_interval(record, main, "evaluated once", "test_intervals")
            tiles.append((f"{metric_title(main)}, test", format_metric(main, test[main]), remark))
    if "loss" in metrics:
        remark = _with_interval(record, "loss", record.splits[0] if record.splits else "")
        tiles.append(("loss", format_metric("loss", metrics["loss"]), remark))
    figures = [
        ("images/s", format_rate(_final_or_last(record, "images_per_second")), "training steps"),
        ("waiting", format_percent(_final_or_last(record, "data_wait_fraction")), "of training time, for data"),
        ("training time", format_duration(result.get("train_seconds")), "without evaluation"),
        ("peak memory", format_bytes(_final_or_last(record, "peak_memory_bytes")), "per process"),
    ]
    return tiles + [figure for figure in figures if figure[1] != NOTHING]


def _with_interval(record: Record, metric: str, remark: str, field: str = "intervals") -> str:
    """Return the remark on a metric with its interval, if it has one."""
    ends = record.interval(metric, field)
    if ends is None:
        return remark
    confidence = record.result[field]["confidence"]
    return "; ".join([f"{format_confidence(confidence)}: {format_ends(metric, ends)}", *([remark] if remark else [])])


def _final_or_last(record: Record, name: str) -> float | None:
    """Return a figure of the whole run, or of its last log line if it is unfinished."""
    if is_finite(record.result.get(name)):
        return float(record.result[name])
    column = record.train.get(name)
    last = float(column[-1]) if column is not None and len(column) else None
    return last if is_finite(last) else None


def _warnings(record: Record) -> list[str]:
    result = record.result
    warnings = (
        [] if record.is_finished else [f"This run has not finished; this is its state up to step {record.last_step:,}."]
    )
    early = describe_early_stop(result.get("early_stopping"))
    warnings += [f"Training stopped early: {early}."] if early and record.is_finished else []
    warnings += [f"Not on disk: {lost}" for lost in result.get("not_written") or []]
    warnings += [
        f"Out of memory at step {event.get('step')}: micro-batch {event.get('before')} -> {event.get('after')}."
        for event in result.get("out_of_memory") or []
    ]
    return warnings + record.problems


def _selection_bias(record: Record) -> list[str]:
    """Return a warning if the metrics are those of the best of several evaluations."""
    if not record.has_best_weights or not record.evaluations:
        return []
    best, split = record.result["best"], record.splits[0]
    number = len({line["step"] for line in record.evaluations if line["split"] == split})
    if number < 2:
        return []
    return [
        f"The model has the weights of step {format_number(best.get('step'), 9)}, the best of {number:,} evaluations "
        f"by {best.get('metric')}. Its metrics on {split} are therefore optimistic; those of a test split "
        "(data.test_split), which is not used for selection, are not."
    ]


def class_sections(record: Record) -> list[Section]:
    predictions, names = record.predictions, record.class_names
    if predictions is None or not len(predictions.labels):
        return [] if not record.is_finished else [
            Section("classes", "Classes", "The run folder has no predictions, so there are no metrics per class.")
        ]  # fmt: skip
    figures = class_figures(predictions, len(names))
    images, split = format_count(len(predictions.labels), "image"), predictions.split
    text = f"{images} of {split}, predicted after step {predictions.step:,}."
    if predictions.is_multi_label:
        text += " Images can have several classes, so there is no confusion matrix."
        return [Section("classes", "Classes", text, tables=[tables.class_table(figures, names, split)])]
    confusion = confusion_matrix(predictions, len(names))
    return [
        Section("classes", "Classes", text, tables=[tables.class_table(figures, names, split)]),
        Section(
            "confusion", "Confusion",
            "Rows are the true classes, columns the predicted ones; colours are shares of the row. Blue is correct, "
            "orange is wrong, on a scale that keeps rare mistakes visible.",
            charts=[confusion_chart(confusion, names)], tables=_optional(tables.confused_table(confusion, names)),
        ),
    ]  # fmt: skip


def _calibration(record: Record) -> Section:
    text, charts, shown = calibration_parts(record)
    return Section("calibration", "Calibration", text, charts=charts, tables=shown)


def _mistakes(record: Record) -> Section:
    gallery, pictures = record.gallery, tables.mistake_pictures(record)
    where = f" of {gallery.mistakes_split}" if gallery.mistakes_split else ""
    text = f"Misclassified images{where} with the highest loss, after step {gallery.mistakes_step:,}."
    return Section("mistakes", "Worst mistakes", text if pictures else "", pictures=pictures)


def _label_errors(record: Record) -> Section:
    folder, gallery = record.folder / LABEL_ERRORS_FOLDER, record.label_errors
    pictures = tables.label_error_pictures(folder, gallery)[:MAX_LABEL_ERRORS]
    text = (
        f"Images of {gallery.mistakes_split} whose label is probably wrong, the likeliest first, with the probability "
        "of each label by models that were fitted without the image. "
        f"{LABEL_ERRORS_FOLDER}/{LABEL_ERRORS_PAGE} shows more of them; {LABEL_ERRORS_FOLDER}/{LABEL_ERRORS_FILE} "
        "lists all images and, corrected, trains again."
    )
    return Section("label-errors", "Likely label errors", text if pictures else "", pictures=pictures)


def _training(record: Record) -> Section:
    pictures = tables.training_pictures(record)
    step = f"step {record.gallery.training_step:,}"
    mixed = any(record.value(key) for key in ("augment.mixup", "augment.cutmix"))
    done = "cropped, augmented and mixed" if mixed else "cropped and augmented"
    text = f"As the model sees them in {step}: {done}, with their targets." if pictures else ""
    return Section("training-images", "Training images", text, pictures=pictures)


def page_of_runs(records: Sequence[Record]) -> Page:
    """Return the page that compares several runs."""
    names = run_names([record.folder for record in records])
    differing, comparisons = tables.differences_table(records, names), compare(records, names)
    sections = [
        Section("results", "Results", tables=[tables.results_table(records, names)]),
        _differences(comparisons),
        Section("curves", "Curves", charts=comparison_charts(records, names), controls="axis"),
        Section("recipe", "Recipe differences", "" if differing.rows else "The recipes are the same.",
                tables=[differing] if differing.rows else []),
        Section("environment", "Environment", tables=_optional(tables.environment_differences(records, names))),
    ]  # fmt: skip
    warnings = _different_data(records, names)
    warnings += [
        f"{name}: {warnings}" for name, record in zip(names, records, strict=True) for warnings in _warnings(record)
    ]
    empty = {"environment": "Machines and versions are the same."}
    return Page(
        f"{len(records)} runs compared",
        ", ".join(names),
        warnings=warnings,
        sections=_with_content(sections, empty),
        summary=[line for each in comparisons for line in each.lines()],
    )


def _differences(comparisons: Sequence[Comparison]) -> Section:
    """Return the section that says whether the runs differ."""
    problems = [line for each in comparisons if each.problem for line in each.lines()]
    text = ". ".join(problems) or (
        "On the same images, which are drawn with replacement for both: the interval is that of the difference. It is "
        "about these weights, not about other seeds."
    )
    shown = [each.table(number) for number, each in enumerate(comparisons) if not each.problem]
    return Section("differences", "Do they differ?", text, tables=shown)


def _different_data(records: Sequence[Record], names: Sequence[str]) -> list[str]:
    """Return a warning if the runs that record their data were not trained and measured on the same."""
    by_data: dict[str, list[str]] = {}
    for record, name in zip(records, names, strict=True):
        if isinstance(fingerprint := record.value("data.fingerprint"), str):
            by_data.setdefault(fingerprint, []).append(name)
    if len(by_data) < 2:
        return []
    listed = "; ".join(f"{', '.join(of)}: {data.rpartition(',')[0]}" for data, of in by_data.items())
    return [
        f"The runs were trained and measured on different data, so their metrics can't be compared ({listed}; images "
        "of training + evaluation)."
    ]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that are different."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
