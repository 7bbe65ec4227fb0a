"""The report's tables and pictures, as the page shows them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fasttrain.report import words
from hf_fasttrain.report.classes import ClassFigures, Confusion, most_confused
from hf_fasttrain.report.record import Record
from hf_fasttrain.run_folder.file_names import GALLERY_FOLDER
from hf_fasttrain.run_folder.gallery import Picture
from hf_fasttrain.utils.format import (
    NOTHING,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
    format_rate,
    is_finite,
)

MOST_BAD_IMAGES = 200  # shown


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, what it is sorted by, and a share that is drawn as a bar."""

    text: str
    value: float | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds numbers."""

    title: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table; `sorted_by` is the column that its rows are sorted by, the largest first."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    sorted_by: int | None = None
    filter: str = ""  # what the box above it is called that filters its rows; none if empty


@dataclass(frozen=True)
class Shown:
    """A picture with what is predicted below it."""

    source: str  # a data: URL
    alt: str
    lines: Sequence[tuple[str, str]]  # (what, text)
    name: str


def texts(*values: object) -> list[Cell]:
    """Return cells of text."""
    return [Cell(str(value)) for value in values]


def share(value: float) -> Cell:
    """Return a cell with a share from 0 to 1."""
    return Cell(f"{value:.3f}", value, max(0.0, min(1.0, value)))


def whole(value: Any) -> Cell:
    """Return a cell with a whole number."""
    return Cell(f"{int(value):,}", float(value))


def _whole_or_text(value: Any) -> Cell:
    return whole(value) if is_finite(value) else Cell(NOTHING if value is None else str(value))


def class_table(figures: ClassFigures, names: Sequence[str], split: str) -> Table:
    """Return each class's figures, the class with the most images first."""
    order = sorted(range(len(names)), key=lambda place: -figures.support[place])
    rows = [
        [
            Cell(names[place]), whole(figures.support[place]), share(float(figures.precision[place])),
            share(float(figures.recall[place])), share(float(figures.f1[place])), whole(figures.right[place]),
            whole(figures.predicted[place]),
        ]
        for place in order
    ]  # fmt: skip
    titles = ("support", "precision", "recall", "F1", "right", "predicted")
    caption = f"Precision, recall and F1 per class on {split}; support is the number of images of the class"
    columns = [Column("class"), *(Column(title, True) for title in titles)]
    return Table("classes-table", caption, columns, rows, sorted_by=1, filter="Find a class")


def confused_table(confusion: Confusion, names: Sequence[str]) -> Table | None:
    """Return the pairs of classes that are mistaken most often, None if there is no mistake."""
    pairs = most_confused(confusion)
    if not pairs:
        return None
    rows = [
        [Cell(names[truth]), Cell(names[predicted]), whole(images), Cell(format_percent(part), part, part)]
        for truth, predicted, images, part in pairs
    ]
    columns = [Column("truth"), Column("predicted"), Column("images", True), Column("of the class", True)]
    return Table("confused-table", "The most frequently confused pairs of classes", columns, rows, sorted_by=2)


def recipe_table(record: Record) -> Table | None:
    """Return the resolved recipe, None if the run has none."""
    if not record.resolved:
        return None
    rows = [
        texts(key, words.setting(fact["value"]), fact["origin"], fact["tag"]) for key, fact in record.resolved.items()
    ]
    columns = [Column("key"), Column("value"), Column("where it came from"), Column("tag")]
    caption = "Every setting, resolved. Learnt: affects the trained model; machine: only the speed"
    return Table("recipe-table", caption, columns, rows, filter="Find a setting")


def pairs_table(id: str, caption: str, values: Iterable[tuple[str, object]]) -> Table:
    """Return a table of names and values."""
    rows = [texts(name, words.setting(value)) for name, value in values]
    return Table(id, caption, [Column("name"), Column("value")], rows)


def environment_tables(record: Record) -> list[Table]:
    """Return what the run ran on, and how it went there."""
    result, tables = record.result, []
    if result.get("machine"):
        tables.append(pairs_table("machine-table", "Machine", result["machine"].items()))
    if result.get("versions"):
        tables.append(pairs_table("versions-table", "Versions", result["versions"].items()))
    best = result.get("best") or {}
    values = {
        "steps": f"{result['steps']:,}" if is_finite(result.get("steps")) else None,
        "images": f"{result['images']:,}" if is_finite(result.get("images")) else None,
        "training time": format_duration(result.get("train_seconds")),
        "peak memory": format_bytes(result.get("peak_memory_bytes")),
        "images per process and forward": result.get("micro_batch_size"),
        "steps skipped by fp16": result.get("skipped_steps") or None,
        "stopped early": words.early_stop(result.get("early_stopping"))
        or ("yes" if result.get("stopped_early") else None),
        "best": f"{best['metric']} {words.metric(best['metric'], best['value'])} at step {best['step']:,}"
        if {"metric", "value", "step"} <= best.keys() and is_finite(best["step"])
        else None,
    }
    known = [(name, value) for name, value in values.items() if value not in (None, NOTHING)]
    return [*tables, pairs_table("end-table", "Summary", known)] if known else tables


def resume_table(record: Record) -> Table | None:
    """Return when the run was resumed, None if it never was."""
    if not record.resumes:
        return None
    rows = [
        [
            *texts(str(line.get("date", NOTHING)).replace("T", " ")), whole(line["step"]),
            *texts(line.get("checkpoint", NOTHING)), _whole_or_text(line.get("processes")),
        ]
        for line in record.resumes
    ]  # fmt: skip
    columns = [Column("date"), Column("after step", True), Column("checkpoint"), Column("processes", True)]
    return Table("resume-table", "When the run was resumed", columns, rows)


def bad_images_table(record: Record) -> Table | None:
    """Return the images that could not be decoded, None if there are none."""
    bad = record.bad_images
    if not bad:
        return None
    keys = ("split", "index", "path", "error", "substitute")
    rows = [[_whole_or_text(line.get(key)) for key in keys] for line in bad]
    caption = f"{format_count(len(bad), 'image')} that could not be decoded, and their replacements"
    if len(bad) > MOST_BAD_IMAGES:
        caption += f"; the first {MOST_BAD_IMAGES}, bad_images.jsonl has all"
    columns = [Column("split"), Column("row", True), Column("file"), Column("error"), Column("replaced by row", True)]
    return Table("bad-images-table", caption, columns, rows[:MOST_BAD_IMAGES])


def results_table(records: Sequence[Record], names: Sequence[str]) -> Table:
    """Return how several runs ended."""
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    titles = [*map(words.metric_title, metrics), "images/s", "waiting", "time", "memory", "steps"]
    rows = []
    for record, name in zip(records, names, strict=True):
        result, machine = record.result, record.result.get("machine") or {}
        shown: list[tuple[str, Any]] = [
            (words.metric(m, record.metrics.get(m)), record.metrics.get(m)) for m in metrics
        ]
        figures = ("images_per_second", "data_wait_fraction", "train_seconds", "peak_memory_bytes")
        forms: tuple[Callable[[Any], str], ...] = (format_rate, format_percent, format_duration, format_bytes)
        shown += [(form(result.get(key)), result.get(key)) for form, key in zip(forms, figures, strict=True)]
        shown.append((f"{record.last_step:,}" + ("" if record.is_finished else " (unfinished)"), record.last_step))
        cells = [Cell(NOTHING if v is None else t, float(v) if is_finite(v) else None) for t, v in shown]
        where = ", ".join(str(machine[key]) for key in ("device", "processor") if machine.get(key)) or NOTHING
        rows.append([Cell(name), *cells, Cell(where)])
    splits = [record.splits[0] if record.splits else NOTHING for record in records]
    for row, split in zip(rows, splits, strict=True):
        row.insert(1, Cell(split))
    columns = [Column("run"), Column("evaluated on"), *(Column(title, True) for title in titles), Column("machine")]
    return Table("results-table", "Final results: last evaluation and throughput", columns, rows)


def differences_table(records: Sequence[Record], names: Sequence[str]) -> Table:
    """Return the settings in which the runs' recipes differ."""
    keys = dict.fromkeys(key for record in records for key in record.resolved if key != "output_dir")
    rows = []
    for key in keys:
        shown = [words.setting(record.value(key)) if key in record.resolved else NOTHING for record in records]
        if len(set(shown)) > 1:
            tag = next(record.resolved[key]["tag"] for record in records if key in record.resolved)
            rows.append(texts(key, tag, *shown))
    columns = [Column("key"), Column("tag"), *map(Column, names)]
    return Table("differences-table", "Settings that differ. Learnt ones affect the trained model", columns, rows)


def environment_differences(records: Sequence[Record], names: Sequence[str]) -> Table | None:
    """Return in what machines and versions differ, None if they don't."""
    found = [{**(r.result.get("machine") or {}), **(r.result.get("versions") or {})} for r in records]
    rows = []
    for key in dict.fromkeys(key for values in found for key in values):
        shown = [str(values.get(key, NOTHING)) for values in found]
        if len(set(shown)) > 1:
            rows.append(texts(key, *shown))
    if not rows:
        return None
    return Table("environment-table", "Machines and versions that differ", [Column("what"), *map(Column, names)], rows)


def _source(run: Path, picture: Picture) -> str | None:
    """Return a picture as a data: URL, None if it is gone. Only what lies beside gallery.json is read."""
    path = run / GALLERY_FOLDER / Path(picture.file).name
    try:
        return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return None


def _shares(values: dict[str, float]) -> str:
    """Return classes with their shares; without, where each is wholly there."""
    if all(part > 0.999 for part in values.values()):
        return ", ".join(values) or "no class"
    first = sorted(values.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {part:.0%}" for name, part in first[:3])
    return shown + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def training_pictures(record: Record) -> list[Shown]:
    """Return training images as the model saw them."""
    shown = []
    for picture in record.gallery.training:
        source, truth = _source(record.folder, picture), _shares(picture.truth)
        if source:
            shown.append(Shown(source, f"Training image {picture.name}: {truth}", [("target", truth)], picture.name))
    return shown


def mistake_pictures(record: Record) -> list[Shown]:
    """Return the worst mistakes, with truth, prediction and confidence."""
    shown = []
    for picture in record.gallery.mistakes:
        source = _source(record.folder, picture)
        if source is None:
            continue
        truth = _shares(picture.truth)
        predicted = ", ".join(
            name if part is None else f"{name} {format_percent(part)}" for name, part in picture.predicted.items()
        )
        predicted = predicted or "no class"
        lines = [("truth", truth), ("predicted", predicted)]
        if is_finite(picture.loss):
            lines.append(("loss", f"{picture.loss:.2f}"))
        shown.append(Shown(source, f"{picture.name}: is {truth}, predicted {predicted}", lines, picture.name))
    return shown
