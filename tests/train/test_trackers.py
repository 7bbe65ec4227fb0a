"""Trackers: a resumed run continues its tracker runs, and a failing tracker does not stop training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import reset_accelerate
from torch import Tensor

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.utils.errors import RunError

SMALL = ["train.duration=6 steps", "checkpoint.every=2 steps", "evaluate.every=3 steps", "log.every=1"]
BY_ID = ("mlflow", "trackio", "wandb")


class Killed(Trainer):
    """Dies in its sixth step: the fifth is logged, the fourth is saved."""

    def train_step(self, step: Step) -> Tensor:
        if step.index == 5:
            raise KeyboardInterrupt
        return super().train_step(step)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make trackers write only below `tmp_path`."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported first
    monkeypatch.chdir(tmp_path)
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].end_run()  # a failing test must not leave its run to the next one


def make(
    write_recipe: Callable[..., Path],
    run: Path,
    tracker: str,
    *overrides: str,
    resume: bool = False,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    reset_accelerate()
    project = f"log.project=test_{run.parent.name}"
    options = [*SMALL, f"log.trackers=[{tracker}]", project, f"output_dir={run}", *overrides]
    return kind.from_recipe(write_recipe(), options, resume=resume)


def train(*args: Any, **options: Any) -> Trainer:
    """Train as the command line does, and return the trainer."""
    trainer = make(*args, **options)
    try:
        trainer.fit()
    finally:
        trainer.accelerator.end_training()
    return trainer


def saved_ids(run: Path) -> list[dict[str, str]]:
    return [json.loads(path.read_text())["trackers"] for path in sorted(run.glob("checkpoints/*/state.json"))]


def steps_of(tracker: str, run: Path, name: str) -> list[int]:
    """Return the steps at which a tracker's only run has a value."""
    project = f"test_{run.parent.name}"
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "trackers" / project), size_guidance={"scalars": 0}).Reload()
        return [event.step for event in events.Scalars(name)]
    if tracker == "mlflow":
        import mlflow

        (tracker_run,) = mlflow.search_runs(experiment_names=[project], output_format="list")
        return sorted(metric.step for metric in mlflow.MlflowClient().get_metric_history(tracker_run.info.run_id, name))
    from trackio.sqlite_storage import SQLiteStorage

    (record,) = SQLiteStorage.get_run_records(project)
    return [
        line["step"] for line in SQLiteStorage.get_logs(project, record["name"], run_id=record["id"]) if name in line
    ]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "trackio"])
def test_a_resumed_run_continues_its_tracker_run_without_duplicate_steps(
    tracker: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip(tracker)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(write_recipe, run, tracker, kind=Killed)
    assert steps_of(tracker, run, "train/loss") == [1, 2, 3, 4, 5]
    train(write_recipe, run, tracker, resume=True)
    assert steps_of(tracker, run, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps_of(tracker, run, "eval/loss") == [3, 6]
    ids = saved_ids(run)
    assert all(run_id == ids[0] for run_id in ids)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("tracker", BY_ID)
def test_a_longer_run_keeps_its_tracker_run(tracker: str, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    run = tmp_path / "run"
    train(write_recipe, run, tracker)
    before = saved_ids(run)[-1]
    assert before.keys() == {tracker}
    train(write_recipe, run, tracker, "train.duration=8 steps", resume=True)
    assert saved_ids(run)[-1] == before
    if tracker == "wandb":
        folders = list(tmp_path.glob("wandb/offline-run-*"))
        assert len(folders) == 2
        assert all(path.name.endswith(before["wandb"]) for path in folders)
    else:
        assert steps_of(tracker, run, "train/loss") == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("tracker", ["tensorboard", *BY_ID])
def test_a_failing_tracker_is_noted_once_and_training_continues(
    tracker: str, write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(tracker)
    run, calls = tmp_path / "run", []
    trainer = make(write_recipe, run, tracker)
    (fed,) = trainer.accelerator.trackers
    log = fed.log

    def fail(values: dict[str, float], step: int, **options: Any) -> None:
        calls.append(step)
        if step >= 4:
            raise ConnectionError("no route to host")
        log(values, step=step, **options)

    fed.log = fail
    result = trainer.fit()
    trainer.accelerator.end_training()
    assert result.steps == 6
    assert calls == [1, 2, 3, 3, 4]  # 3 with its evaluation
    assert [note for note in result.notes if "no route" in note] == [n for n in result.notes if "log.trackers" in n]
    assert capsys.readouterr().out.count("no route to host") == 1
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert saved_ids(run)[-1].keys() == {tracker} - {"tensorboard"}  # it is continued when the run is resumed


@pytest.mark.usefixtures("offline")
def test_a_tracker_that_cannot_start_is_an_error_that_says_what_to_do(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def start(self: TensorBoardTracker) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(TensorBoardTracker, "start", start)
    with pytest.raises(RunError, match=r"log.trackers can't be started: no route to host; log in, fix"):
        make(write_recipe, tmp_path / "run", "tensorboard")
