"""The tables of the report, and its pictures with their captions."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_fasttrain.report.classes import ClassFigures, Confusion, most_confused
from hf_fasttrain.report.format import describe_early_stop, format_ends, format_metric, format_setting, metric_title
from hf_fasttrain.report.record import Record
from hf_fasttrain.run_folder.file_names import GALLERY_FOLDER
from hf_fasttrain.run_folder.gallery import Gallery, Picture
from hf_fasttrain.run_folder.intervals import describe_intervals
from hf_fasttrain.utils.errors import shortened
from hf_fasttrain.utils.files import read_regular
from hf_fasttrain.utils.format import (
    NOTHING,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
    format_rate,
    is_finite,
)

MAX_BAD_IMAGES = 200  # shown
MAX_ROWS, FIRST_ROWS = 200, 100  # of a longer table, only the first rows are in the page as HTML
CLASS_COLUMNS = {
    "support": "integer", "precision": "share", "recall": "share", "F1": "share", "correct": "integer",
    "predicted": "integer",
}  # fmt: skip
MAX_PICTURE_BYTES = 1 << 20


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, its sort key, and a share that is drawn as a bar."""

    text: str
    value: float | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Column:
    """A column: its heading, and whether it has numbers."""

    title: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table; `sorted_by` is the column that its rows are sorted by, the largest first unless `ascending`.

    Of a table with many rows, `rows` are the first ones, `columns_of_all` the values of all rows: page/tables.js makes
    further rows of them when they are looked at.
    """

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    sorted_by: int | None = None
    ascending: bool = False
    filter: str = ""  # label of the box that filters its rows; empty: no box
    columns_of_all: Sequence[dict[str, Any]] = ()  # by column: {"kind": text, integer or share, "values": [...]}

    @property
    def num_rows(self) -> int:
        """The number of rows, also those that are not among `rows`."""
        return len(self.columns_of_all[0]["values"]) if self.columns_of_all else len(self.rows)


@dataclass(frozen=True)
class ImageCard:
    """A picture with its caption, such as truth and prediction."""

    source: str  # a data: URL
    alt: str
    lines: Sequence[tuple[str, str]]  # (what, text)
    name: str


def text_cells(*values: object) -> list[Cell]:
    """Return cells of text."""
    return [Cell(str(value)) for value in values]


def share_cell(value: float) -> Cell:
    """Return a cell for a share from 0 to 1, drawn as a bar."""
    return Cell(f"{value:.3f}", value, max(0.0, min(1.0, value)))


def integer_cell(value: Any) -> Cell:
    """Return a cell for an integer."""
    return Cell(f"{int(value):,}", float(value))


def _integer_or_text(value: Any) -> Cell:
    return integer_cell(value) if is_finite(value) else Cell(NOTHING if value is None else str(value))


def class_table(figures: ClassFigures, names: Sequence[str], split: str) -> Table:
    """Return the metrics of each class: the worst F1 first, of equal ones the most images, those without any last."""
    order = np.lexsort((-figures.support, figures.f1, figures.support == 0))
    is_long = len(order) > MAX_ROWS
    columns = [Column("class"), *(Column(title, True) for title in CLASS_COLUMNS)]
    caption = (
        f"Precision, recall and F1 per class on {split}, the worst first; support is the number of images of the class"
    )
    return Table(
        "classes-table",
        caption,
        columns,
        [_class_row(figures, names, number) for number in order[: FIRST_ROWS if is_long else None].tolist()],
        sorted_by=4,
        ascending=True,
        filter="Find a class",
        columns_of_all=_columns_of_classes(figures, names, order) if is_long else (),
    )


def _class_row(figures: ClassFigures, names: Sequence[str], number: int) -> list[Cell]:
    values = [(getattr(figures, title.lower())[number], kind) for title, kind in CLASS_COLUMNS.items()]
    cells = [share_cell(float(value)) if kind == "share" else integer_cell(value) for value, kind in values]
    return [Cell(names[number]), *cells]


def _columns_of_classes(figures: ClassFigures, names: Sequence[str], order: np.ndarray) -> list[dict[str, Any]]:
    columns: list[dict[str, Any]] = [{"kind": "text", "values": [names[number] for number in order.tolist()]}]
    for title, kind in CLASS_COLUMNS.items():
        values = getattr(figures, title.lower())[order].tolist()
        rounded = [float(f"{value:.7g}") for value in values] if kind == "share" else values
        columns.append({"kind": kind, "values": rounded})
    return columns


def confused_table(confusion: Confusion, names: Sequence[str]) -> Table | None:
    """Return the most frequently confused pairs of classes, None if there is no mistake."""
    pairs = most_confused(confusion)
    if not pairs:
        return None
    rows = [
        [Cell(names[truth]), Cell(names[predicted]), integer_cell(images), Cell(format_percent(part), part, part)]
        for truth, predicted, images, part in pairs
    ]
    columns = [Column("truth"), Column("predicted"), Column("images", True), Column("of the class", True)]
    return Table("confused-table", "The most frequently confused pairs of classes", columns, rows, sorted_by=2)


def recipe_table(record: Record) -> Table | None:
    """Return the resolved recipe, None if the run has none."""
    if not record.resolved:
        return None
    rows = [
        text_cells(key, format_setting(entry["value"]), entry["origin"], entry["tag"])
        for key, entry in record.resolved.items()
    ]
    columns = [Column("key"), Column("value"), Column("origin"), Column("tag")]
    caption = "Every setting, resolved. Tags: result affects the trained model, speed only its speed"
    return Table("recipe-table", caption, columns, rows, filter="Find a setting")


def pairs_table(id: str, caption: str, values: Iterable[tuple[str, object]]) -> Table:
    """Return a table of names and values."""
    rows = [text_cells(name, format_setting(value)) for name, value in values]
    return Table(id, caption, [Column("name"), Column("value")], rows)


def environment_tables(record: Record) -> list[Table]:
    """Return the machine, the versions and a summary of the run."""
    result, tables = record.result, []
    if result.get("machine"):
        tables.append(pairs_table("machine-table", "Machine", result["machine"].items()))
    if result.get("versions"):
        tables.append(pairs_table("versions-table", "Versions", result["versions"].items()))
    best, averaged = result.get("best") or {}, (result.get("model") or {}).get("steps")
    values = {
        "weights": f"the mean of those after steps {shortened(averaged)}" if averaged else None,
        "steps": f"{result['steps']:,}" if is_finite(result.get("steps")) else None,
        "images": f"{result['images']:,}" if is_finite(result.get("images")) else None,
        "training time": format_duration(result.get("train_seconds")),
        "peak memory": format_bytes(result.get("peak_memory_bytes")),
        "images per process and forward": result.get("micro_batch_size"),
        "steps skipped by fp16": result.get("skipped_steps") or None,
        "stopped early": describe_early_stop(result.get("early_stopping"))
        or ("yes" if result.get("stopped_early") else None),
        "best": f"{best['metric']} {format_metric(best['metric'], best['value'])} at step {best['step']:,}"
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
            *text_cells(str(line.get("date", NOTHING)).replace("T", " ")), integer_cell(line["step"]),
            *text_cells(line.get("checkpoint", NOTHING)), _integer_or_text(line.get("processes")),
        ]
        for line in record.resumes
    ]  # fmt: skip
    columns = [Column("date"), Column("after step", True), Column("checkpoint"), Column("processes", True)]
    return Table("resume-table", "When the run was resumed", columns, rows)


def interval_tables(record: Record) -> list[Table]:
    """Return the final metrics with their intervals, a table for each split; none for a run without intervals."""
    tables = []
    for field, metrics_field in (("intervals", "metrics"), ("test_intervals", "test_metrics")):
        intervals, metrics = record.result.get(field), record.result.get(metrics_field) or {}
        if not record.is_finished or not intervals:
            continue
        rows = []
        for name, value in metrics.items():
            ends = record.interval(name, field)
            why = str(intervals.get("without", {}).get(name, NOTHING))
            interval = Cell(f"none: {why}" if ends is None else format_ends(name, ends), ends[0] if ends else None)
            rows.append([Cell(metric_title(name)), Cell(format_metric(name, value), value), interval])
        columns = [Column("metric"), Column("value", True), Column("interval", True)]
        split = "Test split. " if metrics_field == "test_metrics" else ""
        tables.append(Table(f"{metrics_field}-table", split + describe_intervals(intervals), columns, rows))
    return tables


def bad_images_table(record: Record) -> Table | None:
    """Return the images that could not be decoded, None if there are none."""
    bad = record.bad_images
    if not bad:
        return None
    keys = ("split", "index", "path", "error", "substitute")
    rows = [[_integer_or_text(line.get(key)) for key in keys] for line in bad]
    caption = f"{format_count(len(bad), 'image')} that could not be decoded, and their replacements"
    if len(bad) > MAX_BAD_IMAGES:
        caption += f"; the first {MAX_BAD_IMAGES}, bad_images.jsonl has all"
    columns = [Column("split"), Column("row", True), Column("file"), Column("error"), Column("replaced by row", True)]
    return Table("bad-images-table", caption, columns, rows[:MAX_BAD_IMAGES])


def results_table(records: Sequence[Record], names: Sequence[str]) -> Table:
    """Return the final results of several runs."""
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    titles = [*map(metric_title, metrics), "images/s", "waiting", "time", "memory", "steps"]
    rows = []
    for record, name in zip(records, names, strict=True):
        result, machine = record.result, record.result.get("machine") or {}
        shown: list[tuple[str, Any]] = [
            (format_metric(m, record.metrics.get(m)), record.metrics.get(m)) for m in metrics
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
        shown = [format_setting(record.value(key)) if key in record.resolved else NOTHING for record in records]
        if len(set(shown)) > 1:
            tag = next(record.resolved[key]["tag"] for record in records if key in record.resolved)
            rows.append(text_cells(key, tag, *shown))
    columns = [Column("key"), Column("tag"), *map(Column, names)]
    return Table(
        "differences-table", "Settings that differ. Those with the tag result affect the trained model", columns, rows
    )


def environment_differences(records: Sequence[Record], names: Sequence[str]) -> Table | None:
    """Return the differences of machines and versions, None without any."""
    found = [{**(r.result.get("machine") or {}), **(r.result.get("versions") or {})} for r in records]
    rows = []
    for key in dict.fromkeys(key for values in found for key in values):
        shown = [str(values.get(key, NOTHING)) for values in found]
        if len(set(shown)) > 1:
            rows.append(text_cells(key, *shown))
    if not rows:
        return None
    return Table("environment-table", "Machines and versions that differ", [Column("what"), *map(Column, names)], rows)


def _source(run: Path, picture: Picture) -> str | None:
    """Return a picture as a data: URL, None without one. Only JPEGs next to gallery.json are read, and no links."""
    path = run / GALLERY_FOLDER / Path(picture.file).name
    try:
        data = b"" if path.is_symlink() else read_regular(path, MAX_PICTURE_BYTES)
    except (OSError, ValueError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data.startswith(b"\xff\xd8\xff") else None


def _format_target(values: dict[str, float], digits: int = 0) -> str:
    """Return the classes of a target with their shares in percent, which are left out if all are 1."""
    if all(part > 0.999 for part in values.values()):
        return ", ".join(values) or "no class"
    first = sorted(values.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {part:.{digits}%}" for name, part in first[:3])
    return shown + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def training_pictures(record: Record) -> list[ImageCard]:
    """Return training images as the model saw them."""
    shown = []
    for picture in record.gallery.training:
        source, truth = _source(record.folder, picture), _format_target(picture.truth)
        if source:
            shown.append(
                ImageCard(source, f"Training image {picture.name}: {truth}", [("target", truth)], picture.name)
            )
    return shown


def mistake_pictures(record: Record) -> list[ImageCard]:
    """Return the worst mistakes, with truth, prediction and confidence."""
    return _predicted_pictures(record.folder, record.gallery.mistakes, ("truth", "predicted"))


def label_error_pictures(folder: Path, gallery: Gallery) -> list[ImageCard]:
    """Return images whose label is probably wrong, with the given label and the suggested one."""
    return _predicted_pictures(folder, gallery.mistakes, ("label", "suggested"), digits=1)


def _predicted_pictures(
    folder: Path, pictures: Iterable[Picture], names: tuple[str, str], digits: int = 0
) -> list[ImageCard]:
    shown = []
    for picture in pictures:
        source = _source(folder, picture)
        if source is None:
            continue
        truth = _format_target(picture.truth, digits)
        predicted = ", ".join(
            name if part is None else f"{name} {format_percent(part)}" for name, part in picture.predicted.items()
        )
        predicted = predicted or "no class"
        lines = [(names[0], truth), (names[1], predicted)]
        if is_finite(picture.loss):
            lines.append(("loss", f"{picture.loss:.2f}"))
        shown.append(
            ImageCard(source, f"{picture.name}: {names[0]} {truth}, {names[1]} {predicted}", lines, picture.name)
        )
    return shown
