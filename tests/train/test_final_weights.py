"""The final weights of a run: the last ones or those of the best evaluation; and the choice by later commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import RECIPE, checkpoint, equal, exit_status, raise_losses, result_of, steps_of, weights
from helpers.small_trainer import small_trainer
from PIL import Image
from safetensors.torch import load_file

from hf_fasttrain.export.export import export_run
from hf_fasttrain.inference import evaluate_run, predict_images
from hf_fasttrain.report.record import read_record
from hf_fasttrain.report.sections import page_of_run
from hf_fasttrain.run_folder.checkpoint import load_checkpoint
from hf_fasttrain.run_folder.file_names import PREDICTIONS_FILE
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.final_weights import final_step
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.utils.errors import RunError

SMALL = [
    "data.eval_fraction=0.05",
    "train.duration=4 steps",
    "evaluate.every=1 step",
    "optimizer.lr=1e-2",
    "schedule.name=constant",
]
BEST = "checkpoint={final: best, every: 1 step, best: {metric: loss}}"

pytestmark = pytest.mark.usefixtures("rising_loss")  # the first evaluation is the best


def make(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> Trainer:
    reset_accelerate()
    return Trainer.from_recipe(recipe, [*SMALL, *overrides, f"output_dir={run}"], resume=resume)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 4 steps that ended with the weights of the first, the best; without a report."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patched:
        raise_losses(patched)
        patched.setattr("hf_fasttrain.report.report.write_page", lambda runs: None)
        make(folder / "small.yaml", folder / "run", BEST, "log.report=true").fit()
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the run of 4 steps that ended with the weights of the first, the best."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_run_ends_with_the_best_weights_and_their_metrics(run: Path) -> None:
    result = result_of(run)
    assert result["model"] == {"weights": "best", "step": 1, "ema": False}
    assert equal(weights(run), checkpoint(run, 1))
    assert result["metrics"] == result["best"]["metrics"]
    assert (result["metrics"]["loss"], result["best"]["step"]) == (1.0, 1)
    assert (result["last"]["metrics"]["loss"], result["last"]["step"], result["steps"]) == (4.0, 4, 4)
    predictions = Predictions.load(run / PREDICTIONS_FILE)
    assert predictions.step == 1
    accuracy = (predictions.labels == predictions.predicted).float().mean().item()
    assert accuracy == pytest.approx(result["metrics"]["accuracy"])


def test_the_moving_average_is_that_of_the_best_step(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    trainer = make(write_recipe(), tmp_path / "run", BEST, "ema={decay: 0.5}")
    trainer.fit()
    average = checkpoint(tmp_path / "run", 1, "ema")
    assert equal(weights(tmp_path / "run"), average)
    assert equal({**trainer.trained_model.state_dict()}, average)


def test_the_last_weights_stay_by_default(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(write_recipe(), run, "checkpoint.best.metric=loss").fit()
    result = result_of(run)
    assert result["model"] == {"weights": "last", "step": 4, "ema": False}
    assert equal(weights(run), checkpoint(run, 4))
    assert result["metrics"] == result["last"]["metrics"] != result["best"]["metrics"]


def test_early_stopping_ends_with_the_best_weights(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopping = ["early_stopping={metric: loss, patience: 2 steps}", "train.duration=9 steps"]
    make(write_recipe(), run, *stopping, "checkpoint.best.metric=loss").fit()
    result = result_of(run)
    assert (result["stopped_early"], result["steps"], result["model"]["step"]) == (True, 3, 1)
    make(write_recipe(), run, *stopping, "checkpoint={final: last, best: {metric: loss}}", resume=True).fit()
    assert result_of(run)["model"] == {
        "weights": "last",
        "step": 3,
        "ema": False,
    }  # it may change when the run is resumed
    assert equal(weights(run), checkpoint(run, 3))


def test_a_longer_training_continues_from_the_last_weights(
    run: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    longer = ["train.duration=6 steps", "checkpoint.keep=9"]
    make(write_recipe(), run, BEST, *longer, resume=True).fit()
    make(write_recipe(), tmp_path / "whole", BEST, *longer).fit()
    assert steps_of(run)[-1] == 6
    for step in (4, 6):
        assert equal(checkpoint(run, step), checkpoint(tmp_path / "whole", step))


def test_nothing_is_saved_with_the_best_weights_as_if_they_were_the_last(run: Path, write_recipe: Any) -> None:
    before = checkpoint(run, 4)
    trainer = make(write_recipe(), run, BEST, resume=True)
    trainer.fit()
    trainer.checkpoints.saved_at = -1
    trainer.save()
    assert trainer.checkpoints is not None
    trainer.checkpoints.wait()
    assert equal(checkpoint(run, 4), before)


@pytest.mark.parametrize("fault", ["gone", "corrupt"])
def test_without_the_best_checkpoint_the_last_weights_are_kept(
    run: Path, write_recipe: Callable[..., Path], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "step_00000001"
    if fault == "gone":
        (path / "COMPLETE").unlink()
    else:
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = make(write_recipe(), run, BEST, resume=True).fit()
    assert result.model == {"weights": "last", "step": 4, "ema": False}
    assert result.metrics == result.last["metrics"]
    assert equal(weights(run), checkpoint(run, 4))
    messages = f"the best evaluation's weights can't be read: checkpoint {path} is {fault}"
    assert messages in capsys.readouterr().out
    assert any(messages in note for note in result.notes)
    resumed = make(write_recipe(), run, BEST, resume=True)
    missing_step = final_step(resumed.final, resumed.state, resumed.checkpoints)
    assert missing_step == 4  # nothing is missing, and the end is not repeated


def test_all_processes_evaluate_the_best_weights(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe()

    def train() -> dict[str, Any]:
        make(recipe, tmp_path / "run", BEST, "train.duration=2 steps").fit()
        trainer = make(recipe, tmp_path / "run", BEST, "train.duration=2 steps", resume=True)
        trainer.fit()
        return {name: tensor.clone() for name, tensor in trainer.trained_model.state_dict().items()}

    one, two = run_processes(train)
    assert equal(one, two)
    assert equal(weights(tmp_path / "run"), one)
    assert equal(weights(tmp_path / "run"), checkpoint(tmp_path / "run", 1))


def test_test_metrics_are_those_of_the_model(
    write_recipe: Callable[..., Path], tmp_path: Path, image_folder: Path
) -> None:
    image_folder.joinpath("validation").rename(image_folder / "test")
    data = [f"data.dataset={image_folder}", "data.eval_fraction=0.3", "data.test_split=test"]
    result = make(write_recipe(), tmp_path / "run", *data, BEST).fit()
    assert result.test_metrics is not None
    measured = evaluate_run(tmp_path / "run", split="test")
    assert measured["accuracy"] == pytest.approx(result.test_metrics["accuracy"])


def test_another_metric_may_choose_when_the_run_is_resumed(
    run: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(write_recipe(), run, "checkpoint={final: best, best: {metric: accuracy}}", resume=True)
    assert trainer.state.best is not None
    assert trainer.state.best["metric"] == "accuracy"
    assert trainer.state.best["value"] == result_of(run)["best"]["metrics"]["accuracy"]
    assert "best evaluation: now chosen by accuracy, before by loss" in capsys.readouterr().out


def test_commands_use_the_requested_weights(run: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 200).save(tmp_path / "a.png")
    scores = {
        weights: predict_images(run, [str(tmp_path / "a.png")], weights=weights)[0]["classes"][0]["score"]
        for weights in (None, "best", "last", "step_4", "step_3")
    }
    assert scores[None] == scores["best"]
    assert scores["last"] == scores["step_4"] != scores["best"]
    assert scores["step_3"] not in (scores["best"], scores["last"])
    last = result_of(run)["last"]["metrics"]
    assert evaluate_run(run, weights="last")["accuracy"] == pytest.approx(last["accuracy"])
    export_run(run, tmp_path / "last", weights="last")
    assert equal(load_file(tmp_path / "last" / "model.safetensors"), checkpoint(run, 4))
    export_run(run, weights="best")  # those in RUN/model
    with pytest.raises(RunError, match=r"model holds the weights that result\.json describes; give another folder"):
        export_run(run, weights="last")


def test_weights_that_do_not_exist_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run: no checkpoint of step 2 \(weights=step_2\); available: step_1, step_3"):
        predict_images(run, [str(run)], weights="step_2")
    with pytest.raises(RunError, match="weights=newest: allowed are last, best, average and step_N"):
        evaluate_run(run, weights="newest")
    with pytest.raises(RunError, match=r"model: has no result\.json, which says which weights are last; give the run"):
        predict_images(run / "model", [str(run)], weights="last")


def test_the_last_lines_say_which_weights_are_in_the_model_folder(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    base = ["train", str(write_recipe()), *SMALL, f"output_dir={run}"]
    assert exit_status([*base, BEST, "train.duration=2 steps"]) == 0
    messages = " ".join(capsys.readouterr().out.split())
    assert "the run ends with the weights of step 1, its best evaluation" in messages
    assert (
        "the classifier: weights of the best evaluation, step 1 (loss 1.0000); to export the last, step 2 (loss 2.0000)"
        in messages
    )
    assert f"hf-fasttrain export {run} --weights last --output FOLDER" in messages


def test_the_report_says_that_a_best_of_several_is_optimistic(run: Path) -> None:
    page = page_of_run(read_record(run))
    (note,) = [note for note in page.notes if "optimistic" in note]
    assert "the best of 4 evaluations by loss. Its metrics on held-out" in note
    (tile,) = [remark for name, _, remark in page.tiles if name == "accuracy"]
    assert "best (step 1), " in tile


def test_the_best_weights_can_be_loaded_and_training_continues_from_the_last(tmp_path: Path) -> None:
    options: dict[str, Any] = {"best": Watch("loss"), "evaluate_every": "1 step", "checkpoint_every": "1 step"}
    trainer = small_trainer(tmp_path / "run", steps=4, **options)
    with pytest.raises(RunError, match="there is no best evaluation yet"):
        trainer.load_best()
    result = trainer.fit()
    assert result.best is not None
    assert (result.best["step"], result.best["path"]) == (1, "checkpoints/step_00000001")
    last = [parameter.detach().clone() for parameter in trainer.raw_model.parameters()]
    assert trainer.load_best() == trainer.load_best() == 1
    kept = load_checkpoint(tmp_path / "run" / result.best["path"]).weights["model"]
    assert all(torch.equal(value, kept[name]) for name, value in trainer.raw_model.state_dict().items())
    assert trainer.evaluate()["accuracy"] == result.best["metrics"]["accuracy"]
    trainer.num_steps = 5
    with trainer.running():
        with pytest.raises(RunError, match=r"load_best\(\) inside running\(\)"):
            trainer.load_best()
        next(iter(trainer.iterate()))
    assert not all(map(torch.equal, trainer.raw_model.parameters(), last))
    (tmp_path / "run/checkpoints/step_00000001/COMPLETE").unlink()
    with pytest.raises(RunError, match="the weights of step 1, the best evaluation, are missing: its checkpoint is"):
        trainer.load_best()
    single = small_trainer(None, steps=4, **{**options, "checkpoint_every": "1 epoch"})
    unsaved = single.fit()
    assert unsaved.best is not None
    assert unsaved.best["path"] is None
    with pytest.raises(RunError, match="no checkpoints are kept without an output_dir"):
        single.load_best()
