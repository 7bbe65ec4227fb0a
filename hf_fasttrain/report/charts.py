"""The charts of the report: add one to `curve_charts` or `throughput_charts`.

A chart is a plotly figure as a plain dict, in which ``theme:NAME`` stands for a colour of the page (page/charts.js).
pictures.py draws the same curves as PNG, for the model card.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_fasttrain.report.classes import Confusion, cluster_classes
from hf_fasttrain.report.format import format_metric, metric_title
from hf_fasttrain.report.points import Points, downsample
from hf_fasttrain.report.record import Record
from hf_fasttrain.run_folder.result import is_built_in, metric_direction
from hf_fasttrain.utils.format import format_count, format_number, format_percent

Trace = dict[str, Any]
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square")
NUM_COLOURS = 7
MAX_ANNOTATED = 30  # classes whose counts are written into the matrix


@dataclass(frozen=True)
class Chart:
    """A figure, and a caption that says what it shows, for screen readers too."""

    id: str
    title: str
    caption: str
    figure: dict[str, Any]

    @property
    def label(self) -> str:
        """The chart's accessible name."""
        return f"Chart: {self.title}. {self.caption}"


def escaped(text: object) -> str:
    """Escape a text for plotly, which interprets some HTML."""
    return html.escape(str(text), quote=False)


def _numbers(values: np.ndarray, digits: int = 6) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def _curve_traces(record: Record, points: Points, name: str, colour: int, form: str, **line: Any) -> list[Trace]:
    """Return the traces of a curve: its band if it has one, and its means."""
    x, scale = _numbers(points.x, 9), {"epochs_per_step": record.epochs_per_step}
    mean: Trace = {
        "type": "scatter", "mode": _mode(points), "name": escaped(name), "x": x, "y": _numbers(points.mean),
        "meta": scale,
        "line": {"color": f"theme:c{colour}", "width": 2, **line}, "legendgroup": escaped(name),
        "hovertemplate": f"%{{y:{form}}}",
    }  # fmt: skip
    if not points.has_band:
        return [mean]
    low, high = _numbers(points.low, 4), _numbers(points.high, 4)
    mean["customdata"] = list(zip(low, high, strict=True))
    mean["hovertemplate"] += f" (%{{customdata[0]:{form}}} to %{{customdata[1]:{form}}})"
    edge: Trace = {"type": "scatter", "mode": "lines", "x": x, "meta": scale, "line": {"width": 0}, "hoverinfo": "skip"}
    edge |= {"showlegend": False, "legendgroup": escaped(name), "connectgaps": False}
    fill = {"fill": "tonexty", "fillcolor": f"theme:band{colour}"}
    return [edge | {"y": low, "name": "minimum"}, edge | {"y": high, "name": "maximum"} | fill, mean]


def _mode(points: Points) -> str:
    """Return how a curve is drawn: a few points are not visible as a line."""
    return "lines" if np.isfinite(points.mean).sum() > 3 else "lines+markers"


def _evaluation_trace(record: Record, x: np.ndarray, y: np.ndarray, name: str, colour: int, **more: Any) -> Trace:
    """Return the trace of a metric over the evaluations."""
    few = len(x) <= 60
    points = downsample(x, y)
    return {
        "type": "scatter", "mode": "lines+markers" if few else "lines", "name": escaped(name),
        "x": _numbers(points.x, 9), "y": _numbers(points.mean), "meta": {"epochs_per_step": record.epochs_per_step},
        "line": {"color": f"theme:c{colour}", "width": 2, "dash": more.pop("dash", "solid")},
        "marker": {"size": 7, "symbol": more.pop("symbol", "circle")}, "hovertemplate": "%{y:.4f}", **more,
    }  # fmt: skip


def _layout(record: Record | None, y: str = "", form: str = "", **axis: Any) -> dict[str, Any]:
    """Return the layout of a chart over steps; for a single run it marks the steps after which it was resumed."""
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "step", "standoff": 6}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": y}, "tickformat": form, **axis},
        "hovermode": "x unified",
        "meta": {},
    }
    if record is None or not record.resumes:
        return layout
    steps = sorted({line["step"] for line in record.resumes})
    layout["meta"]["epochs_per_step"] = record.epochs_per_step
    dashed = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dash", "color": "theme:muted"}}
    layout["shapes"] = [dashed | {"x0": step, "x1": step, "name": "resumed"} for step in steps]
    above = {"text": " resumed", "yref": "paper", "y": 1, "yanchor": "top", "xanchor": "left", "showarrow": False}
    layout["annotations"] = [above | {"x": step} for step in steps[:4]]
    return layout


def resolution_note(points: Points, log_every: Any = None) -> str:
    """Return what a point of a curve stands for."""
    line = "steps" if log_every == 1 else "lines of the log"
    caption = ""
    if points.has_band:
        caption = f" Each point is the mean of {points.lines_per_point:,} {line}; the band spans minimum to maximum."
    if points.missing and points.missing < len(points.x) * points.lines_per_point:
        caption += f" {format_count(points.missing, 'line')} with NaN or inf left out."
    return caption


def _has(record: Record, name: str) -> bool:
    return bool(len(record.train.get(name, ()))) and bool(np.isfinite(record.train[name]).any())


def _points(record: Record, name: str) -> Points:
    return downsample(record.train["step"], record.train[name])


def curve_charts(record: Record) -> list[Chart]:
    """Return a run's curves: loss, metrics, learning rate, gradient norm."""
    charts = [_loss_chart(record), _metric_chart(record)]
    charts.append(_train_chart(record, "lr", "Learning rate", 1, ".3~g"))
    charts.append(_train_chart(record, "grad_norm", "Gradient norm", 5, ".4~g"))
    return [chart for chart in charts if chart is not None]


def _loss_chart(record: Record) -> Chart | None:
    data: list[Trace] = []
    captions: list[str] = []
    note = ""
    if _has(record, "loss"):
        points = _points(record, "loss")
        data += _curve_traces(record, points, "training", 0, ".4f", width=1.6)
        known = points.mean[np.isfinite(points.mean)]
        captions.append(f"Training loss went from {known[0]:.3f} to {known[-1]:.3f}.")
        note = resolution_note(points, record.value("log.every"))
    for index, split in enumerate(record.splits):
        x, y = record.metric_curve("loss", split)
        if len(x):
            data.append(_evaluation_trace(record, x, y, split, index + 1, symbol=SYMBOLS[index % 3]))
            captions.append(f"On {split} it was {_last_and_best(x, y, int(y.argmin()), '.3f')}.")
    if not data:
        return None
    if len(data) > len(record.splits):  # training and evaluations in one chart
        note += _unlike_note(record)
    return Chart("loss", "Loss", " ".join(captions) + note, {"data": data, "layout": _layout(record)})


def _more_is_better(metric: str) -> bool:
    return is_built_in(metric) and metric_direction(metric) == "max"


def _uses(record: Record, loss: str) -> bool:
    """Return whether a run was trained with a loss."""
    return record.value("train.loss") == loss or any(key.startswith(f"train.{loss}.") for key in record.resolved)


def _unlike_note(record: Record) -> str:
    """Return why the training loss can't be compared with that of evaluations, which is plain cross-entropy."""
    parts = {
        "label smoothing": record.value("augment.label_smoothing"),
        "mixup": record.value("augment.mixup"),
        "cutmix": record.value("augment.cutmix"),
        "class weights": record.value("train.class_weights"),
        "binary cross-entropy": not record.spec.get("multi_label") and _uses(record, "bce"),
        "focal loss": _uses(record, "focal"),
        "asymmetric loss": _uses(record, "asymmetric"),
        "distillation": record.value("distill.teacher"),
        "a step_loss": record.value("custom.step_loss"),
    }
    present = [name for name, value in parts.items() if value]
    if not present:
        return ""
    *others, last = present
    listed = f"{', '.join(others)} and {last}" if others else last
    return f" The training loss is with {listed}, that of evaluations without: their levels can't be compared."


def _last_and_best(x: np.ndarray, y: np.ndarray, best: int | None, form: str) -> str:
    if len(x) == 1 or best is None:
        return f"{y[-1]:{form}}" + " at the end" * (len(x) > 1)
    if y[best] == y[-1]:
        return f"{y[-1]:{form}} at the end, its best"
    return f"{y[-1]:{form}} at the end and {y[best]:{form}} best (step {x[best]:,.0f})"


def _metric_chart(record: Record) -> Chart | None:
    data, captions, lowest, highest = [], [], 0.0, 1.0
    for index, split in enumerate(record.splits):
        for number, name in enumerate(record.metric_names):
            x, y = record.metric_curve(name, split)
            if not len(x):
                continue
            title = metric_title(name) + (f", {split}" if index else "")
            colour, symbol = (number + 1) % NUM_COLOURS, SYMBOLS[index % 3]
            data.append(
                _evaluation_trace(record, x, y, title, colour, symbol=symbol, dash=DASHES[number % len(DASHES)])
            )
            lowest, highest = min(lowest, y.min()), max(highest, y.max())
            form = ".2%" if "accuracy" in name else ".4f"
            best = int(y.argmax()) if _more_is_better(name) else None  # for other metrics the direction is not known
            captions.append(f"{title[0].upper()}{title[1:]}: {_last_and_best(x, y, best, form)}.")
    if not data:
        return None
    axis: Trace = {"range": [0, 1.02], "tickformat": ".0%"} if (lowest, highest) == (0.0, 1.0) else {}
    layout = _layout(record, **axis)
    return Chart("metrics", f"Metrics on {record.splits[0]}", " ".join(captions), {"data": data, "layout": layout})


def _train_chart(record: Record, column: str, title: str, colour: int, form: str) -> Chart | None:
    if not _has(record, column):
        return None
    points = _points(record, column)
    low, high = np.nanmin(points.low), np.nanmax(points.high)
    caption = f"Between {format_number(low, 3)} and {format_number(high, 3)}." + resolution_note(
        points, record.value("log.every")
    )
    layout = _layout(record, rangemode="tozero", exponentformat="power") | {"showlegend": False}
    data = _curve_traces(record, points, title, colour, form)
    return Chart(column.replace("_", "-"), title, caption, {"data": data, "layout": layout})


def throughput_charts(record: Record) -> list[Chart]:
    """Return a run's throughput: time per step as computing and waiting, images per second, memory."""
    charts = [_step_time_chart(record), _train_chart(record, "images_per_second", "Images per second", 2, ",.3r")]
    return [chart for chart in charts if chart is not None]


def _step_time_chart(record: Record) -> Chart | None:
    if not (_has(record, "seconds_per_step") and _has(record, "data_wait_fraction")):
        return None
    train = record.train
    waits = train["seconds_per_step"] * train["data_wait_fraction"]
    waiting, whole = (downsample(train["step"], 1000 * part) for part in (waits, train["seconds_per_step"]))
    rate = _numbers(_points(record, "images_per_second").mean, 4)
    steps = np.diff(train["step"], prepend=0)  # that each line covers
    share = np.nansum(waits * steps) / max(1e-12, np.nansum(train["seconds_per_step"] * steps))
    parts = (("computing", whole.mean - waiting.mean, 0), ("waiting for data", waiting.mean, 1))
    data = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": _numbers(whole.x, 9), "y": _numbers(y, 4),
            "stackgroup": "step", "line": {"color": f"theme:c{colour}", "width": 1}, "customdata": rate,
            "fillcolor": f"theme:area{colour}", "meta": {"epochs_per_step": record.epochs_per_step},
            "hovertemplate": "%{y:,.1f} ms" + ("" if colour else " (%{customdata:,.3r} images/s)"),
        }
        for name, y, colour in parts
    ]  # fmt: skip
    caption = f"{format_percent(share)} of the training time was spent waiting for data."
    if whole.has_band:
        caption += f" Each point is the mean of {whole.lines_per_point:,} lines of the log."
    return Chart(
        "step-time", "Time per step (ms)", caption, {"data": data, "layout": _layout(record, rangemode="tozero")}
    )


def comparison_charts(records: Sequence[Record], names: Sequence[str]) -> list[Chart]:
    """Return the curves of several runs in common charts; a run has the same colour and dashes in each."""
    figures: list[tuple[str, str, str]] = [
        ("loss", "Training loss", ".4f"), ("lr", "Learning rate", ".3~g"),
        ("images_per_second", "Images per second", ",.3r"), ("data_wait_fraction", "Waiting for data", ".1%"),
    ]  # fmt: skip
    metrics = dict.fromkeys(name for record in records for name in ("loss", *record.metric_names))
    charts = [_compare_curves(records, names, *figures[0])]
    charts += [_compare_metric(records, names, metric) for metric in metrics]
    charts += [_compare_curves(records, names, *figure) for figure in figures[1:]]
    return [chart for chart in charts if chart is not None]


def _style(index: int) -> tuple[int, str]:
    return index % NUM_COLOURS, DASHES[index % len(DASHES)]


def _compare_curves(
    records: Sequence[Record], names: Sequence[str], column: str, title: str, form: str
) -> Chart | None:
    data, captions, caption = [], [], ""
    for index, (record, name) in enumerate(zip(records, names, strict=True)):
        if not _has(record, column):
            continue
        points, (colour, dash) = _points(record, column), _style(index)
        data += _curve_traces(record, points, name, colour, form, dash=dash)
        known = points.mean[np.isfinite(points.mean)]
        last = format_percent(known[-1]) if form.endswith("%") else format_number(float(known[-1]))
        captions.append(f"{name}: {last} at the end")
        caption = resolution_note(points) or caption
    if not data:
        return None
    ticks = ".1~%" if form.endswith("%") else ""
    layout = _layout(None, form=ticks, rangemode="tozero", exponentformat="power")
    return Chart(column.replace("_", "-"), title, "; ".join(captions) + "." + caption, {"data": data, "layout": layout})


def _compare_metric(records: Sequence[Record], names: Sequence[str], metric: str) -> Chart | None:
    data, captions, values = [], [], [np.empty(0)]
    for index, (record, name) in enumerate(zip(records, names, strict=True)):
        x, y = record.metric_curve(metric, record.splits[0]) if record.splits else (np.empty(0), np.empty(0))
        if len(x):
            colour, dash = _style(index)
            values.append(y)
            data.append(_evaluation_trace(record, x, y, name, colour, dash=dash, cliponaxis=False))
            captions.append(f"{name}: {format_metric(metric, y[-1])} at the end")
    if not data:
        return None
    title = f"Evaluation: {metric_title(metric)}"
    return Chart(
        f"eval-{metric}",
        title,
        "; ".join(captions) + ".",
        {"data": data, "layout": _layout(None, **_share_axis(metric, values))},
    )


def _share_axis(metric: str, values: Sequence[np.ndarray]) -> Trace:
    """Return the axis of a metric that is at most 1: it ends there, and begins a little below the lowest value."""
    found = np.concatenate(values)
    if not _more_is_better(metric) or not len(found) or found.min() < 0 or found.max() > 1:
        return {}
    low = max(0.0, float(found.min()) - max(0.02, 0.1 * float(found.max() - found.min())))
    form = {"tickformat": ".0%" if low < 0.9 else ".1%"} if "accuracy" in metric else {}
    return {"range": [round(low, 4), 1], **form}


def confusion_chart(confusion: Confusion, class_names: Sequence[str]) -> Chart:
    """Return the confusion matrix; matrix.js draws from `meta` as many cells as the screen can show."""
    size, total, correct = len(confusion.classes), confusion.counts.sum(), np.trace(confusion.counts)
    small = np.minimum(confusion.counts, 255).astype(np.uint8)
    large = {int(index): int(confusion.counts.ravel()[index]) for index in np.flatnonzero(confusion.counts > 254)}
    accuracy = format_percent(confusion.accuracy)
    caption = f"{correct:,} of {total:,} images are classified correctly ({accuracy}): the diagonal."
    if confusion.left_out:
        caption = (
            f"{accuracy} of all images are classified correctly. Only the {size:,} most "
            f"confused classes are shown; {confusion.left_out:,} are left out."
        )
    meta = {
        "matrix": {
            "names": [class_names[number] for number in confusion.classes],
            "counts": base64.b64encode(small.tobytes()).decode(),  # 1 byte per cell; larger counts are in `large`
            "large": large,
            "support": confusion.support.tolist(),
            "order": [int(index) for index in cluster_classes(confusion)] if size > MAX_ANNOTATED else None,
            "annotated": MAX_ANNOTATED,
        }
    }
    return Chart("confusion", "Confusion matrix", caption, {"data": [], "layout": {"meta": meta}})
