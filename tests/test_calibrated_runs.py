"""Runs with a temperature: it is kept with the weights, and used by predict, exports, the report and the push."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.runs import RECIPE, exit_status
from helpers.small_trainer import small_trainer
from PIL import Image

from hf_fasttrain.export.export import export_run
from hf_fasttrain.export.onnx_file import metadata_of
from hf_fasttrain.hub.staging import staged
from hf_fasttrain.inference import open_predictions, predict_images
from hf_fasttrain.models.model import Preprocessing
from hf_fasttrain.models.saved import load_model
from hf_fasttrain.report.record import read_record
from hf_fasttrain.report.sections import page_of_run
from hf_fasttrain.run_folder.calibration import read_calibration
from hf_fasttrain.run_folder.checkpoint import checkpoint_path, read_state
from hf_fasttrain.utils.errors import RunError

EVALUATED = """
evaluate: {every: 2 steps}
checkpoint: {every: 2 steps, best: {metric: loss}}
ema: {decay: 0.5}
data: {dataset: digits, image_size: 32, workers: 0}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 5 steps, evaluated after steps 2, 4 and 5, with checkpoints of 2 (made the best), 4 and 5."""
    folder = tmp_path_factory.mktemp("calibrated")
    text = RECIPE.replace("data: {dataset: digits, image_size: 32, workers: 0}\n", "").replace("2 steps", "5 steps")
    recipe = folder / "recipe.yaml"
    recipe.write_text(text + EVALUATED + f"output_dir: '{folder / 'run'}'\n")
    assert exit_status(["train", str(recipe), "checkpoint.keep=3"]) == 0
    result = json.loads((folder / "run/result.json").read_text())
    result["best"]["step"] = 2
    (folder / "run/result.json").write_text(json.dumps(result))
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return str(path)


def scores(run: Path, photo: str, **options: Any) -> dict[str, float]:
    [row] = predict_images(run, [photo], top=10, **options)
    return {each["class"]: each["score"] for each in row["classes"]}


def temperature(run: Path, step: int) -> float:
    return float(read_state(checkpoint_path(run / "checkpoints", step))["state"]["calibration"]["temperature"])


def with_temperature(plain: dict[str, float], value: float) -> dict[str, float]:
    """Return softmax of logits / T from the scores with T = 1."""
    logits = torch.tensor(list(plain.values()), dtype=torch.float64).log()
    return dict(zip(plain, (logits / value).softmax(0).tolist(), strict=True))


def test_each_saved_weights_have_their_own_temperature(run: Path, photo: str) -> None:
    saved = read_calibration(run / "model")
    assert (saved.step, saved.temperature) == (5, temperature(run, 5))
    assert len({temperature(run, step) for step in (2, 4, 5)}) == 3
    for weights, step in ((None, 5), ("last", 5), ("best", 2), ("step_4", 4)):
        plain = scores(run, photo, weights=weights)
        expected = with_temperature(plain, temperature(run, step))
        assert scores(run, photo, weights=weights, calibrated=True) == pytest.approx(expected, rel=1e-3)
    assert list(scores(run, photo, calibrated=True)) == list(scores(run, photo))  # the order is the same


def test_the_temperature_makes_the_evaluation_split_likelier(run: Path) -> None:
    saved = read_calibration(run / "model")
    result = json.loads((run / "result.json").read_text())
    assert saved.before.loss == pytest.approx(result["metrics"]["loss"], rel=1e-5)  # of the moving average
    assert saved.after.loss < saved.before.loss
    assert saved.images == sum(saved.before.counts) == sum(saved.after.counts)
    assert saved.split.startswith("held-out")


def test_exports_have_the_temperature_of_their_weights(run: Path, tmp_path: Path) -> None:
    for weights, step in ((None, 5), ("best", 2)):
        folder = export_run(run, tmp_path / f"out {step}", weights=weights).folder
        assert json.loads((folder / "config.json").read_text())["calibration"] == {
            "temperature": temperature(run, step)
        }
        assert read_calibration(folder).step == step
        spec = load_model(folder)[1]
        metadata = metadata_of(spec, spec.preprocessing or Preprocessing(32), read_calibration(folder))
        assert json.loads(metadata["temperature"]) == temperature(run, step)
        assert "thresholds" not in metadata
        with staged(run, weights) as pushed:
            assert read_calibration(pushed / "model").step == step
    state = run / "checkpoints/step_00000002/state.json"
    (state.parent / "COMPLETE").unlink()
    export_run(run)  # in place
    assert read_calibration(run / "model").step == 5


def test_runs_without_a_temperature_are_refused(run: Path, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "model/calibration.json").unlink()
    plain = scores(run, photo)
    assert sum(plain.values()) == pytest.approx(1)
    assert exit_status(["predict", str(run), photo, "--calibrated"]) == 2
    assert (
        "no temperature is stored with these weights; it is fitted when a training evaluates" in capsys.readouterr().err
    )
    assert "calibration" not in {section.id for section in page_of_run(read_record(run)).sections}
    export_run(run)
    assert "calibration" not in json.loads((run / "model/config.json").read_text())
    assert not (run / "model/calibration.json").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; must be greater than or equal to 0.01"),
        ({"temperature": float("nan")}, "temperature is nan; must be a finite number"),
        ({"temperature": "1.5"}, "temperature is '1.5'; must be a valid number"),
        ({"step": -1}, "step is -1; must be greater than or equal to 0"),
        ({"thresholds": [0.5, 2.0]}, r"thresholds.1 is 2.0; must be less than or equal to 1"),
        ({"before": {"loss": 1}}, "before.ece is missing, and 4 more"),
    ],
)
def test_a_changed_file_is_refused(
    run: Path, photo: str, values: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "model/calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert exit_status(["predict", str(run), photo, "--calibrated"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"can't be read as a model's calibration ({message}" in error
    assert any("calibration.json" in problem for problem in read_record(run).problems)


def test_thresholds_of_other_classes_are_refused(run: Path, photo: str) -> None:
    path = run / "model/calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"thresholds": [0.5, 0.2]}))
    for use in (lambda: open_predictions(run, [photo], calibrated=True), lambda: export_run(run, run.parent / "out")):
        with pytest.raises(
            RunError, match=r"calibration\.json has 2 thresholds, and the model has 10 classes"
        ) as error:
            use()
        assert str(error.value).startswith(f"{run}: ")


def test_the_report_shows_the_reliability_before_and_after(run: Path) -> None:
    record = read_record(run)
    [section] = [section for section in page_of_run(record).sections if section.id == "calibration"]
    saved = read_calibration(run / "model")
    assert f"The temperature {saved.temperature:.3f} was fitted to {saved.images} images of held-out" in section.text
    [chart] = section.charts
    assert f"is {saved.before.ece:.1%}, with the temperature {saved.after.ece:.1%}." in chart.caption
    _, before, after = chart.figure["data"]
    for trace, part in ((before, saved.before), (after, saved.after)):
        used = [number for number, count in enumerate(part.counts) if count]
        assert trace["customdata"] == [part.counts[number] for number in used]
        assert trace["y"] == pytest.approx([part.correct[number] for number in used], abs=1e-5)
    assert [row[0].text for row in section.tables[0].rows] == [
        "calibration error (ECE)", "negative log-likelihood", "Brier score",
    ]  # fmt: skip


def test_a_resumed_run_ends_with_the_temperature_of_one_that_was_never_stopped(run: Path) -> None:
    saved, recipe = read_calibration(run / "model"), run.parent / "recipe.yaml"
    recipe.write_text((run / "recipe.yaml").read_text())
    for name in ("model", "checkpoints/step_00000005"):
        shutil.rmtree(run / name)
    (run / "result.json").unlink()
    assert exit_status(["train", str(recipe), f"output_dir={run}", "checkpoint.keep=3", "--resume"]) == 0
    assert read_calibration(run / "model") == saved


def test_own_objects_have_a_temperature_too(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run")
    trainer.fit()
    saved = read_calibration(tmp_path / "run/model")
    assert (saved.step, saved.images) == (6, 24)
    model = trainer.trained_model

    @torch.no_grad()
    def loss(value: float) -> float:
        parts = [
            F.cross_entropy(model(images) / value, labels, reduction="sum")
            for images, labels in trainer.evaluation.eval_loader
        ]
        return float(sum(parts)) / 24

    best = min(loss(saved.temperature * factor) for factor in (0.9, 0.99, 1.0, 1.01, 1.1))
    assert best == loss(saved.temperature) == pytest.approx(saved.after.loss, rel=1e-5)


def test_a_run_without_evaluation_has_no_temperature(tmp_path: Path) -> None:
    small_trainer(tmp_path / "run", eval_loader=None).fit()
    assert not (tmp_path / "run/model/calibration.json").exists()
