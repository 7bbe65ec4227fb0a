"""Metrics compared with scikit-learn, which the `evaluate` modules of the same names call."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.processes import run_processes
from torch import Tensor, nn

from hf_fasttrain.train.batch_norm import average_batch_norm
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.train.loss import logits_of
from hf_fasttrain.train.metrics import ExternalMetrics, Metrics, resolve_metrics
from hf_fasttrain.utils.errors import RecipeError, RunError

CPU = torch.device("cpu")
# Like evaluate's f1 module, with a fixed average.
MODULE = """
import datasets
import evaluate
from sklearn.metrics import f1_score

class MacroF1(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="macro F1", citation="", features=features)

    def _compute(self, predictions, references):
        return {"f1": float(f1_score(references, predictions, average="macro"))}
"""


def random_batches(num_classes: int, sizes: list[int], multi_label: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(num_classes)
    batches = []
    for size in sizes:
        logits = torch.randn(size, num_classes, generator=generator)
        if multi_label:
            labels = (torch.rand(size, num_classes, generator=generator) < 0.4).float()
        else:
            labels = torch.randint(0, num_classes - 1, (size,), generator=generator)  # one class does not occur
        batches.append((logits, labels))
    return batches


def measured(batches: list[tuple[Tensor, Tensor]], num_classes: int, multi_label: bool = False) -> dict[str, float]:
    counts = Metrics(num_classes, CPU, multi_label=multi_label)
    for logits, labels in batches:
        counts.update(logits, labels)
    return counts.compute()


@pytest.mark.parametrize("num_classes", [2, 3, 7, 50])
def test_single_label_metrics_are_scikit_learns(num_classes: int) -> None:
    batches = random_batches(num_classes, [16, 16, 5])
    logits, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    actual, predicted = measured(batches, num_classes), logits.argmax(1)
    assert actual["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert actual["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    assert actual["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    order = np.argsort(-logits.numpy(), axis=1)[:, :5]
    assert actual["top5_accuracy"] == pytest.approx(np.mean([y in row for y, row in zip(labels, order, strict=True)]))


def test_multi_label_metrics_are_scikit_learns() -> None:
    batches = random_batches(6, [16, 9], multi_label=True)
    logits, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    actual, predicted = measured(batches, 6, multi_label=True), (logits >= 0).int()
    assert actual["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert actual["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    assert actual["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels).item(), rel=1e-6)
    assert "top5_accuracy" not in actual


def test_an_evaluate_module_by_local_path_agrees_with_the_built_in_metric(tmp_path: Path) -> None:
    folder = tmp_path / "macro_f1"
    folder.mkdir()
    (folder / "macro_f1.py").write_text(MODULE)
    batches = random_batches(7, [16, 5])
    external = ExternalMetrics([str(folder)])
    for logits, labels in batches:
        external.update(logits, labels)
    assert external.compute()["macro_f1"] == pytest.approx(measured(batches, 7)["f1_macro"])


def test_unknown_metrics_are_reported() -> None:
    with pytest.raises(RecipeError, match=r"'acuracy' is not built in .* Did you mean 'accuracy'\?"):
        ExternalMetrics(["acuracy"])
    with pytest.raises(RecipeError, match="top5_accuracy has no meaning for multi-label"):
        resolve_metrics(["top5_accuracy"], 9, multi_label=True)


@pytest.mark.parametrize("num_classes", [3, 5, 6])
def test_top5_is_measured_only_where_it_says_something(num_classes: int) -> None:
    """Of five classes or fewer it is always 1; somebody who asks for it or watches it gets it."""
    batches = random_batches(num_classes, [8])
    evaluator = Evaluator(Accelerator(cpu=True), num_classes)
    assert ("top5_accuracy" in evaluator(nn.Identity(), batches)) == (num_classes > 5)
    assert ("top5_accuracy" in resolve_metrics("auto", num_classes, multi_label=False)[0]) == (num_classes > 5)
    evaluator.watched = ("top5_accuracy",)
    assert "top5_accuracy" in evaluator(nn.Identity(), batches)
    assert "top5_accuracy" in resolve_metrics(["accuracy", "top5_accuracy"], num_classes, multi_label=False)[0]


def evaluate_five_images() -> dict[str, float]:
    """Evaluate on 5 images, of which the last process has fewer."""
    accelerator = Accelerator(cpu=True)
    ((logits, labels),) = random_batches(3, [5])
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    return Evaluator(accelerator, 3)(nn.Identity(), [(logits[share], labels[share])])


def test_five_images_on_two_processes_count_as_five() -> None:
    single = evaluate_five_images()
    assert (single["accuracy"] * 5) % 1 == pytest.approx(0, abs=1e-9)
    for actual in run_processes(evaluate_five_images):
        assert actual == pytest.approx(single)
    for actual in run_processes(evaluate_five_images, num_processes=4):
        assert actual == pytest.approx(single)


def averaged_norm() -> Tensor:
    accelerator = Accelerator(cpu=True)
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(float(accelerator.process_index))
    average_batch_norm(norm, Processes(accelerator))
    return norm.running_mean


def test_batch_norm_statistics_are_averaged_over_processes() -> None:
    for mean in run_processes(averaged_norm):
        assert mean.tolist() == [0.5, 0.5]


def test_logits_are_found_in_a_models_output() -> None:
    logits = torch.randn(2, 3)
    for output in (logits, SimpleNamespace(logits=logits, loss=None), {"logits": logits}, OrderedDict(logits=logits)):
        assert logits_of(output) is logits
    for wrong, description in (
        ((logits, logits), r"a tuple of 2 \(Tensor, Tensor\)"),
        ({"out": logits, "aux": logits}, "a dict of 'out', 'aux'"),
        (SimpleNamespace(logits=None), "an output of type SimpleNamespace"),
        (None, "an output of type NoneType"),
    ):
        with pytest.raises(RunError, match=f"the model returns {description} instead of logits.*predict="):
            logits_of(wrong)
