"""Early stopping: reported when it happens, at the end and in the report; such a run can be continued."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import RECIPE, exit_status, steps_of
from helpers.small_trainer import StatefulLoader
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.report.format import describe_early_stop
from hf_fasttrain.report.record import Record
from hf_fasttrain.report.sections import page_of_run
from hf_fasttrain.run_folder.checkpoint import require_same_settings
from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.early_stopping import adapt_state
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError

HOW = "to continue: {} and a longer early_stopping.patience, early_stopping=null or a longer train.duration"
IN_PYTHON = HOW.format("resume=True (or Trainer.restore())")
ON_COMMAND_LINE = HOW.format("the same command with --resume")
TWO = Watch("accuracy", patience=2)


def six_batches() -> StatefulLoader:
    """Return the batches of an epoch."""
    generator = torch.Generator().manual_seed(0)
    return StatefulLoader((torch.randn(4, 3, 2, 2, generator=generator), torch.arange(4) % 3) for _ in range(6))


class Scripted(Trainer):
    """Evaluates to given accuracies, by step."""

    course: Sequence[float] = ()

    def evaluate(self, loader: Any = None) -> dict[str, float]:
        accuracy = self.course[self.state.step]
        return {"accuracy": accuracy, "loss": 1 - accuracy}


def run(
    folder: Path, watch: Watch | None, *accuracies: float, duration: int = 9, resume: bool = False, show: bool = False
) -> Trainer:
    """Train a linear model with an evaluation after each step; the first accuracy is that before training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    trainer = type("Course", (Scripted,), {"course": accuracies})(
        model,
        six_batches(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        duration=f"{duration} steps",
        eval_loader=[None],  # not watched
        num_classes=3,
        evaluate_every="1 step",
        checkpoint_every="1 step",
        early_stopping=watch,
        output_dir=folder,
        report=False,
        log=RunLog(folder, show=show),
    )
    trainer.final = "last"
    if resume:
        trainer.restore()
    trainer.fit()
    return trainer


def weight(trainer: Trainer) -> Tensor:
    return trainer.raw_model[1].weight.detach()  # type: ignore[index]


BEST_AT_TWO = (0, 0.5, 0.75, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7)


def test_early_stopping_is_reported_with_metric_best_value_step_patience_and_how_to_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(tmp_path, TWO, *BEST_AT_TWO, show=True)
    assert trainer.state.step == 4
    line = (
        "stopped early after step 4 of 9: accuracy has not been above 0.7500, its best value (step 2), for 2 steps; "
        f"early_stopping.patience is 2; {IN_PYTHON}"
    )
    assert capsys.readouterr().out.splitlines()[-1] == line
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["stopped_early"]
    assert result["early_stopping"] == {
        "metric": "accuracy", "mode": "max", "value": 0.75, "step": 2, "patience": 2, "waited": 2, "stopped_at": 4,
        "num_steps": 9, "min_delta": 0.0,
    }  # fmt: skip


def test_patience_that_runs_out_at_the_last_step_is_no_early_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(tmp_path, TWO, *BEST_AT_TWO, duration=4, show=True)
    assert trainer.early_stop is None
    assert "stopped early" not in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["early_stopping"] is None
    assert run(tmp_path, TWO, *BEST_AT_TWO, duration=5, resume=True).state.step == 5  # longer, so it continues


@pytest.mark.parametrize("watch", [None, replace(TWO, patience=9)], ids=["null", "longer patience"])
def test_with_longer_or_no_patience_it_continues_as_if_never_stopped(watch: Watch | None, tmp_path: Path) -> None:
    uninterrupted = run(tmp_path / "whole", None, *BEST_AT_TWO)
    assert run(tmp_path / "cut", TWO, *BEST_AT_TWO).state.step == 4
    assert run(tmp_path / "cut", TWO, *BEST_AT_TWO, resume=True).state.step == 4  # nothing has changed
    resumed = run(tmp_path / "cut", watch, *BEST_AT_TWO, resume=True)
    assert resumed.state.step == 9
    assert torch.equal(weight(resumed), weight(uninterrupted))
    assert resumed.state.resumed_at == [4]
    assert json.loads((tmp_path / "cut" / "result.json").read_text())["stopped_early"] is False


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_gain_below_min_delta_does_not_count(mode: str, tmp_path: Path) -> None:
    accuracies = (0, 0.5, 0.75, 0.755, 0.759, 0.7595, 0.9, 0.9, 0.9, 0.9)
    metric = "accuracy" if mode == "max" else "loss"  # 1 - accuracy
    stopped = run(tmp_path, Watch(metric, patience=3, min_delta=0.01), *accuracies)
    assert stopped.state.step == 5
    value = "above 0.7500" if mode == "max" else "below 0.2500"
    assert f"{metric} has not been more than 0.01 {value}, its best value (step 2), for 3" in str(stopped.early_stop)
    assert stopped.state.best is not None
    assert stopped.state.best["step"] == 5  # the best checkpoint is the best one
    assert run(tmp_path / "any", Watch(metric, patience=3), *accuracies).state.step == 9
    with pytest.raises(RunError, match=rf"Watch\('{metric}'\): min_delta must be at least 0, got -0\.1"):
        Watch(metric, min_delta=-0.1)


def test_with_a_longer_duration_patience_starts_again(tmp_path: Path) -> None:
    run(tmp_path, TWO, *BEST_AT_TWO)
    resumed = run(tmp_path, TWO, *BEST_AT_TWO, duration=10, resume=True)
    assert resumed.state.step == 6
    (note,) = [note for note in resumed.log.notes if "stopped early" in note]
    assert note == (
        "this run had stopped early after step 4 of 9: accuracy has not been above 0.7500, its best value (step 2), "
        "for 2 steps; early_stopping.patience is 2; train.duration is longer now, so it continues, and patience "
        "counts from step 4"
    )
    assert run(tmp_path, TWO, *BEST_AT_TWO, duration=10, resume=True).state.step == 6  # not longer than before
    assert run(tmp_path, TWO, *BEST_AT_TWO, duration=8, resume=True).state.step == 6
    better = (*BEST_AT_TWO[:7], 0.8, 0.7, 0.7, 0.7, 0.7)
    assert run(tmp_path, TWO, *better, duration=12, resume=True).state.step == 9  # two after the best, at 7


def test_restarted_patience_survives_a_kill(tmp_path: Path) -> None:
    run(tmp_path, TWO, *BEST_AT_TWO)
    with pytest.raises(IndexError):
        run(tmp_path, TWO, *BEST_AT_TWO[:6], duration=20, resume=True)  # dies in the evaluation after step 6
    assert steps_of(tmp_path)[-1] == 5
    assert run(tmp_path, TWO, *BEST_AT_TWO, duration=20, resume=True).state.step == 6


def test_a_shorter_patience_ends_a_resumed_run_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(IndexError):
        run(tmp_path, replace(TWO, patience=9), *BEST_AT_TWO[:6])  # dies in the evaluation after step 6
    assert run(tmp_path, TWO, *BEST_AT_TWO, resume=True, show=True).state.step == 5
    assert "stopped early after step 5 of 9: accuracy has not been above 0.7500, its best value (step 2), for 3 " in (
        capsys.readouterr().out
    )


def test_another_metric_is_watched_after_resuming() -> None:
    watched = {"metric": "accuracy", "mode": "max", "value": 0.75, "step": 2}
    state = State(step=4, evaluated_at=4, metrics={"accuracy": 0.7, "loss": 0.3}, watched=watched, num_steps=9)
    notes = adapt_state(Watch("loss", "min", 2), state, 9)
    assert notes == (
        "early_stopping now watches loss (min), before accuracy (max): patience counts from the next evaluation"
    )
    assert state.watched is None
    older = replace(state, watched={"metric": "accuracy", "value": 0.75, "step": 2})  # of an older version
    assert adapt_state(TWO, older, 9) is None
    assert older.watched is not None
    assert adapt_state(Watch("loss", "min", 2), older, 9) is not None


def test_the_command_line_reports_early_stopping_and_can_continue(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self, loader=None: {"accuracy": BEST_AT_TWO[self.state.step], "loss": 1.0}
    )
    text = RECIPE.replace("duration: 2 steps", "duration: 9 steps").replace("test_resnet", "test_vit")
    recipe = write_recipe(f"{text}early_stopping: {{metric: accuracy, patience: 2 steps}}\nevaluate: {{every: 1 step}}")
    command = [str(recipe), f"output_dir={tmp_path / 'run'}"]
    assert exit_status(command) == 0
    early = "stopped early after step 4 of 9: accuracy has not been above 0.7500, its best value (step 2), for 2 steps"
    closing = capsys.readouterr().out.partition("done: 4 steps, ")[2]
    assert early in closing
    assert f"      {ON_COMMAND_LINE}\n" in closing
    assert exit_status([*command, "--resume"]) == 0
    again = capsys.readouterr().out
    assert f"{tmp_path / 'run'}: this run is finished (4 steps); nothing to do\n  {early}" in again
    assert ON_COMMAND_LINE in again
    assert exit_status([*command, "--resume", "early_stopping=null"]) == 0
    assert steps_of(tmp_path / "run")[-1] == 9
    closing = capsys.readouterr().out.partition("done: 9 steps, ")[2]
    assert closing
    assert "stopped early" not in closing


def test_checkpoints_of_older_versions_let_early_stopping_change(tmp_path: Path) -> None:
    saved = {"seed": 0, "early_stopping.metric": "accuracy", "early_stopping.patience": "2 steps"}
    require_same_settings(saved, {"seed": 0}, tmp_path)
    require_same_settings({"seed": 0, "early_stopping": None}, {"seed": 0}, tmp_path)
    with pytest.raises(RunError, match=r"seed: 0 in the run, 1 now"):
        require_same_settings(saved, {"seed": 1}, tmp_path)


def test_the_report_mentions_early_stopping_without_result_json(tmp_path: Path) -> None:
    result = {
        "metric": "accuracy",
        "mode": "max",
        "value": 0.75,
        "step": 2,
        "patience": 1200,
        "waited": 1,
        "num_steps": 9,
    }
    page = page_of_run(Record(tmp_path, result={"steps": 4, "early_stopping": {**result, "stopped_at": 4}}))
    messages = (
        "after step 4 of 9, since accuracy had not been above 75.00% (step 2) for 1 step; early_stopping.patience was "
        "1,200"
    )
    assert page.warnings == [f"Training stopped early: {messages}."]
    (environment,) = [section for section in page.sections if section.id == "environment"]
    assert messages in str(environment.tables)
    with_delta = describe_early_stop({**result, "stopped_at": 4, "min_delta": 0.01})
    assert with_delta is not None
    assert "since accuracy had not been more than 0.01 above 75.00% (step 2)" in with_delta
    for damaged in (None, "yes", result, {**result, "stopped_at": "x"}):
        assert describe_early_stop(damaged) is None
