"""What a report says of a run, or of several, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_fasttrain.report import tables, words
from hf_fasttrain.report.charts import Chart, compared_charts, confusion_chart, curve_charts, pace_charts
from hf_fasttrain.report.classes import class_figures, confusion_of
from hf_fasttrain.report.record import Record
from hf_fasttrain.report.tables import Shown, Table
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


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out."""

    id: str
    title: str
    text: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Shown] = ()
    controls: str = ""  # "axis": steps or epochs


@dataclass(frozen=True)
class Page:
    """What the page says."""

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str, str]] = ()  # name, figure, remark
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=list)


def page_of_run(record: Record) -> Page:
    """Return a run's page."""
    sections = [
        Section("curves", "Curves", charts=curve_charts(record), controls="axis"),
        Section("throughput", "Throughput", charts=pace_charts(record), controls="axis"),
        *_class_sections(record),
        _mistakes(record),
        _training(record),
        Section("recipe", "Recipe", tables=_present(tables.recipe_table(record))),
        Section("environment", "Environment", tables=tables.environment_tables(record)),
        Section("resumes", "Resume history", tables=_present(tables.resume_table(record))),
        Section("bad-images", "Bad images", tables=_present(tables.bad_images_table(record))),
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
        sections=_filled(sections, empty if record.is_finished else {}),
    )


def _present(table: Table | None) -> list[Table]:
    return [] if table is None else [table]


def _filled(sections: Sequence[Section], empty: dict[str, str]) -> list[Section]:
    """Return the sections that hold something, or for which there is a word on why they don't."""
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
            remark = f"best (step {format_number(best.get('step'), 9)}), {words.metric(main, last[main])} at the end"
        elif best.get("metric") == main and is_finite(best.get("value")) and best["value"] != metrics[main]:
            remark = f"best {words.metric(main, best['value'])} at step {format_number(best.get('step'), 9)}"
        tiles.append((words.metric_title(main), words.metric(main, metrics[main]), remark))
        test = result.get("test_metrics") or {}
        if main in test:
            tiles.append((f"{words.metric_title(main)}, test", words.metric(main, test[main]), "evaluated once"))
    if "loss" in metrics:
        tiles.append(("loss", words.metric("loss", metrics["loss"]), record.splits[0] if record.splits else ""))
    figures = [
        ("images/s", format_rate(_or_last(record, "images_per_second")), "training steps"),
        ("waiting", format_percent(_or_last(record, "data_wait_fraction")), "of training time, for data"),
        ("training time", format_duration(result.get("train_seconds")), "without evaluation"),
        ("peak memory", format_bytes(_or_last(record, "peak_memory_bytes")), "per process"),
    ]
    return tiles + [figure for figure in figures if figure[1] != NOTHING]


def _or_last(record: Record, name: str) -> float | None:
    """Return a figure of the whole run, or of its last line while it has not ended."""
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
    early = words.early_stop(result.get("early_stopping"))
    warnings += [f"Training stopped early: {early}."] if early and record.is_finished else []
    warnings += [f"Not on disk: {lost}" for lost in result.get("not_written") or []]
    warnings += [
        f"Out of memory at step {event.get('step')}: micro-batch {event.get('before')} -> {event.get('after')}."
        for event in result.get("out_of_memory") or []
    ]
    return warnings + record.problems


def _selection_bias(record: Record) -> list[str]:
    """Return a warning where the figures are those of the best of several evaluations."""
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


def _class_sections(record: Record) -> list[Section]:
    found, names = record.predictions, record.class_names
    if found is None or not len(found.labels):
        return [] if not record.is_finished else [
            Section("classes", "Classes", "The run folder has no predictions, so there are no metrics per class.")
        ]  # fmt: skip
    figures = class_figures(found, len(names))
    text = f"{format_count(len(found.labels), 'image')} of {found.split}, predicted after step {found.step:,}."
    if found.is_multi_label:
        text += " Images can have several classes, so there is no confusion matrix."
        return [Section("classes", "Classes", text, tables=[tables.class_table(figures, names, found.split)])]
    confusion = confusion_of(found, len(names))
    return [
        Section("classes", "Classes", text, tables=[tables.class_table(figures, names, found.split)]),
        Section(
            "confusion", "Confusion",
            "Rows are the true classes, columns the predicted ones; colours are shares of the row. Blue is correct, "
            "orange is wrong, on a scale that keeps rare mistakes visible.",
            charts=[confusion_chart(confusion, names)], tables=_present(tables.confused_table(confusion, names)),
        ),
    ]  # fmt: skip


def _mistakes(record: Record) -> Section:
    gallery, pictures = record.gallery, tables.mistake_pictures(record)
    where = f" of {gallery.mistakes_split}" if gallery.mistakes_split else ""
    text = f"Misclassified images{where} with the highest loss, after step {gallery.mistakes_step:,}."
    return Section("mistakes", "Worst mistakes", text if pictures else "", pictures=pictures)


def _training(record: Record) -> Section:
    pictures = tables.training_pictures(record)
    step = f"step {record.gallery.training_step:,}"
    text = f"As the model sees them in {step}: cropped, augmented and mixed, with their targets." if pictures else ""
    return Section("training-images", "Training images", text, pictures=pictures)


def page_of_runs(records: Sequence[Record]) -> Page:
    """Return the page of several runs beside each other."""
    names = run_names([record.folder for record in records])
    differing = tables.differences_table(records, names)
    sections = [
        Section("results", "Results", tables=[tables.results_table(records, names)]),
        Section("curves", "Curves", charts=compared_charts(records, names), controls="axis"),
        Section("recipe", "Recipe differences", "" if differing.rows else "The recipes are the same.",
                tables=[differing] if differing.rows else []),
        Section("environment", "Environment", tables=_present(tables.environment_differences(records, names))),
    ]  # fmt: skip
    warnings = [
        f"{name}: {warnings}" for name, record in zip(names, records, strict=True) for warnings in _warnings(record)
    ]
    empty = {"environment": "Machines and versions are the same."}
    return Page(f"{len(records)} runs compared", ", ".join(names), warnings=warnings, sections=_filled(sections, empty))


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
