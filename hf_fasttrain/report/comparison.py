"""Whether two runs differ: the differences of their metrics on the same images, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isclose

import torch

from hf_fasttrain.report.format import format_metric, metric_title
from hf_fasttrain.report.record import Record
from hf_fasttrain.report.tables import Cell, Column, Table
from hf_fasttrain.run_folder.intervals import Difference
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.train.bootstrap import differences
from hf_fasttrain.utils.format import format_count, is_finite

Pair = tuple[Predictions, Predictions]


@dataclass(frozen=True)
class Comparison:
    """How a second run differs from a first one, or the reason (`problem`) why that can't be said."""

    first: str
    second: str
    differences: list[Difference] = field(default_factory=list)
    problem: str = ""

    def lines(self) -> list[str]:
        """Return a sentence for each metric, or the one about the problem."""
        if self.problem:
            return [f"{self.first} and {self.second} can't be compared: {self.problem}"]
        return [f"{metric_title(each.metric)}: {each.words(self.first, self.second)}" for each in self.differences]

    def table(self, number: int) -> Table:
        """Return the differences as a table, of which this is the number."""
        rows = [
            [
                Cell(metric_title(each.metric)),
                Cell(format_metric(each.metric, each.first), each.first),
                Cell(format_metric(each.metric, each.second), each.second),
                Cell(each.words(self.first, self.second)),
            ]
            for each in self.differences
        ]
        columns = [Column("metric"), Column(self.first, True), Column(self.second, True), Column("difference")]
        return Table(f"difference-{number}", f"{self.second} beside {self.first}", columns, rows)


def compare(records: Sequence[Record], names: Sequence[str]) -> list[Comparison]:
    """Return how each run but the first differs from the first one."""
    found = []
    for record, name in zip(records[1:], names[1:], strict=True):
        pair, problem = _same_images(records[0], record)
        shown = _differences(records[0], record, pair) if pair else []
        if not shown and not problem:
            problem = "one image or group is too few, or there is no metric in common that predictions give"
        found.append(Comparison(names[0], name, shown, problem))
    return found


def _differences(first: Record, second: Record, pair: Pair) -> list[Difference]:
    """Return the differences of the metrics of both runs, those whose values follow from the predictions."""
    names = [name for name, value in first.metrics.items() if is_finite(value) and is_finite(second.metrics.get(name))]
    found = differences(*pair, names, [str(name) for name in first.spec.get("class_names") or []])
    return [
        each
        for each in found
        if isclose(each.first, first.metrics[each.metric], rel_tol=1e-3, abs_tol=1e-5)
        and isclose(each.second, second.metrics[each.metric], rel_tol=1e-3, abs_tol=1e-5)
    ]


def _same_images(first: Record, second: Record) -> tuple[Pair | None, str]:
    """Return both runs' predictions for the same images in the same order, or None and why there are none."""
    one, other = first.predictions, second.predictions
    if one is None or other is None or not (first.is_finished and second.is_finished):
        return None, "one of them is unfinished, or has no predictions (log.report=false)"
    if one.is_multi_label != other.is_multi_label or one.num_classes != other.num_classes:
        return None, "their classes are different"
    if first.spec.get("class_names") != second.spec.get("class_names"):
        return None, "their classes are different"
    if one.images is not None and other.images is not None:
        keys = one.images, other.images
    elif _is_same_data(first, second, one, other):
        keys = one.rows, other.rows
    else:
        return None, "which images they were evaluated on is not recorded (older runs, or loaders of your own)"
    if not torch.equal(keys[0].sort().values, keys[1].sort().values):
        common = int(torch.isin(*keys).sum())
        sizes = f"{len(one.labels):,} and {len(other.labels):,}, {common:,} of them the same"
        return None, f"they were evaluated on different images ({sizes}); give both the same evaluation split"
    one, other = one.at(keys[0].argsort(stable=True)), other.at(keys[1].argsort(stable=True))
    others = one.labels != other.labels
    if wrong := int((others.any(1) if one.is_multi_label else others).sum()):
        return None, f"{format_count(wrong, 'image')} of {len(one.labels):,} have another label in the other run"
    return (one, other), ""


def _is_same_data(first: Record, second: Record, one: Predictions, other: Predictions) -> bool:
    """Return whether runs that did not record their images have the same ones, by data set and row."""
    prints = [record.value("data.fingerprint") for record in (first, second)]
    is_known = isinstance(prints[0], str) and prints[0] == prints[1] and one.split == other.split
    return is_known and bool((one.rows >= 0).all()) and torch.equal(one.rows.sort().values, other.rows.sort().values)
