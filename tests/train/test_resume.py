"""Resuming: after a kill at any moment, with other processes, a longer duration, moved data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.callbacks import stop_before
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import RECIPE, weights
from kill_and_resume import WITH_LOSS, import_everything, train_with_kills
from safetensors.torch import load_file
from torch import Tensor

from hf_fasttrain import Trainer
from hf_fasttrain.run_folder.checkpoint import Snapshot, complete_checkpoints, load_checkpoint, save_checkpoint
from hf_fasttrain.utils.errors import ModelError, RunError

import_everything()
SMALL = ["data.eval_fraction=0.05", "augment.mixup=0.5", "log.every=1", "checkpoint.every=2 steps"]
EXACT = [*SMALL, "model.name=test_vit", "optimizer.name=sgd", "optimizer.lr=0.05"]


def make(recipe: Path, run: Path, *overrides: str, resume: bool = False, small: list[str] = SMALL) -> Trainer:
    reset_accelerate()
    return Trainer.from_recipe(recipe, [*small, f"output_dir={run}", *overrides], resume=resume)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a recipe and its finished run, which no test may change."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(RECIPE)
    make(folder / "small.yaml", folder / "run").fit()
    return folder / "small.yaml", folder / "run"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Return the weights of an uninterrupted run of 6 steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "small.yaml").write_text(RECIPE)
    make(folder / "small.yaml", folder / "run", "train.duration=6 steps", small=EXACT).fit()
    return weights(folder / "run")


@pytest.mark.parametrize("kind", [WITH_LOSS, "two workers, cache in memory", "two processes with two workers"])
def test_a_run_killed_at_random_and_resumed_ends_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """The short form of kill_and_resume.py."""
    report = train_with_kills(kind, tmp_path, kills=2, seed=1, steps=12)
    assert report.kills == 2
    assert report.differing == []


def fit_steps(recipe: str, run: str, duration: str, resume: bool) -> int:
    """Train on all processes; stop a training of 8 steps at `duration`."""

    reset_accelerate()
    trainer = Trainer.from_recipe(recipe, [*EXACT, f"output_dir={run}", "train.duration=8 steps"], resume=resume)
    first_step = trainer.state.step
    if int(duration) < 8:
        stop_before(trainer, int(duration))
    else:
        trainer.fit()
    return first_step


@pytest.mark.parametrize("processes", [(2, 1, 2), (1, 2, 1)])
def test_a_run_is_resumed_on_another_number_of_processes(
    processes: tuple[int, int, int], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = str(write_recipe())
    run_processes(fit_steps, recipe, str(tmp_path / "whole"), "8", False, num_processes=1)
    run = str(tmp_path / "cut")
    begins = [
        run_processes(fit_steps, recipe, run, duration, number > 0, num_processes=count)[0]
        for number, (count, duration) in enumerate(zip(processes, ("2", "4", "8"), strict=True))
    ]
    assert begins == [0, 2, 4]
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], value, rtol=1e-5, atol=2e-6)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # the same images in the same steps


def test_a_longer_duration_follows_the_new_schedule_and_reports_both_learning_rates(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warmup = "schedule.warmup=25%"  # 1 step, then 2: the setting is the same
    make(write_recipe(), tmp_path / "run", warmup, "train.duration=4 steps").fit()
    capsys.readouterr()
    trainer = make(write_recipe(), tmp_path / "run", warmup, "train.duration=8 steps", resume=True)
    messages = (
        "train.duration is now 8 steps, before 4: after step 4 lr follows the new schedule, 0.00075 after 0.00025"
    )
    assert messages in capsys.readouterr().out
    result = trainer.fit()
    assert (result.steps, result.resumed_at) == (8, [4])
    with pytest.raises(RunError, match=r"train\.duration is 6 steps, and 8 are done already; set a longer one"):
        make(write_recipe(), tmp_path / "run", warmup, "train.duration=6 steps", resume=True)


@pytest.mark.parametrize(
    "changed",
    [
        "seed=1",
        "train.batch_size=8",
        "augment.mixup=0.1",
        "model.drop_path=0.2",
        "data.image_size=40",
        "optimizer.lr=1",
        "ema={decay: 0.5}",
        "data.eval_fraction=0.1",
        "schedule.start_ratio=0.5",
        "augment.flip=1",
        "augment.auto=rand-m9",
    ],
)
def test_changed_result_settings_are_refused_with_both_values(changed: str, finished: tuple[Path, Path]) -> None:
    key = changed.split("=")[0]
    with pytest.raises(RunError, match=rf"(?s)  {key}.*: .* in the run, .* now.*start a new run from these weig"):
        make(*finished, changed, resume=True)


def test_checkpoints_that_do_not_fit_are_passed_over(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = "checkpoint.keep=4"
    make(write_recipe(), tmp_path / "run", "train.duration=8 steps", keep).fit()
    paths = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert len(paths) == 4
    for path in paths[1:]:
        saved = load_checkpoint(path)
        weights, training = saved.weights, saved.training
        if path == paths[1]:  # of another shape
            weights = {kind: {name: torch.zeros(1) for name in names} for kind, names in weights.items()}
        elif path == paths[2]:  # a group without a sound option
            groups = [{**group, "betas": "x"} for group in training["optimizer"]["param_groups"]]
            training = {**training, "optimizer": {**training["optimizer"], "param_groups": groups}}
        else:  # a state without what the next step needs, of one parameter
            states = training["optimizer"]["state"]
            first = {key: value for key, value in states[0].items() if key != "exp_avg"}
            training = {**training, "optimizer": {**training["optimizer"], "state": {**states, 0: first}}}
        save_checkpoint(path.parent, Snapshot(int(path.name[5:]), saved.state, weights, training))
    trainer = make(write_recipe(), tmp_path / "run", "train.duration=8 steps", keep, resume=True)
    assert trainer.state.step == 2
    out = capsys.readouterr().out
    assert out.count("it is of another model or optimizer") == 3
    assert "parameters of group 0 have different states" in out
    assert "option betas of group 0 is 'x'" in out
    assert trainer.fit().steps == 8


def test_a_run_older_than_a_key_has_its_default(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe(), tmp_path / "run").fit()
    (newest,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    checkpoint = load_checkpoint(newest)
    settings = {k: v for k, v in checkpoint.state["learnt"].items() if k != "schedule.power"}
    assert len(settings) == len(checkpoint.state["learnt"]) - 1
    metadata = {**checkpoint.state, "learnt": settings}
    save_checkpoint(newest.parent, Snapshot(2, metadata, checkpoint.weights, checkpoint.training))
    longer = "train.duration=3 steps"
    with pytest.raises(RunError, match=r"  schedule\.power: 1\.0 in the run, 2\.0 now"):
        make(write_recipe(), tmp_path / "run", longer, "schedule.power=2", resume=True)
    assert make(write_recipe(), tmp_path / "run", longer, resume=True).fit().resumed_at == [2]


@pytest.mark.parametrize(
    "changed",
    [
        ["data.workers=1", "data.cache=memory", "data.max_bad_fraction=0.5"],
        ["accelerate.gradient_accumulation_steps=2", "log.every=3", "evaluate.batch_size=7"],
        ["accelerate.channels_last=false", "checkpoint.every=10 minutes"],
    ],
)
def test_machine_fields_may_change(
    changed: list[str], uninterrupted: dict[str, Tensor], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    stop_before(make(write_recipe(), tmp_path / "cut", "train.duration=6 steps", small=EXACT), 3)
    resumed = make(write_recipe(), tmp_path / "cut", "train.duration=6 steps", *changed, resume=True, small=EXACT)
    assert resumed.state.step == 2
    resumed.fit()
    for name, value in uninterrupted.items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], value, rtol=1e-5, atol=2e-6)


def test_data_may_move_but_not_change(write_recipe: Callable[..., Path], tmp_path: Path, image_folder: Path) -> None:
    make(write_recipe(), tmp_path / "run", f"data.dataset={image_folder}").fit()
    moved = tmp_path / "elsewhere"
    shutil.move(image_folder, moved)
    options = ["train.duration=3 steps", f"data.dataset={moved}"]
    assert make(write_recipe(), tmp_path / "run", *options, resume=True).state.step == 2
    (moved / "train" / "red" / "0.jpg").unlink()
    with pytest.raises(RunError, match=r"data set: '24 \+ 12 images, 3 classes, .* in the run, '23 \+ 12 images, 3 cl"):
        make(write_recipe(), tmp_path / "run", *options, resume=True)


def test_a_new_run_starts_from_the_weights_of_a_checkpoint(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe(), tmp_path / "run", "ema={decay: 0.5}").fit()
    (checkpoint,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    saved = load_file(checkpoint / "model.safetensors")
    for number, source in enumerate((checkpoint, checkpoint.parent, checkpoint / "model.safetensors")):
        run = tmp_path / f"new{number}"
        other = make(write_recipe(), run, f"model.pretrained={source}", "seed=5", "optimizer.lr=0.1")
        assert all(torch.equal(value, saved[name]) for name, value in other.raw_model.state_dict().items())
    averaged = make(write_recipe(), tmp_path / "averaged", f"model.pretrained={checkpoint / 'ema.safetensors'}")
    expected = load_file(checkpoint / "ema.safetensors")["fc.weight"]
    assert torch.equal(averaged.raw_model.state_dict()["fc.weight"], expected)
    with pytest.raises(ModelError, match=r"weights of another model"):
        make(write_recipe(), tmp_path / "vit", "model.name=test_vit", f"model.pretrained={checkpoint}")


def test_checkpoints_of_a_transformers_model_are_weights_to_start_from(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import ViTConfig

    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTConfig(hidden_size=8, image_size=32, patch_size=16, **sizes).save_pretrained(tmp_path / "config")
    name = f"model.name=transformers:{tmp_path / 'config'}"
    first = make(write_recipe(), tmp_path / "run", name)
    first.fit()
    (checkpoint,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    second = make(write_recipe(), tmp_path / "new", name, f"model.pretrained={checkpoint}", "seed=3")
    for key, value in first.raw_model.state_dict().items():
        assert torch.equal(second.raw_model.state_dict()[key], value)


def test_the_content_of_a_checkpoint(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe(), tmp_path / "run", "train.duration=4 steps", "ema={decay: 0.5}").fit()
    checkpoint = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["step"] == state["state"]["step"] == 4
    assert state["state"]["best"]["metric"] == "accuracy"
    assert "model: {name: test_resnet}" in state["recipe"] or "test_resnet" in state["recipe"]
    assert "1,707 + 90 images, 10 classes" in state["learnt"]["data set"]
    assert state["trackers"] == {}
    files = json.loads((checkpoint / "COMPLETE").read_text())["files"]
    assert set(files) == {"model.safetensors", "ema.safetensors", "training.safetensors", "state.json"}


def test_resuming_is_recorded_in_the_metrics(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe(), tmp_path / "run", "train.duration=2 steps").fit()
    make(write_recipe(), tmp_path / "run", "train.duration=3 steps", resume=True).fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (resumed,) = [line for line in lines if line["kind"] == "resume"]
    assert (resumed["step"], resumed["checkpoint"], resumed["processes"]) == (2, "step_00000002", 1)


@pytest.mark.usefixtures("rising_loss")
def test_a_run_that_stopped_early_is_not_continued(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    stopping = "early_stopping={metric: loss, patience: 2 steps}"
    options = ["evaluate.every=1 steps", stopping, "optimizer.lr=1e-2", "train.duration=30 steps"]
    first = make(write_recipe(), tmp_path / "run", *options).fit()
    assert first.stopped_early
    (tmp_path / "run" / "result.json").unlink()  # as if it was killed before its end was recorded
    result = make(write_recipe(), tmp_path / "run", *options, resume=True).fit()
    assert result.steps == first.steps
