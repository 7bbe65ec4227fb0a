"""Metrics beside the main ones, compared with scikit-learn's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from accelerate import Accelerator
from helpers.processes import in_child, run_processes
from helpers.runs import exit_status
from sklearn import metrics as reference
from torch import Tensor, nn

from hf_fasttrain.inference import evaluate_run
from hf_fasttrain.run_folder.result import metric_direction, metric_name
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.train.metrics import MULTI_LABEL, SINGLE_LABEL, Metrics, resolve_metrics
from hf_fasttrain.train.score_metrics import require_memory
from hf_fasttrain.utils.errors import RecipeError, RunError

CPU, NUM_CLASSES = torch.device("cpu"), 4
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(60, NUM_CLASSES, generator=GENERATOR) * 2
LABELS = torch.randint(0, 3, (60,), generator=GENERATOR)  # no image of class 3
HOT = (torch.rand(60, NUM_CLASSES, generator=GENERATOR) > 0.6).float()


def expected_single() -> dict[str, float]:
    true, p = LABELS.numpy(), LOGITS.double().softmax(1).numpy()
    predicted, hot = p.argmax(1), np.eye(NUM_CLASSES)[true]
    confident, right = p.max(1), predicted == true
    bins = np.clip(np.ceil(confident * 15).astype(int) - 1, 0, 14)
    gaps = [abs(right[bins == b].mean() - confident[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    with_images = [hot[:, k] for k in range(3)]
    return {
        "balanced_accuracy": np.mean([right[true == k].mean() for k in range(3)]),
        "precision_macro": reference.precision_score(true, predicted, average="macro", zero_division=0),
        "recall_macro": reference.recall_score(true, predicted, average="macro", zero_division=0),
        "mcc": reference.matthews_corrcoef(true, predicted),
        "cohen_kappa": reference.cohen_kappa_score(true, predicted),
        "ece": sum(gaps),
        "brier": ((p - hot) ** 2).sum(1).mean(),
        "auroc": np.mean([reference.roc_auc_score(y, p[:, k]) for k, y in enumerate(with_images)]),
        "map": np.mean([reference.average_precision_score(y, p[:, k]) for k, y in enumerate(with_images)]),
        "recall/1": reference.recall_score(true, predicted, labels=[1], average="macro"),
        "precision/2": reference.precision_score(true, predicted, labels=[2], average="macro"),
        "f1/0": reference.f1_score(true, predicted, labels=[0], average="macro"),
    }


def expected_multi() -> dict[str, float]:
    true, p = HOT.numpy(), LOGITS.double().sigmoid().numpy()
    predicted, scores = p >= 0.5, LOGITS.numpy()
    flat, positive = p.ravel(), true.ravel()
    bins = np.clip(np.ceil(flat * 15).astype(int) - 1, 0, 14)
    gaps = [abs(positive[bins == b].mean() - flat[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return {
        "f1_micro": reference.f1_score(true, predicted, average="micro"),
        "precision_macro": reference.precision_score(true, predicted, average="macro"),
        "recall_macro": reference.recall_score(true, predicted, average="macro"),
        "ece": sum(gaps),
        "brier": np.mean([reference.brier_score_loss(true[:, k], p[:, k]) for k in range(NUM_CLASSES)]),
        "auroc": reference.roc_auc_score(true, scores, average="macro"),
        "map": reference.average_precision_score(true, scores, average="macro"),
        "f1/3": reference.f1_score(true[:, 3], predicted[:, 3]),
    }


EXPECTED = {"one label": (LABELS, expected_single()), "several labels": (HOT, expected_multi())}


def measure(targets: Tensor, names: list[str]) -> dict[str, float]:
    accelerator = Accelerator(cpu=True)
    rank, number = accelerator.process_index, accelerator.num_processes
    rows = range(60)[60 * rank * 2 // (3 * number) : 60 * (rank + 1) * 2 // (3 * number)] if number > 1 else range(60)
    if number > 1 and rank == number - 1:
        rows = range(rows.start, 60)
    batches = [(LOGITS[rows.start + i : min(rows.stop, rows.start + i + 7)], i) for i in range(0, len(rows), 7)]
    loader = [(logits, targets[rows.start + i : rows.start + i + len(logits)]) for logits, i in batches]
    evaluator = Evaluator(accelerator, NUM_CLASSES, multi_label=targets.ndim == 2, metrics=["loss", *names])
    return evaluator(nn.Identity(), loader)


@pytest.mark.parametrize("kind", EXPECTED)
def test_they_are_scikit_learns(kind: str) -> None:
    targets, expected = EXPECTED[kind]
    assert measure(targets, list(expected)) == pytest.approx({**measure(targets, []), **expected}, rel=1e-4)


def test_two_processes_give_the_values_of_one() -> None:
    for targets, expected in EXPECTED.values():
        alone = in_child(lambda targets=targets, names=list(expected): measure(targets, names))
        first, second = run_processes(measure, targets, list(expected))
        assert first == second == pytest.approx(alone)


def with_torchmetrics(targets: Tensor) -> list[dict[str, float]]:
    kind = "multilabel" if targets.ndim == 2 else "multiclass"
    own = {
        "area": torchmetrics.AUROC(kind, num_classes=NUM_CLASSES, num_labels=NUM_CLASSES),
        "kappa": torchmetrics.CohenKappa("multiclass", num_classes=NUM_CLASSES),
    }
    own = own if targets.ndim == 1 else {"area": own["area"]}
    accelerator = Accelerator(cpu=True)
    evaluator = Evaluator(accelerator, NUM_CLASSES, multi_label=targets.ndim == 2, metrics=["loss"], own=own)
    half = slice(None) if accelerator.num_processes == 1 else slice(accelerator.process_index, None, 2)
    return [evaluator(nn.Identity(), [(LOGITS[half], targets[half])]) for _ in range(2)]


def test_metrics_of_torchmetrics_see_each_evaluation_alone() -> None:
    for targets, expected in EXPECTED.values():
        first, second = with_torchmetrics(targets)
        assert first == second
        if targets.ndim == 2:
            assert first["area"] == pytest.approx(expected["auroc"], rel=1e-4)
        else:
            assert first["kappa"] == pytest.approx(expected["cohen_kappa"], rel=1e-4)
        (two, again), _ = run_processes(with_torchmetrics, targets)
        assert two == again == pytest.approx(first, rel=1e-5)


def test_all_names_are_measured_and_have_a_direction() -> None:
    for targets, names in ((LABELS, SINGLE_LABEL), (HOT, MULTI_LABEL)):
        assert set(measure(targets, list(names))) == set(names)
        assert all(metric_direction(name) for name in names)
    assert metric_direction("recall/error") == "max"
    assert metric_name("recall/a/b") == "recall/a/b"


def test_degenerate_counts_are_zero_as_scikit_learns() -> None:
    counts = Metrics(2, CPU)
    counts.update(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 0]))
    assert counts.compute()["mcc"] == reference.matthews_corrcoef([0, 0, 0], [0, 0, 0]) == 0.0
    assert counts.compute()["cohen_kappa"] == 0.0


def test_scores_that_do_not_fit_into_memory_are_refused() -> None:
    require_memory(["accuracy"], 500_000, 1_000, free=0)
    require_memory(["map"], 500_000, 1_000, free=5_000_000_000)
    with pytest.raises(RunError, match=r"map needs all scores of 500,000 images x 1,000 classes, 4\.00 GB of memory"):
        require_memory(["accuracy", "map"], 500_000, 1_000, free=1_000_000_000)


def test_names_that_have_no_meaning_are_refused() -> None:
    for name, multi_label in (("mcc", True), ("top5_accuracy", True), ("f1_micro", False)):
        with pytest.raises(RecipeError, match=f"{name} has no meaning for"):
            resolve_metrics([name], 3, multi_label=multi_label)


def test_a_recipe_watches_the_recall_of_a_class(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [str(write_recipe()), f"output_dir={run}"]
    assert exit_status([*words, "checkpoint.best.metric=recall/7", "evaluate.metrics=[accuracy, recall/7, map]"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert set(result["metrics"]) == {"loss", "accuracy", "recall/7", "map"}
    assert result["best"]["metric"] == "recall/7"
    assert evaluate_run(run)["recall/7"] == result["metrics"]["recall/7"]
    assert exit_status([*words, f"output_dir={tmp_path / 'b'}", "checkpoint.best.metric=mcc"]) == 0
    assert "mcc" in json.loads((tmp_path / "b" / "result.json").read_text())["metrics"]
    for words_of, message in (
        (["evaluate.metrics=[recall/cat]"], "'cat' is not a class of the data set"),
        (["evaluate.metrics=[balanced_acuracy]"], "balanced_accuracy"),
    ):
        capsys.readouterr()
        assert exit_status([*words, f"output_dir={tmp_path / 'c'}", *words_of, "checkpoint.best.metric=loss"]) == 2
        assert message in capsys.readouterr().err
