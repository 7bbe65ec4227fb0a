"""The mean of the last evaluated weights: its numbers, what is kept for it, resume, processes, later commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import RECIPE, checkpoint, equal, exit_status, result_of, weights
from helpers.small_trainer import small_trainer
from safetensors.torch import load_file
from torch import nn

from hf_fasttrain.export.export import export_run
from hf_fasttrain.hub.card import model_card
from hf_fasttrain.inference import evaluate_run
from hf_fasttrain.models.lora import load_ordinary, merged_state
from hf_fasttrain.report.record import read_record
from hf_fasttrain.report.sections import page_of_run
from hf_fasttrain.run_folder.finished import read_run
from hf_fasttrain.train.final_weights import will_average
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.train.weight_average import WeightMean, kept_steps
from hf_fasttrain.utils.errors import RecipeError, RunError

SMALL = ["data.eval_fraction=0.05", "train.duration=6 steps", "optimizer.lr=1e-2", "schedule.name=constant"]
AVERAGE = ["checkpoint={final: average, average: 3, every: 2 steps}", "evaluate.every=2 steps"]


def make(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> Trainer:
    reset_accelerate()
    return Trainer.from_recipe(recipe, [*SMALL, *AVERAGE, *overrides, f"output_dir={run}"], resume=resume)


def mean_of(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean by NumPy in float64; integers of the last."""
    return {
        name: torch.from_numpy(sum(state[name].double().numpy() for state in states) / len(states)).to(last.dtype)
        if last.is_floating_point()
        else last
        for name, last in states[-1].items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 6 steps that ended with the mean of the weights after steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(RECIPE)
    make(folder / "small.yaml", folder / "run", "checkpoint.keep=5", "log.report=true").fit()
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_model_is_the_mean_of_the_last_evaluated_weights(trained: Path) -> None:
    result = result_of(trained)
    assert result["model"] == {"weights": "average", "step": 6, "steps": [2, 4, 6], "ema": False}
    states = [checkpoint(trained, step) for step in (2, 4, 6)]
    assert equal(weights(trained), mean_of(states))
    counters = [name for name in states[0] if name.endswith("num_batches_tracked")]
    assert counters
    assert all(weights(trained)[name] == 6 for name in counters)
    assert result["metrics"] != result["last"]["metrics"]
    measured = evaluate_run(trained)
    assert {name: measured[name] for name in result["metrics"]} == pytest.approx(result["metrics"])
    assert measured["weights"] == "average"


def test_later_commands_take_the_average_and_the_others(trained: Path, tmp_path: Path) -> None:
    for name in ("average", "last", "step_4"):
        export_run(trained, weights=name, output=tmp_path / name)
    assert equal(load_file(tmp_path / "average" / "model.safetensors"), weights(trained))
    assert equal(load_file(tmp_path / "last" / "model.safetensors"), checkpoint(trained, 6))
    assert equal(load_file(tmp_path / "step_4" / "model.safetensors"), checkpoint(trained, 4))
    last = evaluate_run(trained, weights="last")
    assert last["accuracy"] == pytest.approx(result_of(trained)["last"]["metrics"]["accuracy"])
    text = "mean of the weights after steps 2, 4, 6"
    assert f"These are the {text}." in model_card(read_run(trained), {}, "me/digits", {})
    page = page_of_run(read_record(trained))
    assert "the mean of those after steps 2, 4, 6" in str(page)


def test_a_run_without_an_average_says_how_to_get_one(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe(), tmp_path / "run", "checkpoint.final=last").fit()
    assert not (tmp_path / "run" / "checkpoints" / "averaged").exists()
    with pytest.raises(RunError, match=r"it has no average of its weights; train with checkpoint\.final=average"):
        export_run(tmp_path / "run", weights="average")


def test_the_moving_average_is_averaged_if_there_is_one(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe(), tmp_path / "run", "ema={decay: 0.5}", "checkpoint.keep=5").fit()
    states = [checkpoint(tmp_path / "run", step, "ema") for step in (2, 4, 6)]
    assert equal(weights(tmp_path / "run"), mean_of(states))


class Killed(BaseException):
    """Ends a training as a kill would: nothing is saved any more."""


def kill_after(trainer: Trainer, step: int) -> None:
    def train() -> None:
        with trainer.running():
            for report in trainer.iterate():
                if report.step == step:
                    raise Killed

    with pytest.raises(Killed):
        train()


@pytest.mark.parametrize("killed_after", [3, 5])
def test_a_killed_and_resumed_run_ends_with_the_same_average(
    trained: Path, write_recipe: Callable[..., Path], tmp_path: Path, killed_after: int
) -> None:
    recipe, run = write_recipe(), tmp_path / "run"
    trainer = make(recipe, run)
    kill_after(trainer, killed_after)
    make(recipe, run, resume=True).fit()
    assert equal(weights(run), weights(trained))
    assert result_of(run)["model"]["steps"] == [2, 4, 6]


def test_a_longer_training_averages_later_weights(run: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe()
    make(recipe, run, "train.duration=9 steps", resume=True).fit()
    make(recipe, tmp_path / "whole", "train.duration=9 steps").fit()
    assert result_of(run)["model"]["steps"] == [6, 8, 9]
    assert equal(weights(run), weights(tmp_path / "whole"))
    make(recipe, run, "train.duration=10 steps", resume=True).fit()
    assert result_of(run)["model"]["steps"] == [6, 8, 10]  # 9 was the end, and is no step of evaluation any more


def test_disk_is_bounded_and_each_checkpoint_can_be_resumed(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    trainer = make(write_recipe(), tmp_path / "run", "evaluate.every=1 step", "train.duration=14 steps",
                   "checkpoint={final: average, average: 2, every: 4 steps, keep: 1}")  # fmt: skip
    most = 0
    with trainer.running():
        for report in trainer.iterate():
            steps = kept_steps(trainer)
            most = max(most, len(steps))
            assert report.step in steps
        assert kept_steps(trainer)[-2:] == [13, 14]
        trainer.finish()
    assert most <= 4  # 2 for the end, and 2 for the checkpoint


def test_all_processes_end_with_the_average(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe()

    def train() -> dict[str, Any]:
        trainer = make(recipe, tmp_path / "run", "checkpoint.keep=5")
        trainer.fit()
        return {name: tensor.clone() for name, tensor in trainer.trained_model.state_dict().items()}

    one, two = run_processes(train)
    assert equal(one, two)
    assert equal(weights(tmp_path / "run"), one)
    assert equal(one, mean_of([checkpoint(tmp_path / "run", step) for step in (2, 4, 6)]))


@pytest.mark.parametrize("fault", ["corrupt", "gone"])
def test_states_that_cannot_be_read_are_left_out_with_a_note(
    run: Path, write_recipe: Callable[..., Path], fault: str
) -> None:
    path = run / "checkpoints" / "averaged" / "step_00000004"
    if fault == "gone":
        shutil.rmtree(path)
    else:
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (run / "result.json").unlink()
    result = make(write_recipe(), run, resume=True).fit()
    assert result.model["steps"] == [2, 6]
    assert equal(weights(run), mean_of([checkpoint(run, step) for step in (2, 6)]))
    assert any("only 2 of the last 3 evaluated states are kept" in note for note in result.notes)
    assert any("are not averaged: checkpoint" in note for note in result.notes) == (fault == "corrupt")


def test_resume_with_another_choice_ends_the_run_again(
    run: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--resume", f"output_dir={run}", *SMALL, *AVERAGE, "checkpoint.keep=5"]
    assert exit_status([str(write_recipe()), *arguments]) == 0
    assert "this run is finished (6 steps); nothing to do" in capsys.readouterr().out
    assert exit_status([str(write_recipe()), *arguments, "checkpoint.final=last"]) == 0
    assert "now writing what is missing: model" in capsys.readouterr().out
    assert result_of(run)["model"] == {"weights": "last", "step": 6, "ema": False}
    assert equal(weights(run), checkpoint(run, 6))
    assert exit_status([str(write_recipe()), *arguments]) == 0
    assert "the run ends with the mean of the weights after steps 2, 4, 6" in capsys.readouterr().out
    assert result_of(run)["model"]["weights"] == "average"


def test_a_run_that_kept_no_states_ends_with_the_last_weights_and_says_so(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, run = write_recipe(), tmp_path / "run"
    make(recipe, run, "checkpoint.final=last").fit()
    trainer = make(recipe, run, resume=True)
    result = trainer.fit()
    assert result.model == {"weights": "last", "step": 6, "ema": False}
    assert any("only 1 of the last 3 evaluated states is kept; the run ends with the last" in n for n in result.notes)
    assert not will_average(make(recipe, run, resume=True))


def test_training_continues_from_the_last_weights_after_the_average(tmp_path: Path) -> None:
    trainer, whole = (small_trainer(tmp_path / name, 6, evaluate_every="1 step") for name in ("a", "b"))
    for each in (trainer, whole):
        each.final, each.num_averaged = "average", 2
    with trainer.running():
        for report in trainer.iterate():
            if report.step == 3:
                break
        assert trainer.finish().model["steps"] == [2, 3]
    trainer.save()  # does nothing: these are not the weights of step 3
    with trainer.running():
        for _ in trainer.iterate():
            pass
        trainer.finish()
    whole.fit()
    assert equal(trainer.raw_model.state_dict(), whole.raw_model.state_dict())
    assert trainer.load_best() == whole.load_best()
    assert equal(trainer.raw_model.state_dict(), whole.raw_model.state_dict())


def test_leftovers_of_another_run_are_not_averaged(tmp_path: Path) -> None:
    first = small_trainer(tmp_path, 3, evaluate_every="1 step")
    first.final = "average"
    kill_after(first, 1)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000001", ignore_errors=True)
    second = small_trainer(tmp_path, 4, evaluate_every="2 steps")
    second.final = "average"
    assert second.fit().model["steps"] == [2, 4]


def test_the_loss_is_averaged_with_the_model(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.scale * logits, labels)

    loss = Scaled()
    trainer = small_trainer(tmp_path, 2, loss=loss, evaluate_every="1 step")
    trainer.optimizer.add_param_group({"params": [loss.scale]})
    trainer.final = "average"
    scales = []
    with trainer.running():
        for _ in trainer.iterate():
            scales.append(loss.scale.item())
        trainer.finish()
    assert loss.scale.item() == pytest.approx(sum(scales) / 2, abs=1e-7)
    assert scales[0] != scales[1]


def test_an_average_of_one_is_refused_before_training(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, 2)
    trainer.final, trainer.num_averaged = "average", 1
    with pytest.raises(RunError, match="num_averaged: must be a whole number of at least 2, got 1"):
        trainer.fit()


def test_without_a_run_folder_the_last_weights_stay() -> None:
    trainer = small_trainer(None, 2)  # as those of doctor, tune and mislabeled
    trainer.final = "average"
    result = trainer.fit()
    assert result.model["weights"] == "last"
    assert any("without an output_dir no weights are kept for an average" in note for note in result.notes)


def test_a_recipe_without_evaluations_has_no_average(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"checkpoint\.final .*needs evaluations, and evaluate\.every is never"):
        make(write_recipe(), tmp_path / "run", "evaluate.every=never")


def test_half_precision_is_averaged_in_float64_and_integers_are_the_last() -> None:
    mean = WeightMean()
    values = [1.0, 1.0 + 2**-10, 1.0 + 2**-10]
    for step, value in enumerate(values):
        mean.add(step, {"model": {"w": torch.tensor([value], dtype=torch.float16), "n": torch.tensor(step)}})
    computed = mean.compute()["model"]
    assert computed["w"].dtype == torch.float16
    assert computed["w"].item() == torch.tensor(sum(values) / 3, dtype=torch.float64).half().item()
    assert computed["n"].item() == 2
    with pytest.raises(ValueError, match="other tensors"):
        mean.add(3, {"model": {"w": torch.zeros(2)}})


def test_a_mean_is_loaded_into_a_model_with_adapters() -> None:
    peft = pytest.importorskip("peft")
    from hf_fasttrain.models.lora import ADAPTER

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="0", lora_alpha=4), model, ADAPTER)
    nn.init.normal_(model[0].lora_B[ADAPTER].weight)
    wanted = {name: torch.randn_like(tensor) for name, tensor in merged_state(model).items()}
    load_ordinary(model, wanted)
    assert equal(merged_state(model), wanted)
    x = torch.randn(3, 4)
    expected = (x @ wanted["0.weight"].T + wanted["0.bias"]) @ wanted["1.weight"].T + wanted["1.bias"]
    torch.testing.assert_close(model.eval()(x), expected)
