"""A run's curves and its confusion matrix as PNG, for its model card; the report's own charts: charts.py."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_fasttrain.report.charts import MAX_ANNOTATED
from hf_fasttrain.report.classes import Confusion, cluster_classes, confusion_matrix
from hf_fasttrain.report.format import metric_title
from hf_fasttrain.report.points import downsample
from hf_fasttrain.report.record import Record
from hf_fasttrain.run_folder.file_names import CONFUSION_PICTURE, CURVES_PICTURE
from hf_fasttrain.utils.files import write_atomically
from hf_fasttrain.utils.format import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MAX_PICTURE_CELLS = 250  # rows of the picture; more classes are drawn as blocks


def draw_curves(record: Record, path: Path) -> None:
    """Write loss, metrics, learning rate and time per step as a PNG; no file without data. Raises OSError."""
    from matplotlib.figure import Figure

    if not record.evaluations and not len(record.train.get("step", ())):
        return
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for draw, axes in zip((_loss, _metrics, _learning_rate, _step_time), panels, strict=True):
        draw(record, axes)
        axes.set_xlabel("step")
        axes.set_xlim(0, 1.03 * max(1, record.last_step))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color="#767676")
    figure.suptitle(_literal(f"{record.model_name} on {record.dataset}"), fontsize=11)
    _save(figure, path)


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would typeset text between two of them as mathematics


def _curve(record: Record, axes: Axes, column: str, label: str, colour: str) -> None:
    if not len(record.train.get(column, ())) or not np.isfinite(record.train[column]).any():
        return
    points = downsample(record.train["step"], record.train[column])
    if points.has_band:
        axes.fill_between(points.x, points.low, points.high, color=colour, alpha=0.2, linewidth=0)
    few = np.isfinite(points.mean).sum() <= 3  # not visible as a line
    axes.plot(points.x, points.mean, color=colour, linewidth=1.4, label=label, marker="." if few else "")


def _metric_curves(record: Record, axes: Axes, metrics: list[str], first_colour: int) -> None:
    for index, split in enumerate(record.splits):
        for number, name in enumerate(metrics):
            x, y = record.metric_curve(name, split)
            title = split if name == "loss" else metric_title(name) + (f", {split}" if index else "")
            style: dict[str, Any] = {"marker": "oDs"[index % 3] if len(x) <= 60 else "", "markersize": 4}
            style["linestyle"] = ("-", "--", ":")[index % 3]
            colour = COLOURS[(first_colour + number + (index if len(metrics) == 1 else 0)) % len(COLOURS)]
            if len(x):
                axes.plot(x, y, color=colour, linewidth=1.4, label=_literal(title), **style)


def _loss(record: Record, axes: Axes) -> None:
    axes.set_title("Loss", fontsize=10)
    _curve(record, axes, "loss", "training", COLOURS[0])
    _metric_curves(record, axes, ["loss"], 1)


def _metrics(record: Record, axes: Axes) -> None:
    axes.set_title("Metrics", fontsize=10)
    _metric_curves(record, axes, record.metric_names, 1)


def _learning_rate(record: Record, axes: Axes) -> None:
    axes.set_title("Learning rate", fontsize=10)
    _curve(record, axes, "lr", "learning rate", COLOURS[1])


def _step_time(record: Record, axes: Axes) -> None:
    axes.set_title("Time per step (ms)", fontsize=10)
    train = record.train
    if not len(train.get("step", ())) or not np.isfinite(train["seconds_per_step"]).any():
        return
    whole = downsample(train["step"], 1000 * train["seconds_per_step"])
    waiting = np.nan_to_num(
        downsample(train["step"], 1000 * train["seconds_per_step"] * train["data_wait_fraction"]).mean
    )
    parts = (np.nan_to_num(whole.mean) - waiting, waiting)
    axes.stackplot(whole.x, *parts, labels=("computing", "waiting for data"), colors=COLOURS[:2], alpha=0.75)


def draw_confusion(record: Record, path: Path) -> None:
    """Write the confusion matrix of a single-label run as a PNG; no file without one. Raises OSError."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    predictions = record.predictions
    if predictions is None or predictions.is_multi_label or not len(predictions.labels):
        return
    confusion = confusion_matrix(predictions, len(record.class_names))
    size = len(confusion.classes)
    order = np.arange(size) if size <= MAX_ANNOTATED else cluster_classes(confusion)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list(
        "right and wrong", ["#7a3500", COLOURS[1], "#ffffff", COLOURS[0], "#00314f"]
    )
    signed, block = _signed(confusion, order)
    end = len(signed) * block - 0.5
    picture = axes.imshow(signed, cmap=colours, vmin=-1, vmax=1, extent=(-0.5, end, end, -0.5), interpolation="nearest")
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, location="bottom", aspect=40, pad=0.02)
    marks = np.array([0.01, 0.1, 0.3, 1.0])
    labels = [f"{mark:.0%}" for mark in marks]
    bar.set_ticks([*-log_like(marks[::-1]), 0, *log_like(marks)], labels=[*labels[::-1], "0", *labels])
    bar.set_label("wrong   ←   share of the class's images   →   right", fontsize=9)
    if size <= MAX_ANNOTATED:
        _annotate(axes, confusion, [record.class_names[number] for number in confusion.classes])
    else:
        axes.set(xticks=[], yticks=[])
    axes.set_xlabel("predicted" if size <= MAX_ANNOTATED else "predicted; grouped by confusion")
    axes.set_ylabel("truth")
    title = f"{record.model_name} on {predictions.split}, {format_count(size, 'class', 'classes')}"
    axes.set_title(_literal(title), fontsize=10)
    _save(figure, path)


def log_like(shares: np.ndarray) -> np.ndarray:
    """Map shares from 0 to 1 to a scale that makes small ones visible: 1% at 0.15, 10% at 0.5."""
    return np.log1p(99 * shares) / np.log(100)


def _signed(confusion: Confusion, order: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the matrix on the log-like scale, mistakes negative, and the classes per cell (it shows the largest)."""
    shares = log_like(confusion.shares[np.ix_(order, order)])
    signed = np.where(np.eye(len(shares), dtype=bool), shares, -shares)
    block = -(-len(signed) // MAX_PICTURE_CELLS)
    pad = -len(signed) % block
    signed = np.pad(signed, (0, pad))
    number = len(signed) // block
    blocks = signed.reshape(number, block, number, block).swapaxes(1, 2).reshape(number, number, -1)
    strongest = np.abs(blocks).argmax(2)
    return np.take_along_axis(blocks, strongest[..., None], 2)[..., 0], block


def _annotate(axes: Axes, confusion: Confusion, names: list[str]) -> None:
    short = [_literal(name if len(name) <= 18 else name[:17] + "…") for name in names]
    turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if max(map(len, short)) > 3 else {}
    axes.set_xticks(range(len(names)), short, fontsize=8, **turned)
    axes.set_yticks(range(len(names)), short, fontsize=8)
    shares = confusion.shares
    for row, column in zip(*np.nonzero(confusion.counts), strict=True):
        colour = "#ffffff" if shares[row, column] > 0.1 else "#222222"
        text = f"{confusion.counts[row, column]:,}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9 if len(names) <= 12 else 6)


def _save(figure: Figure, path: Path) -> None:
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # class names in scripts that the font lacks
        figure.savefig(drawn, format="png", dpi=130)
    write_atomically(path, drawn.getvalue())


DRAWINGS = {CURVES_PICTURE: draw_curves, CONFUSION_PICTURE: draw_confusion}  # file -> function that draws it
