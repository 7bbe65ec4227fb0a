"""Metrics of the evaluate library that raise: refused before training, skipped later; the run continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.metric_module import MODULE
from helpers.processes import run_processes
from helpers.runs import exit_status
from torch import nn

from hf_fasttrain import Trainer, Watch
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.metrics import ExternalMetrics
from hf_fasttrain.utils.errors import RecipeError


@pytest.fixture
def write_metric(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a metric with the given body and returns its path."""

    def write(name: str, body: str, kind: str = "number") -> str:
        folder = tmp_path / "metrics" / name
        folder.mkdir(parents=True, exist_ok=True)
        text = MODULE.replace("BODY", body.replace("\n", "\n        ")).replace("KIND", kind)
        (folder / f"{name}.py").write_text(text)
        return str(folder)

    return write


BROKEN = {
    "f1_of_two": ('return {"f1": float(f1_score(references, predictions))}', "ValueError: Target is multiclass"),
    "f1_of_each": (
        'return {"f1": f1_score(references, predictions, average=None)}',
        r"TypeError: it returns \{'f1': array\(.*instead of one number",
    ),
    "nothing": ("return {}", r"it returns \{\} instead of one number"),
    "no_message": ("raise KeyError", "of 3 classes: KeyError; leave it out"),
    "no_such_name": ("return undefined", "NameError: name 'undefined' is not defined"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_metric_that_fails_is_refused_before_training(name: str, write_metric: Callable[..., str]) -> None:
    body, expected = BROKEN[name]
    metric = write_metric(name, body)
    with pytest.raises(
        RecipeError, match=f"evaluate.metrics: '{name}' fails on 6 synthetic images with one label .*{expected}"
    ):
        Evaluator(Accelerator(cpu=True), 3, external=[metric])


def test_a_metric_for_the_number_of_classes_is_accepted(write_metric: Callable[..., str]) -> None:
    metric = write_metric("f1_of_two", BROKEN["f1_of_two"][0])
    assert Evaluator(Accelerator(cpu=True), 2, external=[metric]).new_notes() == []
    shape = write_metric("shape", "return {'places': np.array(predictions).shape[1]}", "datasets.Sequence(number)")
    external = ExternalMetrics([shape])
    external.try_out(4, multi_label=True)
    external.update(torch.zeros(2, 4), torch.zeros(2, 4))
    assert external.compute() == {"shape": 4.0}
    with pytest.raises(RecipeError, match="'shape' fails on 8 synthetic images with one label each of 4 classes"):
        external.try_out(4, multi_label=False)


def test_the_command_line_refuses_it_in_one_message(
    write_metric: Callable[..., str], write_recipe: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    metric = write_metric("f1_of_two", BROKEN["f1_of_two"][0])
    arguments = [f"evaluate.metrics=[accuracy, {metric}]", f"output_dir={tmp_path / 'run'}"]
    assert exit_status([str(write_recipe()), *arguments]) == 2
    messages = capsys.readouterr().err
    assert (
        "error: evaluate.metrics: 'f1_of_two' fails on 20 synthetic images with one label each of 10 classes"
        in messages
    )
    assert "Traceback" not in messages
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_metric_that_raises_when_it_is_imported_is_refused(write_metric: Callable[..., str]) -> None:
    metric = write_metric("broken_import", "pass")
    Path(metric, "broken_import.py").write_text("import evaluate\nraise RuntimeError()\n")
    with pytest.raises(RecipeError, match=r"broken_import' is not built in .*can't be loaded .*: RuntimeError"):
        ExternalMetrics([metric])


def flaky(write_metric: Callable[..., str], counter: Path, failing: set[int]) -> str:
    """Return a metric whose value is its number of calls; raises in some of them. The first call precedes training."""
    body = f"counter = Path({str(counter)!r})\ncalls = len(counter.read_text()) if counter.exists() else 0\n"
    body += "counter.write_text('x' * (calls + 1))\n"
    body += f"if calls in {failing!r}:\n    raise ValueError(f'no value in call {{calls}}')\nreturn {{'calls': calls}}"
    return write_metric("flaky", body)


def train(metric: str, output_dir: Path, **options: Any) -> tuple[Any, Trainer]:
    """Train a linear model for 4 steps with an evaluation after each."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = [(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))] * 4
    accelerator = Accelerator(cpu=True)
    trainer = Trainer(
        model,
        data,
        torch.optim.SGD(model.parameters(), lr=0.1),
        accelerator=accelerator,
        eval_loader=data[:1],
        evaluate_every="1 step",
        checkpoint_every="4 steps",
        output_dir=output_dir,
        report=False,
        log=RunLog(output_dir, show=False),
        **options,
    )
    trainer.evaluation.evaluator = Evaluator(accelerator, 3, external=[metric])
    return trainer.fit(), trainer


def test_a_metric_that_raises_in_training_is_reported_once_and_skipped(
    write_metric: Callable[..., str], tmp_path: Path
) -> None:
    metric = flaky(write_metric, tmp_path / "calls", {2, 3})
    result, _ = train(metric, tmp_path / "run")
    assert result.steps == 4
    assert [note for note in result.notes if "flaky" in note] == [
        "metric 'flaky' could not be computed and is skipped: ValueError: no value in call 2"
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("flaky") for line in lines if line["kind"] == "evaluation"] == [1, None, None, 4]
    assert all("accuracy" in line for line in lines if line["kind"] == "evaluation")
    assert len(complete_checkpoints(tmp_path / "run" / "checkpoints")) >= 1


def test_a_watched_metric_that_raises_does_not_end_the_run_or_lose_the_best(
    write_metric: Callable[..., str], tmp_path: Path
) -> None:
    metric = flaky(write_metric, tmp_path / "calls", {2, 3, 4})
    watch = {"best": Watch("flaky", "max"), "early_stopping": Watch("flaky", "max", patience=1)}
    result, trainer = train(metric, tmp_path / "run", **watch)
    assert (result.steps, result.stopped_early) == (4, False)
    assert result.best is not None
    assert (result.best["value"], result.best["step"]) == (1.0, 1)
    messages = [note for note in result.notes if "flaky" in note]
    assert messages[1:] == ["'flaky' is watched; evaluations without it are not compared with the best"]
    assert trainer.is_finished


def failing_on_the_last_process(metric: str) -> tuple[dict[str, float], list[str]]:
    accelerator = Accelerator(cpu=True)
    external = ExternalMetrics([metric])
    external.update(torch.eye(3), torch.arange(3))
    if accelerator.process_index == 1:
        external.modules["calls"].compute = None
    return external.compute(Processes(accelerator).gather), external.failed.new_notes()


def test_a_metric_that_raises_on_one_process_is_skipped_on_all(write_metric: Callable[..., str]) -> None:
    metric = write_metric("calls", "return {'calls': len(predictions)}")
    for values, failures in run_processes(failing_on_the_last_process, metric):
        assert values == {}
        assert failures == [
            "metric 'calls' could not be computed and is skipped: TypeError: 'NoneType' object is not callable"
        ]


def test_predictions_are_kept_as_arrays_and_given_to_the_metric_together() -> None:
    class Counts:
        def compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
            return {"right": float((predictions == references).sum()), "images": len(predictions)}

    metrics = ExternalMetrics([])
    metrics.modules = {"counts": Counts()}
    labels = torch.arange(50) % 4
    for start in range(0, 50, 20):
        part = labels[start : start + 20]
        metrics.update(torch.nn.functional.one_hot(part, 4), part)
    assert sum(column.nbytes for batch in metrics._batches for column in batch) == 2 * 50 * labels.element_size()
    assert metrics.compute() == {"counts": 50.0}
    assert metrics._batches == []
