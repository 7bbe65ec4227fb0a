"""Bootstrap intervals, compared with plain loops over drawn images, with scikit-learn and with scipy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn import metrics as reference

from hf_fasttrain.run_folder.intervals import NO_SPREAD, Difference, describe_intervals
from hf_fasttrain.run_folder.predictions import Collector, Predictions
from hf_fasttrain.train import bootstrap
from hf_fasttrain.train.bootstrap import Resampler, differences, intervals_of, resamples_of
from hf_fasttrain.train.metrics import Metrics

NUM_IMAGES, NUM_CLASSES = 120, 7
SINGLE = [
    "loss", "accuracy", "top5_accuracy", "f1_macro", "balanced_accuracy", "precision_macro", "recall_macro", "mcc",
    "cohen_kappa", "ece", "brier", "recall/c2", "precision/c0", "f1/c6",
]  # fmt: skip
MULTI = ["loss", "accuracy", "f1_macro", "f1_micro", "precision_macro", "recall_macro", "brier", "f1/c3"]
FEW = {"resamples": 300}  # a plain loop over 2,000 would take a minute
CLASS_NAMES = [f"c{number}" for number in range(NUM_CLASSES)]


def scores(multi_label: bool, *, shift: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels, of which no image has the last class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_CLASSES - 1, (NUM_IMAGES,), generator=torch.Generator().manual_seed(9))
    hot = torch.nn.functional.one_hot(labels, NUM_CLASSES).float()
    if multi_label:
        hot = (torch.rand(NUM_IMAGES, NUM_CLASSES, generator=torch.Generator().manual_seed(9)) > 0.6).float()
    logits = torch.randn(NUM_IMAGES, NUM_CLASSES, generator=generator) + shift * (hot - 0.5)
    return logits, hot if multi_label else labels


def predictions_of(logits: torch.Tensor, labels: torch.Tensor) -> Predictions:
    collector = Collector(len(logits))
    for start in range(0, len(logits), 32):
        collector.add(logits[start : start + 32], labels[start : start + 32])
    number = logits.shape[1] if labels.ndim == 2 else 0
    return Predictions(1, "validation", torch.arange(len(logits)), *collector.columns(), num_classes=number)


def measured(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return every metric as an evaluation of these images would."""
    counts = Metrics(logits.shape[1], torch.device("cpu"), multi_label=labels.ndim == 2, calibration=True)
    counts.update(logits, labels)
    values = counts.compute()
    names = [name for name in (*SINGLE, *MULTI) if "/" in name]
    return values | {name: counts.of_class(name, CLASS_NAMES) for name in names}


def drawn_images(resamples: int, groups: torch.Tensor | None = None) -> list[np.ndarray]:
    """Return the images of each resample, those that were drawn twice twice."""

    class Images:  # stands for metrics: its sums are how often each image was drawn
        columns = bootstrap.Columns(np.eye(NUM_IMAGES), None)

    blocks: list[Any] = [sums for (sums,) in Resampler(NUM_IMAGES, groups).sums([Images()], resamples)]  # type: ignore[list-item]
    counts = np.concatenate(blocks, axis=1).T.astype(int)
    return [np.repeat(np.arange(NUM_IMAGES), row) for row in counts]


@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_are_the_percentiles_of_evaluations_of_the_drawn_images(multi_label: bool) -> None:
    logits, labels = scores(multi_label)
    values, names = measured(logits, labels), MULTI if multi_label else SINGLE
    found = intervals_of(predictions_of(logits, labels), {name: values[name] for name in names}, CLASS_NAMES, **FEW)
    repeated = [measured(logits[rows], labels[rows]) for rows in drawn_images(300)]
    assert (found.over, found.number, found.resamples, found.confidence) == ("images", NUM_IMAGES, 300, 0.95)
    for name in names:
        if name == "f1/c6" or (name == "precision/c0" and multi_label):
            continue
        expected = np.percentile([each[name] for each in repeated], [2.5, 97.5])
        assert found.metrics[name] == pytest.approx(expected, abs=2e-6), name
    assert multi_label or found.without == {"f1/c6": NO_SPREAD}  # no image has this class


def test_intervals_of_scikit_learns_f1_agree_with_scipys_bootstrap() -> None:
    logits, labels = scores(False)
    predictions, values = predictions_of(logits, labels), measured(logits, labels)
    names = ["accuracy", "f1_macro", "mcc"]
    found = intervals_of(predictions, {name: values[name] for name in names}, resamples=3000)
    true, predicted = labels.numpy(), predictions.predicted.numpy()

    def f1(rows: np.ndarray) -> float:
        rows = rows.astype(int)
        return float(reference.f1_score(true[rows], predicted[rows], average="macro"))

    statistics = {
        "accuracy": (lambda rows, axis: (true == predicted)[rows.astype(int)].mean(axis), 3000),
        "f1_macro": (lambda rows, axis: np.apply_along_axis(f1, axis, rows), 400),
    }
    for name, (statistic, resamples) in statistics.items():
        by_scipy = scipy.stats.bootstrap(
            (np.arange(NUM_IMAGES),), statistic, n_resamples=resamples, method="percentile", rng=1
        ).confidence_interval
        tolerance = 0.2 * (by_scipy.high - by_scipy.low)
        assert found.metrics[name] == pytest.approx([by_scipy.low, by_scipy.high], abs=tolerance)


def test_whole_groups_are_drawn_and_their_intervals_are_wider() -> None:
    logits, labels = scores(False)
    groups = torch.arange(NUM_IMAGES) % 15 * 10**12
    logits[groups % (4 * 10**12) == 0] *= -1  # groups differ
    predictions, values = predictions_of(logits, labels), measured(logits, labels)
    names = ["accuracy", "f1_macro"]
    values = {name: values[name] for name in names}
    grouped = intervals_of(replace(predictions, groups=groups), values, **FEW)
    alone = intervals_of(predictions, values, **FEW)
    drawn = drawn_images(300, groups)
    assert all(set(np.unique(np.bincount(groups[rows].numpy() // 10**12, minlength=15)) % 8) == {0} for rows in drawn)
    expected = np.percentile([measured(logits[rows], labels[rows])["f1_macro"] for rows in drawn], [2.5, 97.5])
    assert grouped.metrics["f1_macro"] == pytest.approx(expected, abs=1e-9)
    assert (grouped.over, grouped.number) == ("groups", 15)
    width = {each.over: np.ptp(each.metrics["accuracy"]) for each in (grouped, alone)}
    assert width["groups"] > 1.5 * width["images"]
    assert "Of fewer than 20 groups they are too narrow" in describe_intervals(vars(grouped))


def test_many_units_are_drawn_in_parts_and_each_is_drawn_once_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "UNITS_AT_ONCE", 7)
    drawn = drawn_images(2000)
    counts = np.array([np.bincount(rows, minlength=NUM_IMAGES) for rows in drawn])
    assert (counts.sum(1) == NUM_IMAGES).all()
    assert counts.mean(0) == pytest.approx(np.ones(NUM_IMAGES), abs=0.12)
    assert counts.var(0) == pytest.approx(np.full(NUM_IMAGES, 1 - 1 / NUM_IMAGES), abs=0.2)
    together = np.cov(counts[:, 0], counts[:, 1])[0, 1], np.cov(counts[:, 0], counts[:, 60])[0, 1]
    assert together == pytest.approx((-1 / NUM_IMAGES, -1 / NUM_IMAGES), abs=0.09)


def test_metrics_without_an_interval_say_why() -> None:
    logits, labels = scores(False, shift=14.0)
    values = {"accuracy": 1.0, "loss": measured(logits, labels)["loss"], "auroc": 1.0, "own": 0.5, "f1_macro": 0.3}
    found = intervals_of(predictions_of(logits, labels), values)
    assert found.without == {
        "auroc": "needs the scores of all classes, which are not kept",
        "own": "is not computed by this package",
        "f1_macro": "is another figure than that of the kept predictions",
        "accuracy": NO_SPREAD,
    }
    assert list(found.metrics) == ["loss"]
    old = replace(predictions_of(logits, labels), top5=None)  # a file of an older version
    assert "top5_accuracy" in intervals_of(old, {"top5_accuracy": 1.0}).without


def test_one_image_or_one_group_has_no_interval() -> None:
    logits, labels = scores(False)
    one = predictions_of(logits[:1], labels[:1])
    found = intervals_of(one, {"accuracy": 1.0, "loss": 0.3})
    assert (found.metrics, found.number) == ({}, 1)
    assert found.without == dict.fromkeys(["accuracy", "loss"], "needs at least two images")
    assert describe_intervals(vars(found)) == "No intervals: 1 image is too few."
    group = replace(predictions_of(logits, labels), groups=torch.zeros(NUM_IMAGES, dtype=torch.int64))
    assert intervals_of(group, {"accuracy": 0.9}).without == {"accuracy": "needs at least two groups"}


def test_differences_are_of_the_same_draws() -> None:
    (first, labels), (second, _) = scores(False, shift=1.5), scores(False, shift=2.5)
    pair = predictions_of(first, labels), predictions_of(second, labels)
    found = {each.metric: each for each in differences(*pair, ["loss", "accuracy", "f1_macro", "auroc"], **FEW)}
    evaluated = [
        (measured(first[rows], labels[rows]), measured(second[rows], labels[rows])) for rows in drawn_images(300)
    ]
    for name in ("loss", "accuracy", "f1_macro"):
        values = [b[name] - a[name] for a, b in evaluated]
        each = found[name]
        assert (each.low, each.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=2e-6)
        assert each.second - each.first == pytest.approx(measured(second, labels)[name] - measured(first, labels)[name])
    assert set(found) == {"loss", "accuracy", "f1_macro"}
    same = differences(pair[0], pair[0], ["accuracy"])[0]
    assert (same.low, same.high, same.is_visible) == (0.0, 0.0, False)


def test_words_say_which_run_is_better_or_that_nothing_can_be_seen() -> None:
    def words(metric: str, first: float, second: float, low: float, high: float) -> str:
        return Difference(metric, first, second, low, high, "images", 400).words("A", "B")

    assert words("accuracy", 0.9, 0.912, 0.003, 0.021) == "B is better by 1.2 points (95 %: 0.3 to 2.1, 400 images)"
    assert words("accuracy", 0.912, 0.9, -0.021, -0.003) == "A is better by 1.2 points (95 %: 0.3 to 2.1, 400 images)"
    assert words("loss", 0.9, 0.8, -0.15, -0.05) == "B is better by 0.1000 (95 %: 0.0500 to 0.1500, 400 images)"
    assert words("loss", 0.8, 0.9, 0.05, 0.15) == "A is better by 0.1000 (95 %: 0.0500 to 0.1500, 400 images)"
    assert words("thing", 0.8, 0.9, 0.05, 0.15) == "B is higher by 0.1000 (95 %: 0.0500 to 0.1500, 400 images)"
    assert words("accuracy", 0.9, 0.9, -0.01, 0.01) == "no difference can be seen (95 %: -1.0 to 1.0, 400 images)"


def test_many_images_are_resampled_less_often() -> None:
    assert [resamples_of(number) for number in (10, 10_000, 200_000, 500_000)] == [2000, 2000, 1000, 500]
