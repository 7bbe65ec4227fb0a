"""`crossval`: a training for each fold, stopped and continued; its figures beside plain references; its mistakes."""

from __future__ import annotations

import json
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import RECIPE, exit_status, weights
from scipy import stats
from sklearn.metrics import f1_score

from hf_fasttrain.report.crossval import over_folds
from hf_fasttrain.run_folder.crossval import read_crossval
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError

SMALL = RECIPE.replace("workers: 0}", "workers: 0, folds: 3}").replace("2 steps", "3 steps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a cross-validation that was stopped in its second fold, then continued."""
    place = tmp_path_factory.mktemp("crossval")
    (place / "small.yaml").write_text(SMALL)
    real = RunLog.at_step

    def stop(log: RunLog, step: int) -> None:
        real(log, step)
        if log.folder is not None and log.folder.name == "fold_1" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "at_step", stop)
        assert command(place) == 75
    state = read_crossval(place / "cv")
    assert state is not None
    assert state.done == ["fold_0"]
    assert command(place, "--resume") == 0
    return place / "cv"


def command(place: Path, *arguments: str) -> int:
    return exit_status(["crossval", str(place / "small.yaml"), f"output_dir={place / 'cv'}", *arguments])


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"fold_{fold}/result.json").read_text()) for fold in range(3)]


def test_a_continued_fold_is_that_of_a_run_by_itself_bit_by_bit(folder: Path) -> None:
    recipe, alone = folder.parent / "small.yaml", folder.parent / "alone"
    assert exit_status([str(recipe), "data.fold=1", f"output_dir={alone}"]) == 0
    expected, found = weights(alone), weights(folder / "fold_1")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert results(folder)[1]["resumed_at"] == [2]


def test_figures_are_those_of_all_folds(folder: Path) -> None:
    state = read_crossval(folder)
    assert state is not None
    assert state.metrics is not None
    assert state.pooled is not None
    accuracies = [result["metrics"]["accuracy"] for result in results(folder)]
    found = state.metrics["accuracy"]
    assert found.values == accuracies
    assert found.mean == pytest.approx(statistics.mean(accuracies))
    parts = [Predictions.load(folder / f"fold_{fold}/predictions.safetensors") for fold in range(3)]
    labels, predicted = (np.concatenate([getattr(p, name).numpy() for p in parts]) for name in ("labels", "predicted"))
    assert state.pooled.images == 1797
    assert state.pooled.metrics["accuracy"] == pytest.approx((labels == predicted).mean())
    assert state.pooled.metrics["f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    pooled = Predictions.load(folder / "predictions.safetensors")
    assert pooled.images is not None
    assert len(torch.unique(pooled.images)) == 1797
    page = (folder / "report.html").read_text()
    assert "fold 2" in page
    assert "1,797 images of all folds, predicted after step" in page


def test_the_interval_of_a_mean_is_students(folder: Path) -> None:
    values = [0.9, 0.93, 0.88, 0.95, 0.91]
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    found = over_folds(values)
    assert (found.low, found.high) == pytest.approx(expected)
    assert over_folds([0.2, 0.9], is_share=True).model_dump() == {
        "mean": pytest.approx(0.55), "low": 0.0, "high": 1.0, "values": [0.2, 0.9],
    }  # fmt: skip
    assert over_folds([0.1, 0.1]).low is None


def test_a_finished_fold_keeps_its_model_and_the_last_training_has_all_images(folder: Path) -> None:
    for fold in range(3):
        assert not (folder / f"fold_{fold}/checkpoints").exists()
        assert exit_status(["evaluate", str(folder / f"fold_{fold}")]) == 0
    final = json.loads((folder / "final/result.json").read_text())
    assert final["metrics"] == {}
    assert (folder / "final/checkpoints").is_dir()
    assert "all 1,797 images are trained on" in json.dumps(final["notes"])
    assert final["images"] == 3 * 16


def test_nothing_is_repeated_and_changed_settings_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert command(folder.parent, "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")} == before
    assert command(folder.parent) == 2
    assert "holds a cross-validation already; add --resume" in capsys.readouterr().err
    assert command(folder.parent, "--resume", "optimizer.lr=0.5") == 2
    assert "optimizer.lr: 0.001 before, 0.5 now" in capsys.readouterr().err
    assert command(folder.parent, "--resume", "data.folds=4") == 2
    assert "data.folds: 3 before, 4 now" in capsys.readouterr().err
    assert exit_status(["crossval", str(folder.parent / "small.yaml"), f"output_dir={folder / 'fold_0'}"]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["crossval", "data.fold=1"], "data.fold is 1, and crossval trains every fold"),
        (["crossval", "evaluate.every=never"], "evaluate.every is never, and crossval measures every fold"),
        (["crossval", "schedule.name=plateau"], "--no-final leaves it out"),
        (["crossval", "data.eval_fraction=0.3"], "data.folds and data.eval_fraction exclude each other"),
        (["train", "data.fold=9"], "data.fold is 9; of data.folds=3, folds are numbered 0 to 2"),
        (["train"], "data.folds=3 needs data.fold, from 0 to 2"),
        (["train", "data.folds=null", "data.fold=1"], "data.folds is not set; set data.folds=5"),
        (["train", "data.fold=1", "data.eval_split=test"], "data.eval_split=test exclude each other"),
    ],
)
def test_mistakes_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    name, *overrides = arguments
    assert exit_status([name, str(tmp_path / "small.yaml"), f"output_dir={tmp_path / 'run'}", *overrides]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_setting_that_did_not_exist_when_it_began_has_its_default(folder: Path) -> None:
    state = read_crossval(folder)
    assert state is not None
    older = state.model_copy(update={"settings": {k: v for k, v in state.settings.items() if k != "train.probe_first"}})
    defaults = {"train.probe_first": False, "of.another": 3}
    state.require_same(older, folder, defaults)
    with pytest.raises(RunError, match="probe_first: True before, False now"):
        state.require_same(older, folder, {**defaults, "train.probe_first": True})


def test_a_mistake_that_the_first_fold_finds_does_not_block_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    for _ in range(2):
        assert command(tmp_path, "evaluate.thresholds=tuned") == 2
        assert "tuned has no meaning for one label per image" in capsys.readouterr().err
    assert command(tmp_path, "evaluate.thresholds=tuned", "seed=7") == 2  # other settings
    assert "tuned has no meaning for one label per image" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "recipe": "x", "folds": "3"}'])
def test_a_damaged_crossval_json_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "crossval.json").write_text(text)
    with pytest.raises(RunError, match="can't be read as a cross-validation"):
        read_crossval(tmp_path)
