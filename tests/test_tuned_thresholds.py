"""Runs with evaluate.thresholds=tuned: measured, kept with the weights, and used by predict, evaluate and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import exit_status
from PIL import Image
from sklearn.metrics import f1_score

from hf_fasttrain.export.export import export_run
from hf_fasttrain.export.onnx_file import metadata_of
from hf_fasttrain.hub.card import model_card
from hf_fasttrain.inference import evaluate_run, predict_images
from hf_fasttrain.models.model import Preprocessing
from hf_fasttrain.models.saved import load_model
from hf_fasttrain.recipe.load import parse_recipe
from hf_fasttrain.report.record import read_record
from hf_fasttrain.report.sections import page_of_run
from hf_fasttrain.run_folder.calibration import read_calibration
from hf_fasttrain.run_folder.checkpoint import checkpoint_path, read_state
from hf_fasttrain.run_folder.finished import read_run
from hf_fasttrain.train.score_metrics import require_memory
from hf_fasttrain.utils.errors import RecipeError, RunError

CLASSES = ["bright", "green", "red"]
SPLITS = {"train": 48, "validation": 24, "test": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with labels.csv; an image may be red, green and bright, and every fifth label is missing."""
    folder, random = tmp_path_factory.mktemp("multi"), np.random.default_rng(5)
    lines = ["path,label,split"]
    for split, number in SPLITS.items():
        for i in range(number):
            has = random.random(3) < (0.6, 0.3, 0.5)
            pixels = random.integers(0, 60, (32, 32, 3)) + 60 * has[0] + 120 * np.array([has[2], has[1], 0])
            name = f"{split}{i}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            labels = [each for each, there in zip(CLASSES, has, strict=True) if there and random.random() < 0.8]
            lines.append(f"{name},{'|'.join(labels or ['bright'])},{split}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def truth(data: Path, split: str) -> np.ndarray:
    rows = [line.split(",") for line in (data / "labels.csv").read_text().splitlines()[1:]]
    return np.array([[each in row[1].split("|") for each in CLASSES] for row in rows if row[2] == split])


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """Return a run whose best evaluation, by the tuned F1, is known."""
    recipe = data / "recipe.yaml"
    recipe.write_text(
        f"output_dir: '{data / 'run'}'\nmodel: {{name: test_resnet}}\n"
        f"data: {{dataset: '{data / 'labels.csv'}', label_separator: '|', image_size: 32, workers: 0,"
        " test_split: test}\n"
        "train: {duration: 6 steps, batch_size: 16}\noptimizer: {name: adamw, lr: 1e-2}\n"
        "evaluate: {every: 3 steps, thresholds: tuned}\n"
        "checkpoint: {every: 3 steps, keep: 3, best: {metric: f1_macro_tuned}}\n"
    )
    assert exit_status(["train", str(recipe)]) == 0
    return data / "run"


def predicted(run: Path, data: Path, split: str, **options: Any) -> np.ndarray:
    rows = predict_images(run, [str(data / f"{split}{i}.png") for i in range(SPLITS[split])], **options)
    return np.array([[each in row["predicted"] for each in CLASSES] for row in rows])


def test_the_metrics_are_those_of_the_predicted_classes(run: Path, data: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    for key, split in (("metrics", "validation"), ("test_metrics", "test")):
        for average in ("macro", "micro"):
            expected = f1_score(truth(data, split), predicted(run, data, split), average=average, zero_division=0)
            assert result[key][f"f1_{average}_tuned"] == pytest.approx(expected, abs=1e-6)
    assert result["metrics"]["f1_macro_tuned"] >= result["metrics"]["f1_macro"]
    assert result["best"]["metric"] == "f1_macro_tuned"


def test_weights_have_their_own_thresholds(run: Path, data: Path) -> None:
    saved, first = read_calibration(run / "model").thresholds, thresholds(run, 3)
    assert saved == thresholds(run, 6) != first
    assert (predicted(run, data, "test", weights="step_3") != predicted(run, data, "test")).any()
    assert (predicted(run, data, "test", calibrated=True) == predicted(run, data, "test")).all()


def thresholds(run: Path, step: int) -> list[float]:
    return list(read_state(checkpoint_path(run / "checkpoints", step))["state"]["calibration"]["thresholds"])


def test_evaluate_measures_at_the_thresholds_of_the_training(run: Path, data: Path, tmp_path: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    measured = evaluate_run(run, split="test")
    assert measured["f1_macro_tuned"] == pytest.approx(result["test_metrics"]["f1_macro_tuned"])
    notes: list[str] = []
    first = run / "checkpoints/step_00000003"
    assert evaluate_run(run, weights="step_3", note=notes.append)["f1_macro_tuned"] > 0
    assert not any("thresholds" in note for note in notes)
    assert first.exists()
    kept = (run / "model/calibration.json").read_text()
    (run / "model/calibration.json").unlink()
    try:
        assert "f1_macro_tuned" not in evaluate_run(run, note=notes.append)
    finally:
        (run / "model/calibration.json").write_text(kept)
    assert any(note.startswith("no tuned thresholds are stored with these weights") for note in notes)


def test_predict_names_the_predicted_classes(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(data / "test0.png")
    capsys.readouterr()
    assert exit_status(["predict", str(run), photo, "--json", "--calibrated"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["predicted"] == [
        each for each, there in zip(CLASSES, predicted(run, data, "test")[0], strict=True) if there
    ]
    assert exit_status(["predict", str(run), photo]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out
    assert out.count("yes") == len(row["predicted"])


def test_exports_report_and_card_have_the_thresholds(run: Path, tmp_path: Path) -> None:
    saved = read_calibration(run / "model")
    folder = export_run(run, tmp_path / "out").folder
    assert json.loads((folder / "config.json").read_text())["calibration"]["thresholds"] == saved.thresholds
    metadata = metadata_of(load_model(folder)[1], Preprocessing(32), read_calibration(folder))
    assert json.loads(metadata["thresholds"]) == saved.thresholds
    [section] = [each for each in page_of_run(read_record(run)).sections if each.id == "calibration"]
    table = section.tables[-1]
    assert [[cell.text for cell in row] for row in table.rows] == [
        [name, f"{value:.4f}"] for name, value in zip(CLASSES, saved.thresholds, strict=True)
    ]
    assert "are optimistic there" in table.caption
    card = model_card(read_run(run), {}, "me/multi", {})
    assert "Each class has its own threshold" in card
    assert "are optimistic there, those of the test split are not" in card


MODEL = (
    "model: {name: test_resnet}\ndata: {dataset: digits, image_size: 32}\ntrain: {duration: 2 steps, batch_size: 16}\n"
)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.best.metric=f1_macro_tuned", "is measured with evaluate.thresholds=tuned; set that too"),
        ("evaluate.metrics=[accuracy, f1_micro_tuned]", "f1_micro_tuned is measured with evaluate.thresholds=tuned"),
        ("evaluate.thresholds=0.3", "fixed"),
    ],
)
def test_wrong_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(MODEL, [override], where="recipe", name="recipe")
    assert message in " ".join(str(error.value).split())


def test_one_label_per_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(MODEL)
    options = ["evaluate.thresholds=tuned", f"output_dir={tmp_path / 'run'}", "data.workers=0"]
    assert exit_status(["train", str(tmp_path / "recipe.yaml"), *options]) == 2
    assert "evaluate.thresholds: tuned has no meaning for one label per image" in " ".join(
        capsys.readouterr().err.split()
    )


def test_scores_that_do_not_fit_into_memory_are_refused() -> None:
    with pytest.raises(
        RunError, match=r"evaluate\.thresholds=tuned: f1_macro_tuned needs all scores of 500,000 images"
    ):
        require_memory(["loss", "f1_macro_tuned"], 500_000, 1000, 10**9)
