"""Temperature and thresholds: what is fitted, against plain references; samples of logits are those of one process."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from accelerate import Accelerator
from helpers.processes import in_child, run_processes
from scipy.optimize import brentq
from sklearn import metrics as reference
from torch import Tensor, nn

from hf_fasttrain.run_folder.calibration import Calibration
from hf_fasttrain.train import calibrator
from hf_fasttrain.train.calibrator import reliability
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.train.logits_sample import LogitsSample
from hf_fasttrain.train.temperature import fit_temperature
from hf_fasttrain.train.thresholds import beyond, tune_thresholds

NUM_CLASSES, NUM_IMAGES = 5, 400
GENERATOR = torch.Generator().manual_seed(3)
TRUTH = torch.randn(NUM_IMAGES, NUM_CLASSES, generator=GENERATOR) * 2
LABELS = torch.multinomial(TRUTH.softmax(1), 1, generator=GENERATOR)[:, 0]
HOT = (torch.rand(NUM_IMAGES, NUM_CLASSES, generator=GENERATOR) < TRUTH.sigmoid()).float()
LOGITS = TRUTH * 2.5  # of a model that is too sure of itself


def slope(temperature: float, targets: Tensor) -> float:
    """Return the derivative of the mean negative log-likelihood by 1 / T, by automatic differentiation."""
    scale = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
    scaled = LOGITS.double() * scale
    loss = (
        F.cross_entropy(scaled, targets)
        if targets.ndim == 1
        else F.binary_cross_entropy_with_logits(scaled, targets.double())
    )
    loss.backward()
    return float(scale.grad)


@pytest.mark.parametrize("targets", [LABELS, HOT], ids=["one label", "several labels"])
def test_the_temperature_is_where_the_likelihoods_derivative_is_zero(targets: Tensor) -> None:
    temperature, remark = fit_temperature(LOGITS, targets)
    assert temperature == pytest.approx(brentq(slope, 0.5, 10, args=(targets,)), rel=1e-4)
    assert temperature == pytest.approx(2.5, rel=0.2)
    assert not remark


def test_calibration_errors_are_torchmetrics() -> None:
    for logits in (LOGITS, LOGITS / 2.5):
        expected = torchmetrics.functional.calibration_error(
            logits.softmax(1), LABELS, "multiclass", num_classes=NUM_CLASSES, n_bins=15
        )
        found = reliability(logits, LABELS)
        assert found.ece == pytest.approx(float(expected), abs=1e-6)
        assert sum(found.counts) == NUM_IMAGES
        gaps = [n * abs(c - r) for n, c, r in zip(found.counts, found.confidence, found.correct, strict=True)]
        assert sum(gaps) / NUM_IMAGES == pytest.approx(found.ece)
        expected = torchmetrics.functional.calibration_error(
            logits.sigmoid().flatten(), HOT.flatten().long(), "binary", n_bins=15
        )
        assert reliability(logits, HOT).ece == pytest.approx(float(expected), abs=1e-6)
    assert reliability(LOGITS / 2.5, LABELS).ece < 0.5 * reliability(LOGITS, LABELS).ece


def test_without_mistakes_the_confidence_is_bounded_by_the_number_of_images() -> None:
    labels = torch.arange(NUM_CLASSES).repeat(8)
    logits = F.one_hot(labels, NUM_CLASSES).float()
    temperature, remark = fit_temperature(logits, labels)
    assert (logits / temperature).softmax(1).max(1).values.mean() == pytest.approx(41 / 42, rel=1e-4)
    assert "Every prediction is correct" in remark
    assert fit_temperature(20 * logits, labels)[0] == 1  # sure of itself already
    assert fit_temperature(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))[0] == 1  # a single class
    hot = F.one_hot(labels, NUM_CLASSES)
    temperature, remark = fit_temperature(2 * logits - 1, hot)
    assert ((2 * logits - 1).abs() / temperature).sigmoid().mean() == pytest.approx(201 / 202, rel=1e-4)


def test_a_temperature_is_bounded() -> None:
    wrong = F.one_hot(torch.tensor([1, 2, 0]), 3).float()
    assert fit_temperature(wrong, torch.tensor([0, 1, 2])) == (
        pytest.approx(100, rel=1e-3),
        "The temperature is at its limit; allowed are 0.01 to 100.",
    )


def best_f1(scores: np.ndarray, true: np.ndarray) -> float:
    """Return the best F1 of any threshold, by trying all."""
    return max(reference.f1_score(true, scores >= t, zero_division=0) for t in [*np.unique(scores), 2.0])


def test_thresholds_give_the_best_f1_of_each_class() -> None:
    rounded = (LOGITS / 2).round() * 2  # with equal scores
    thresholds = tune_thresholds(rounded, HOT)
    scores, predicted = rounded.double().sigmoid().numpy(), (beyond(rounded, thresholds) >= 0).numpy()
    for k, threshold in enumerate(thresholds):
        true = HOT[:, k].numpy()
        assert (predicted[:, k] == (scores[:, k] >= threshold)).all()
        assert reference.f1_score(true, predicted[:, k]) == pytest.approx(best_f1(scores[:, k], true))


def test_thresholds_of_classes_without_choice() -> None:
    logits = torch.tensor([[2.0, 2.0, -2.0], [1.0, -1.0, -2.0], [-1.0, -3.0, -3.0]])
    labels = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 1]])
    none, one, everything = tune_thresholds(logits, labels)
    assert none == 0.5  # no image has it
    assert one == pytest.approx((logits[0, 1].sigmoid() + logits[1, 1].sigmoid()) / 2)
    assert everything == pytest.approx(logits[2, 2].sigmoid() / 2)
    assert tune_thresholds(torch.full((4, 1), 60.0), torch.tensor([[1], [1], [0], [1]])) == [0.5]  # saturated
    # Two thresholds give an F1 of 2/3: the one that is nearer to 0.5 is taken.
    tied = torch.logit(torch.tensor([[0.9], [0.8], [0.6], [0.4]]))
    assert tune_thresholds(tied, torch.tensor([[1], [0], [0], [1]])) == [pytest.approx(0.2)]


def fit(
    targets: Tensor, *, tunes: bool = False, rows: bool = True, logits: Tensor = LOGITS
) -> tuple[dict[str, float], Calibration | None]:
    """Return metrics and calibration of this process's share of the images, two thirds and one third."""
    accelerator = Accelerator(cpu=True)
    cut = 2 * len(logits) // 3
    share = range(len(logits))
    if accelerator.num_processes > 1:
        share = share[:cut] if accelerator.process_index == 0 else share[cut:]
    batches = [slice(i, min(i + 32, share.stop)) for i in range(share.start, share.stop, 32)]
    evaluator = Evaluator(accelerator, NUM_CLASSES, multi_label=targets.ndim == 2, tunes_thresholds=tunes)
    evaluator.calibrator.fits = True
    loader = Batches([(logits[each], targets[each]) for each in batches])
    if rows:
        loader.rows = share
    return evaluator(nn.Identity(), loader), evaluator.calibrator.calibration


class Batches(list[tuple[Tensor, Tensor]]):
    """A list of batches that may have `rows`."""

    rows: range


def fit_all_and_samples() -> list[tuple[dict[str, float], Calibration]]:
    found = []
    for calibrator.MAX_VALUES in (2**22, 300):
        found += [fit(targets, tunes=targets.ndim == 2) for targets in (LABELS, HOT)]
    return found


def test_two_processes_fit_what_one_does() -> None:
    alone = in_child(fit_all_and_samples)
    first, second = run_processes(fit_all_and_samples)
    assert first == second
    for (metrics, found), (metrics_alone, found_alone) in zip(first, alone, strict=True):
        assert metrics == pytest.approx(metrics_alone)
        assert found == found_alone
    assert [found.images for _, found in alone] == [NUM_IMAGES, NUM_IMAGES, 60, 60]
    assert alone[1][0]["f1_macro_tuned"] > alone[1][0]["f1_macro"]


def test_the_sample_is_bounded_and_depends_on_rows_only() -> None:
    def sample(batch: int, rows: range | None) -> Tensor:
        found = LogitsSample(50, rows, 0)
        for start in range(0, NUM_IMAGES, batch):
            found.add(LOGITS[start : start + batch], LABELS[start : start + batch])
        return found.on_main(Processes(Accelerator(cpu=True)))[0]

    first = sample(7, range(NUM_IMAGES))
    assert len(first) == 50
    assert torch.equal(first, sample(400, range(NUM_IMAGES)))
    rows = [next(i for i, row in enumerate(LOGITS) if torch.equal(row, each)) for each in first]
    assert all(a < b for a, b in pairwise(rows))
    assert abs(np.mean(rows) - NUM_IMAGES / 2) < 60  # from all over the split
    assert len(sample(7, None)) == 50  # a loader whose rows are unknown
    shifted = sample(7, range(1000, 1000 + NUM_IMAGES))
    assert not torch.equal(first, shifted)


def test_logits_that_are_nan_or_inf_give_no_temperature() -> None:
    broken = LOGITS.clone()
    broken[3, 1] = math.nan
    broken[5, 2] = math.inf
    metrics, found = fit(HOT, tunes=True, logits=broken)
    assert (found.temperature, found.thresholds) == (None, None)
    assert found.remark == "No temperature was fitted: logits of 2 of 400 images are NaN or inf."
    assert "f1_macro_tuned" not in metrics


def test_single_images_and_single_classes_are_fitted() -> None:
    for number in (1, 3):
        metrics, found = fit(torch.ones(number, dtype=torch.long), logits=LOGITS[:number])
        assert 0.01 <= found.temperature <= 100
        assert found.images == number
        assert math.isfinite(metrics["loss"])


def test_given_thresholds_are_measured_where_nothing_is_fitted() -> None:
    tuned, found = fit(HOT, tunes=True)
    evaluator = Evaluator(Accelerator(cpu=True), NUM_CLASSES, multi_label=True, tunes_thresholds=True)
    assert "f1_macro_tuned" not in evaluator(nn.Identity(), [(LOGITS, HOT)])
    evaluator.calibrator.use(found)
    values = evaluator(nn.Identity(), [(LOGITS[:100], HOT[:100]), (LOGITS[100:], HOT[100:])])
    predicted = LOGITS.double().sigmoid().numpy() >= np.array(found.thresholds)
    for name in ("macro", "micro"):
        expected = reference.f1_score(HOT.numpy(), predicted, average=name)
        assert values[f"f1_{name}_tuned"] == pytest.approx(expected) == tuned[f"f1_{name}_tuned"]
