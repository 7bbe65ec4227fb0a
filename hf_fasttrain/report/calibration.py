"""How far a model's probabilities can be trusted: the reliability diagram, and tables of calibration and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_fasttrain.report.charts import Chart, Trace
from hf_fasttrain.report.format import format_metric, metric_title
from hf_fasttrain.report.record import Record
from hf_fasttrain.report.tables import FIRST_ROWS, MAX_ROWS, Cell, Column, Table
from hf_fasttrain.run_folder.calibration import Calibration, Reliability
from hf_fasttrain.utils.format import format_count, format_percent

FIGURES = {"ece": metric_title("ece"), "loss": "negative log-likelihood", "brier": metric_title("brier")}
MARKER_PX = (5.0, 22.0)  # of a bin without images, and with all images


def calibration_text(calibration: Calibration) -> str:
    """Return what was fitted, and to what."""
    fitted = f"to {format_count(calibration.images, 'image')} of {calibration.split}, after step {calibration.step:,}."
    if calibration.temperature is None:
        return calibration.remark
    parts = [
        f"The temperature {calibration.temperature:.3f} was fitted {fitted}",
        "Logits divided by it give the likeliest probabilities; the order of classes, and so the accuracy, does not "
        "change. predict uses it with --calibrated.",
        "Figures after it are slightly optimistic, since it was fitted to the same images.",
        calibration.remark,
    ]
    return " ".join(part for part in parts if part)


def reliability_chart(calibration: Calibration, *, is_multi_label: bool) -> Chart | None:
    """Return the reliability diagram before and after the temperature, None without one."""
    before, after = calibration.before, calibration.after
    if before is None or after is None:
        return None
    what, share = "confidence", "share of correct predictions"
    if is_multi_label:
        what, share = "probability of a class", "share of images that have the class"
    diagonal: Trace = {
        "type": "scatter", "mode": "lines", "name": "perfect", "x": [0, 1], "y": [0, 1], "hoverinfo": "skip",
        "line": {"color": "theme:muted", "dash": "dash", "width": 1.5}, "meta": {},
    }  # fmt: skip
    data = [diagonal, _bins(before, "as predicted", 1, "diamond"), _bins(after, "with temperature", 0, "circle")]
    layout = {
        "xaxis": {"title": {"text": what, "standoff": 6}, "range": [-0.02, 1.02], "tickformat": ".0%"},
        "yaxis": {"title": {"text": share}, "range": [-0.02, 1.02], "tickformat": ".0%"},
        "hovermode": "closest",
        "meta": {"own_axis": True},
    }
    caption = (
        f"Each point is a bin of predictions with similar probabilities, the larger the more. Below the line the model "
        f"is too sure of itself. The calibration error (ECE) is {format_percent(before.ece)}, with the temperature "
        f"{format_percent(after.ece)}."
    )
    return Chart("reliability", "Reliability diagram", caption, {"data": data, "layout": layout})


def _bins(reliability: Reliability, name: str, colour: int, symbol: str) -> Trace:
    """Return the trace of the bins that have predictions."""
    counts = np.array(reliability.counts, float)
    used = np.flatnonzero(counts)
    shares = counts[used] / max(1.0, counts.sum())
    smallest, largest = MARKER_PX
    points = [[round(values[i], 5) for i in used] for values in (reliability.confidence, reliability.correct)]
    return {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": points[0], "y": points[1], "meta": {},
        "cliponaxis": False, "line": {"color": f"theme:c{colour}", "width": 2},
        "customdata": counts[used].astype(int).tolist(),
        "marker": {"symbol": symbol, "size": (smallest + (largest - smallest) * np.sqrt(shares)).round(1).tolist()},
        "hovertemplate": "%{x:.1%}: %{y:.1%} of %{customdata:,}",
    }  # fmt: skip


def calibration_table(calibration: Calibration) -> Table | None:
    """Return error, likelihood and Brier score before and after the temperature, None without one."""
    before, after = calibration.before, calibration.after
    if before is None or after is None:
        return None
    rows = [
        [
            Cell(title),
            *(Cell(format_metric(name, value), value) for value in (getattr(before, name), getattr(after, name))),
        ]
        for name, title in FIGURES.items()
    ]
    columns = [Column("figure"), Column("as predicted", True), Column("with temperature", True)]
    return Table("calibration-table", "Lower is better", columns, rows)


def thresholds_table(thresholds: Sequence[float], names: Sequence[str], split: str) -> Table:
    """Return the tuned threshold of each class."""
    rows = [[Cell(name), Cell(f"{value:.4f}", value)] for name, value in zip(names, thresholds, strict=False)]
    is_long = len(rows) > MAX_ROWS
    columns_of_all: list[dict[str, Any]] = [
        {"kind": "text", "values": list(names[: len(rows)])},
        {"kind": "share", "values": [float(f"{value:.7g}") for value in thresholds[: len(rows)]]},
    ]
    return Table(
        "thresholds-table",
        f"The probability from which a class is predicted: each was tuned on {split} for the best F1 of its class, so "
        "metrics at these thresholds (tuned F1) are optimistic there",
        [Column("class"), Column("threshold", True)],
        rows[: FIRST_ROWS if is_long else None],
        filter="Find a class with its threshold",
        columns_of_all=columns_of_all if is_long else (),
    )


def calibration_parts(record: Record) -> tuple[str, list[Chart], list[Table]]:
    """Return the section's text, charts and tables; all are empty without a calibration."""
    calibration = record.calibration
    if calibration is None:
        return "", [], []
    chart = reliability_chart(calibration, is_multi_label=bool(record.spec.get("multi_label")))
    tables = [calibration_table(calibration)]
    if calibration.thresholds is not None:
        tables.append(thresholds_table(calibration.thresholds, record.class_names, calibration.split))
    return calibration_text(calibration), [chart] if chart else [], [table for table in tables if table]
