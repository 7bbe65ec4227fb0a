"""The report's charts as plotly figures: plain dicts, in which ``theme:NAME`` stands for a colour of the page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_fasttrain.report import words
from hf_fasttrain.report.classes import Confusion, confused_together
from hf_fasttrain.report.points import Points, points_of
from hf_fasttrain.report.record import Record
from hf_fasttrain.utils.format import format_count, format_number, format_percent

Trace = dict[str, Any]
DASHES = ("solid", "dash", "dot", "dashdot")
NUM_COLOURS = 7
MORE_IS_BETTER = ("accuracy", "top5_accuracy", "f1_macro")
MOST_ANNOTATED = 30  # classes whose counts are written into the matrix


@dataclass(frozen=True)
class Chart:
    """A figure, and what it shows in words for those who can't see it."""

    id: str
    title: str
    words: str
    figure: dict[str, Any]

    @property
    def label(self) -> str:
        """The chart's accessible name."""
        return f"Chart: {self.title}. {self.words}"


def plain(text: object) -> str:
    """Return a text for plotly, which reads some HTML in what it is given."""
    return html.escape(str(text), quote=False)


def _numbers(values: np.ndarray, digits: int = 6) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def _line(record: Record, points: Points, name: str, colour: int, form: str, **line: Any) -> list[Trace]:
    """Return the traces of a curve: its band if it has one, and its means."""
    x, scale = _numbers(points.x, 9), {"epochs_per_step": record.epochs_per_step}
    mean: Trace = {
        "type": "scatter", "mode": _mode(points), "name": plain(name), "x": x, "y": _numbers(points.mean),
        "meta": scale,
        "line": {"color": f"theme:c{colour}", "width": 2, **line}, "legendgroup": plain(name),
        "hovertemplate": f"%{{y:{form}}}",
    }  # fmt: skip
    if not points.has_band:
        return [mean]
    low, high = _numbers(points.low, 4), _numbers(points.high, 4)
    mean["customdata"] = list(zip(low, high, strict=True))
    mean["hovertemplate"] += f" (%{{customdata[0]:{form}}} to %{{customdata[1]:{form}}})"
    edge: Trace = {"type": "scatter", "mode": "lines", "x": x, "meta": scale, "line": {"width": 0}, "hoverinfo": "skip"}
    edge |= {"showlegend": False, "legendgroup": plain(name), "connectgaps": False}
    fill = {"fill": "tonexty", "fillcolor": f"theme:band{colour}"}
    return [edge | {"y": low, "name": "least"}, edge | {"y": high, "name": "most"} | fill, mean]


def _mode(points: Points) -> str:
    """Return how a curve is drawn: a few points would be no line."""
    return "lines" if np.isfinite(points.mean).sum() > 3 else "lines+markers"


def _markers(record: Record, x: np.ndarray, y: np.ndarray, name: str, colour: int, **more: Any) -> Trace:
    """Return the trace of a metric's course over evaluations."""
    few = len(x) <= 60
    points = points_of(x, y)
    return {
        "type": "scatter", "mode": "lines+markers" if few else "lines", "name": plain(name),
        "x": _numbers(points.x, 9), "y": _numbers(points.mean), "meta": {"epochs_per_step": record.epochs_per_step},
        "line": {"color": f"theme:c{colour}", "width": 2, "dash": more.pop("dash", "solid")},
        "marker": {"size": 7, "symbol": more.pop("symbol", "circle")}, "hovertemplate": "%{y:.4f}", **more,
    }  # fmt: skip


def _layout(record: Record | None, y: str = "", form: str = "", **axis: Any) -> dict[str, Any]:
    """Return the layout of a chart over steps; of a single run it marks where it was resumed."""
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
        caption = f" Each point is the mean of {points.each:,} {line}; the band spans minimum to maximum."
    if points.missing and points.missing < len(points.x) * points.each:
        caption += f" {format_count(points.missing, 'line')} with NaN or inf left out."
    return caption


def _has(record: Record, name: str) -> bool:
    return bool(len(record.train.get(name, ()))) and bool(np.isfinite(record.train[name]).any())


def _points(record: Record, name: str) -> Points:
    return points_of(record.train["step"], record.train[name])


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
        data += _line(record, points, "training", 0, ".4f", width=1.6)
        known = points.mean[np.isfinite(points.mean)]
        captions.append(f"Training loss went from {known[0]:.3f} to {known[-1]:.3f}.")
        note = resolution_note(points, record.value("log.every"))
    for place, split in enumerate(record.splits):
        x, y = record.course("loss", split)
        if len(x):
            data.append(_markers(record, x, y, split, place + 1, symbol=("circle", "diamond", "square")[place % 3]))
            captions.append(f"On {split} it was {_last_and_best(x, y, int(y.argmin()), '.3f')}.")
    if not data:
        return None
    return Chart("loss", "Loss", " ".join(captions) + note, {"data": data, "layout": _layout(record)})


def _last_and_best(x: np.ndarray, y: np.ndarray, best: int | None, form: str) -> str:
    if len(x) == 1 or best is None:
        return f"{y[-1]:{form}}" + " at the end" * (len(x) > 1)
    if y[best] == y[-1]:
        return f"{y[-1]:{form}} at the end, its best"
    return f"{y[-1]:{form}} at the end and {y[best]:{form}} best (step {x[best]:,.0f})"


def _metric_chart(record: Record) -> Chart | None:
    data, captions, lowest, highest = [], [], 0.0, 1.0
    for place, split in enumerate(record.splits):
        for number, name in enumerate(record.metric_names):
            x, y = record.course(name, split)
            if not len(x):
                continue
            title = words.metric_title(name) + (f", {split}" if place else "")
            colour, symbol = (number + 1) % NUM_COLOURS, ("circle", "diamond", "square")[place % 3]
            data.append(_markers(record, x, y, title, colour, symbol=symbol, dash=DASHES[number % len(DASHES)]))
            lowest, highest = min(lowest, y.min()), max(highest, y.max())
            form = ".2%" if "accuracy" in name else ".4f"
            best = int(y.argmax()) if name in MORE_IS_BETTER else None  # of others it is not known
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
    data = _line(record, points, title, colour, form)
    return Chart(column.replace("_", "-"), title, caption, {"data": data, "layout": layout})


def pace_charts(record: Record) -> list[Chart]:
    """Return a run's throughput: time per step as computing and waiting, images per second, memory."""
    charts = [_step_time_chart(record), _train_chart(record, "images_per_second", "Images per second", 2, ",.0f")]
    return [chart for chart in charts if chart is not None]


def _step_time_chart(record: Record) -> Chart | None:
    if not (_has(record, "seconds_per_step") and _has(record, "data_wait_fraction")):
        return None
    train = record.train
    waits = train["seconds_per_step"] * train["data_wait_fraction"]
    waiting, whole = (points_of(train["step"], 1000 * part) for part in (waits, train["seconds_per_step"]))
    rate = _numbers(_points(record, "images_per_second").mean, 4)
    steps = np.diff(train["step"], prepend=0)  # that each line is of
    share = np.nansum(waits * steps) / max(1e-12, np.nansum(train["seconds_per_step"] * steps))
    parts = (("computing", whole.mean - waiting.mean, 0), ("waiting for data", waiting.mean, 1))
    data = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": _numbers(whole.x, 9), "y": _numbers(y, 4),
            "stackgroup": "step", "line": {"color": f"theme:c{colour}", "width": 1}, "customdata": rate,
            "fillcolor": f"theme:area{colour}", "meta": {"epochs_per_step": record.epochs_per_step},
            "hovertemplate": "%{y:,.1f} ms" + ("" if colour else " (%{customdata:,.0f} images/s)"),
        }
        for name, y, colour in parts
    ]  # fmt: skip
    caption = f"{format_percent(share)} of the training time was spent waiting for data."
    if whole.has_band:
        caption += f" Each point is the mean of {whole.each:,} lines of the log."
    return Chart("pace", "Time per step (ms)", caption, {"data": data, "layout": _layout(record, rangemode="tozero")})


def compared_charts(records: Sequence[Record], names: Sequence[str]) -> list[Chart]:
    """Return the curves of several runs laid over each other; a run has the same colour and dashes everywhere."""
    figures: list[tuple[str, str, str]] = [
        ("loss", "Training loss", ".4f"), ("lr", "Learning rate", ".3~g"),
        ("images_per_second", "Images per second", ",.0f"), ("data_wait_fraction", "Waiting for data", ".1%"),
    ]  # fmt: skip
    metrics = dict.fromkeys(name for record in records for name in ("loss", *record.metric_names))
    charts = [_compared(records, names, *figures[0])]
    charts += [_compared_metric(records, names, metric) for metric in metrics]
    charts += [_compared(records, names, *figure) for figure in figures[1:]]
    return [chart for chart in charts if chart is not None]


def _style(place: int) -> tuple[int, str]:
    return place % NUM_COLOURS, DASHES[place % len(DASHES)]


def _compared(records: Sequence[Record], names: Sequence[str], column: str, title: str, form: str) -> Chart | None:
    data, captions, caption = [], [], ""
    for place, (record, name) in enumerate(zip(records, names, strict=True)):
        if not _has(record, column):
            continue
        points, (colour, dash) = _points(record, column), _style(place)
        data += _line(record, points, name, colour, form, dash=dash)
        known = points.mean[np.isfinite(points.mean)]
        last = format_percent(known[-1]) if form.endswith("%") else format_number(float(known[-1]))
        captions.append(f"{name}: {last} at the end")
        caption = resolution_note(points) or caption
    if not data:
        return None
    axis = {"tickformat": ".0%"} if form.endswith("%") else {}
    layout = _layout(None, rangemode="tozero", **axis)
    return Chart(column.replace("_", "-"), title, "; ".join(captions) + "." + caption, {"data": data, "layout": layout})


def _compared_metric(records: Sequence[Record], names: Sequence[str], metric: str) -> Chart | None:
    data, captions = [], []
    for place, (record, name) in enumerate(zip(records, names, strict=True)):
        x, y = record.course(metric, record.splits[0]) if record.splits else (np.empty(0), np.empty(0))
        if len(x):
            colour, dash = _style(place)
            data.append(_markers(record, x, y, name, colour, dash=dash))
            captions.append(f"{name}: {words.metric(metric, y[-1])} at the end")
    if not data:
        return None
    title = f"Evaluation: {words.metric_title(metric)}"
    return Chart(f"eval-{metric}", title, "; ".join(captions) + ".", {"data": data, "layout": _layout(None)})


def confusion_chart(confusion: Confusion, class_names: Sequence[str]) -> Chart:
    """Return the confusion matrix; the page draws from `meta` as much of it as can be captions apart."""
    size, total, right = len(confusion.classes), confusion.counts.sum(), np.trace(confusion.counts)
    small = np.minimum(confusion.counts, 255).astype(np.uint8)
    large = {int(place): int(confusion.counts.ravel()[place]) for place in np.flatnonzero(confusion.counts > 254)}
    caption = (
        f"{right:,} of {total:,} images are classified correctly ({format_percent(confusion.accuracy)}): the diagonal."
    )
    if confusion.left_out:
        caption = (
            f"{format_percent(confusion.accuracy)} of all images are classified correctly. Only the {size:,} most "
            f"confused classes are shown; {confusion.left_out:,} are left out."
        )
    meta = {
        "matrix": {
            "names": [class_names[place] for place in confusion.classes],
            "counts": base64.b64encode(small.tobytes()).decode(),  # 1 byte a cell; what does not fit is in `large`
            "large": large,
            "support": confusion.support.tolist(),
            "order": [int(place) for place in confused_together(confusion)] if size > MOST_ANNOTATED else None,
            "annotated": MOST_ANNOTATED,
        }
    }
    return Chart("confusion", "Confusion matrix", caption, {"data": [], "layout": {"meta": meta}})
